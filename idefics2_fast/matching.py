"""Words in a text that grows, in time linear in the text and in the words.

Source: Aho and Corasick, "Efficient string matching", 1975.
"""

from __future__ import annotations

from collections.abc import Iterable


class Matcher:
    """An automaton whose state is the longest end of the text that begins a word; 0 is the empty one.

    Attributes:
        depth: characters of each state.
        found: length of the longest word that ends in each state, 0 where none does.
    """

    def __init__(self, words: Iterable[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._shorter = [0]  # the longest state that is an end of this one
        self.depth, self.found = [0], [0]
        for word in words:
            self._add(word)
        self._link()

    def __bool__(self) -> bool:
        return len(self._next) > 1

    def step(self, state: int, character: str) -> int:
        """The state after one more character."""
        while state and character not in self._next[state]:
            state = self._shorter[state]
        return self._next[state].get(character, 0)

    def finds(self, state: int, text: str) -> bool:
        """Whether a word ends within `text`, which comes after `state`."""
        for character in text:
            state = self.step(state, character)
            if self.found[state]:
                return True
        return False

    def run(self, state: int, text: str) -> int:
        """The state after a text."""
        for character in text:
            state = self.step(state, character)
        return state

    def _add(self, word: str) -> None:
        state = 0
        for character in word:
            if character not in self._next[state]:
                self._next[state][character] = len(self._next)
                self._next.append({})
                self._shorter.append(0)
                self.depth.append(self.depth[state] + 1)
                self.found.append(0)
            state = self._next[state][character]
        self.found[state] = len(word)

    def _link(self) -> None:
        states = list(self._next[0].values())
        for state in states:  # grows while it is walked: by depth
            self.found[state] = self.found[state] or self.found[self._shorter[state]]
            for character, longer in self._next[state].items():
                self._shorter[longer] = self.step(self._shorter[state], character)
                states.append(longer)
