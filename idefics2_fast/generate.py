"""Generation: one packed prefill, then one token a sequence a step, each sequence with its own length, seed and end."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from idefics2_fast.batch import Batch
from idefics2_fast.cache import KVCache
from idefics2_fast.generation_config import (
    Chain,
    Document,
    check_generation_config,
    check_ids,
    eos_ids,
    processors,
    require_computed,
    warpers,
)
from idefics2_fast.json_files import short
from idefics2_fast.layers import BASE, Norms, Route
from idefics2_fast.matching import Matcher

if TYPE_CHECKING:
    from idefics2_fast.model import Idefics2

LOST = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet
CHARACTER_BYTES = 4  # of UTF-8, at most

# on_token(document index, token id, text that has become certain; "" while a character is incomplete)
OnToken = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Generation:
    """What `generate` returns, one entry a document.

    Attributes:
        tokens: generated ids, the end token included.
        texts: the ids as text without special tokens, cut before a stop string; None for a batch without tokenizer.
        finish: "stop" (an end token or stop string) or "length" (`max_new_tokens`, or the model's last position).
    """

    tokens: list[list[int]]
    texts: list[str] | None
    finish: list[str]


@dataclass
class _Sequence:
    prompt: list[int]
    limit: int
    draw: torch.Generator
    tokens: list[int] = field(default_factory=list)
    text: _Text | None = None
    finish: str = ""
    processors: list[Chain] = field(default_factory=list)
    warpers: list[Chain] = field(default_factory=list)
    ids: Tensor | None = None  # [1, all that there may be] of prompt and tokens, where a processor or a warper reads them

    def end(self, length: int) -> tuple[int, ...]:
        """The last ids of prompt and tokens."""
        missing = length - len(self.tokens)
        return tuple(self.prompt[-missing:] + self.tokens if missing > 0 else self.tokens[-length:])


@torch.inference_mode()
def generate(
    model: Idefics2,
    batch: Batch,
    *,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int | Sequence[int] = 0,
    stop_tokens: Sequence[int] | None = None,
    stop_strings: Sequence[str] | None = None,
    bad_words: Sequence[str | Sequence[int]] | None = None,
    generation_config: Mapping[str, Any] | None = None,
    on_token: OnToken | None = None,
) -> Generation:
    """Continues every document of the batch.

    A document's continuation does not depend on the documents beside it, sampled ones included. None stands for what the checkpoint's
    generation_config.json says, as in transformers' `generate`, and for the value named below where it says nothing.

    Args:
        max_new_tokens: 64 where neither `max_new_tokens` nor `max_length` is in the file.
        temperature: 0 is greedy; otherwise logits are divided by it and a token is drawn. Greedy where the file has no `do_sample`.
        top_p: draw from the smallest set of tokens whose probability reaches this (nucleus sampling, arXiv 1904.09751); 1.
        seed: document d draws from a generator of its own, seeded by (seed, d), or by its entry of a list of D seeds.
        stop_tokens: ids that end a document, in place of `eos_token_id` in the file, or in config.json where the file has none.
        stop_strings: texts that end a document; one that names a special token counts as that token. Text around a special token, which
            an answer's text does not show, is refused.
        bad_words: words that are never completed. Ids are matched with prompt and answer; a text does not appear in the answer's
            text, however it is cut into tokens, and at its start without its leading spaces neither. Those of the file are replaced.
        generation_config: in place of the file's content, by its names; {} for nothing of it.
        on_token: called with every token as it is made.

    Raises:
        ValueError: settings out of range, an empty batch, a prompt that leaves no position free, strings without a tokenizer, tokens
            that are not this model's, a generation_config that asks for another algorithm.
    """
    _check_given(
        model.config.text.vocab_size,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop_tokens=stop_tokens,
        stop_strings=stop_strings,
        bad_words=bad_words,
        generation_config=generation_config,
    )
    settings = _settings(model, generation_config, max_new_tokens, temperature, top_p, stop_strings)
    _check(model, batch, settings)
    batch = replace(model.routed(batch), norms=_norms(model))
    if batch.tokenizer is None and (settings.stop_strings or any(isinstance(word, str) for word in bad_words or ())):
        raise ValueError("stop_strings and bad_words given as text need a tokenizer: make the batch with a Processor, or give ids")
    stop_ids, strings = _stops(model, batch, stop_tokens, settings)
    words = _file_words(settings.values, stop_ids) if bad_words is None else bad_words
    ids, texts = _split_words(words, batch.tokenizer)
    bans = _Bans(ids, model.config.text.vocab_size, model.device)
    sequences = _sequences(model, batch, settings, seed, Matcher(strings), Matcher(texts))
    _attach_chains(sequences, settings, stop_ids, model)
    cache = KVCache(model.config.text, [len(s.prompt) + s.limit for s in sequences], dtype=model.dtype, device=model.device)
    logits, active = prefill(model, batch, cache), list(range(len(sequences)))
    rows = torch.tensor(active, device=model.device)
    while active:
        chosen = _next_tokens(logits, [sequences[i] for i in active], bans, settings)
        for index, token in zip(active, chosen.tolist(), strict=True):
            if not sequences[index].finish:
                _append(index, sequences[index], token, stop_ids, on_token)
        running = [i for i in active if not sequences[i].finish]
        if not running:
            break
        if model.device.type == "cpu" and len(running) < len(active):  # a captured graph keeps its shape; a CPU drops the finished
            chosen = torch.tensor([sequences[i].tokens[-1] for i in running])
            active, rows = running, torch.tensor(running)
        route = Route.of([batch.adapters[i] for i in active] if batch.adapters else (), [1] * len(active), batch.norms)
        logits = decode_step(model, cache, chosen, rows, route)
    texts = None if batch.tokenizer is None else [s.text.text for s in sequences]
    return Generation([s.tokens for s in sequences], texts, [s.finish for s in sequences])


def _norms(model: Idefics2) -> Norms:
    """DoRA's norms for one call, during which weights stay as they are: derived once, and not for each token."""
    return {layer: layer.row_norm() for layer in model.modules() if getattr(layer, "magnitude", None) is not None}


def prefill(model: Idefics2, batch: Batch, cache: KVCache) -> Tensor:
    """Logits [D, vocab] after each document, whose keys and values enter the cache."""
    batch = model.routed(batch)
    rotary = model.text_model.rotary(batch.positions, model.dtype)
    route = Route.of(batch.adapters, batch.documents.lengths, batch.norms)
    hidden = model.text_model(model.embed(batch), rotary, cache.prefill(batch.documents), route)
    ends = batch.document_offsets[1:].to(torch.int64) - 1
    return model.logits(hidden.index_select(0, ends), Route.of(batch.adapters, [1] * len(batch.documents), batch.norms))


def decode_step(model: Idefics2, cache: KVCache, token_ids: Tensor, sequences: Tensor, route: Route = BASE) -> Tensor:
    """Logits [d, vocab] after one more token (int64 [d]) of each of `sequences` (int64 [d]), whose adapters `route` names."""
    rotary = cache.rotary(sequences)
    x = model.text_model.embed_tokens(token_ids, route=route)
    return model.logits(model.text_model(x, rotary, cache.decode(sequences), route), route)


@dataclass(frozen=True)
class _Settings:
    """What `generate` was told, or the file tells it; `values` is the file's content."""

    values: Mapping[str, Any]
    max_new_tokens: int
    max_length: int | None
    temperature: float
    top_p: float
    stop_strings: list[str]


def _settings(
    model: Idefics2,
    given: Mapping[str, Any] | None,
    max_new_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    stop_strings: Sequence[str] | None,
) -> _Settings:
    file = model.generation_config if given is None else given
    check_generation_config(file)
    require_computed(file)
    check_ids(file, model.config.text.vocab_size)
    values = {name: value for name, value in file.items() if value is not None}
    max_length = None
    if max_new_tokens is None:
        max_new_tokens = values.get("max_new_tokens")
        max_length = values.get("max_length") if max_new_tokens is None else None
    if temperature is None:
        temperature = values.get("temperature", 1.0) if values.get("do_sample") else 0.0
    if stop_strings is None:
        stop_strings = values.get("stop_strings", ())
    strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
    return _Settings(
        values,
        64 if max_new_tokens is None else max_new_tokens,
        max_length,
        temperature,
        top_p if top_p is not None else values.get("top_p", 1.0) if temperature > 0 else 1.0,
        strings,
    )


def _is_whole(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool | str) and getattr(value, "ndim", 0) == 0


def _is_number(value: Any) -> bool:
    return hasattr(value, "__float__") and not isinstance(value, bool) and getattr(value, "ndim", 0) == 0


def _are(kind: Callable[[Any], bool], value: Any) -> bool:
    return isinstance(value, Collection) and not isinstance(value, str | bytes | Mapping) and all(map(kind, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


# What each setting of `generate` may be, beside None, and that in words; ranges are checked with the file's values.
_GIVEN: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": (_is_whole, "an integer, 1 or more"),
    "temperature": (_is_number, "a number, 0 (greedy) or more"),
    "top_p": (_is_number, "a number, more than 0 and at most 1"),
    "seed": (lambda value: _is_whole(value) or _are(_is_whole, value), "an integer, or one for each document"),
    "stop_tokens": (lambda value: _are(_is_whole, value), "a list of token ids"),
    "stop_strings": (lambda value: _is_text(value) or _are(_is_text, value), "a list of texts"),
    "bad_words": (
        lambda value: _are(lambda word: _is_text(word) or _are(_is_whole, word), value),
        "a list of texts and lists of token ids",
    ),
    "generation_config": (lambda value: isinstance(value, Mapping), "an object"),
}


def _check_given(vocab_size: int, **given: Any) -> None:
    """Refuses settings of another kind, and stop tokens that the model never makes."""
    for name, value in given.items():
        holds, expected = _GIVEN[name]
        if value is not None and not holds(value):
            raise ValueError(f"{name} is {short(value)}, expected {expected}")
    outside = next((token for token in given["stop_tokens"] or () if not 0 <= token < vocab_size), None)
    if outside is not None:
        raise ValueError(f"stop_tokens holds {outside}, expected ids of the vocabulary of {vocab_size}")


def _check(model: Idefics2, batch: Batch, settings: _Settings) -> None:
    if settings.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {settings.max_new_tokens}, expected 1 or more")
    if not 0.0 <= settings.temperature < float("inf"):
        raise ValueError(f"temperature is {settings.temperature}, expected 0 (greedy) or more")
    if not 0.0 < settings.top_p <= 1.0:
        raise ValueError(f"top_p is {settings.top_p}, expected more than 0 and at most 1")
    limit = model.config.text.max_position_embeddings
    for index, length in enumerate(batch.documents.lengths):
        if length == 0:
            raise ValueError(f"document {index} is empty: expected one token at least")
        if length >= limit:
            raise ValueError(f"document {index} has {length} tokens: expected fewer than the model's {limit} positions")
        if settings.max_length is not None and length >= settings.max_length:
            found = f"document {index} has {length} tokens: expected fewer than generation_config's max_length {settings.max_length}"
            raise ValueError(f"{found}, or max_new_tokens")
    if len(batch.documents) == 0:
        raise ValueError("the batch has no documents: expected one at least")
    _check_tokens(model, batch)


def _check_tokens(model: Idefics2, batch: Batch) -> None:
    """A processor of another model gives ids that mean something else here, or nothing."""
    least, most = (bound.item() for bound in batch.token_ids.aminmax())
    if not 0 <= least <= most < model.config.text.vocab_size:
        outside = least if least < 0 else most
        vocabulary = f"the model's vocabulary of {model.config.text.vocab_size}"
        raise ValueError(f"the batch has the token id {outside}, expected ids of {vocabulary}")
    if batch.image_rows is not None and batch.image_rows.shape[0]:
        ids = batch.token_ids.index_select(0, batch.image_rows.to(torch.int64))
        own = model.config.image_token_id
        if bool((ids != own).any()):
            other = ids[(ids != own).nonzero()[0, 0]].item()
            found = f"the batch has images at tokens of id {other}, expected the model's image_token_id {own}"
            raise ValueError(f"{found}: make it with the Processor of this model")


def _stops(model: Idefics2, batch: Batch, tokens: Sequence[int] | None, settings: _Settings) -> tuple[set[int], list[str]]:
    strings, vocab_size = settings.stop_strings, model.config.text.vocab_size
    ids = set(eos_ids(settings.values, model.config.eos_token_ids) if tokens is None else tokens)
    if tokens is None and min(ids) >= vocab_size:  # a text would never end
        raise ValueError(f"eos_token_id is {sorted(ids)}, expected an id of the vocabulary of {vocab_size}, or stop_tokens")
    if any(not string for string in strings):
        raise ValueError("stop_strings holds an empty string: expected text")
    special = _unshown(batch.tokenizer) if strings else {}
    ids.update(special[string] for string in strings if string in special)
    texts = [string for string in strings if string not in special]
    if mixed := next((string for string in texts if any(token in string for token in special)), None):
        raise ValueError(f"stop_strings holds {short(mixed)}, expected text, or one special token: they do not stand together in a text")
    return ids, texts


def _unshown(tokenizer: Any) -> dict[str, int]:
    """The ids of the special tokens. Other tokens that were added to a vocabulary are text."""
    special = {*tokenizer.all_special_ids, *(token for token, added in tokenizer.added_tokens_decoder.items() if added.special)}
    return {name: token for name, token in tokenizer.get_added_vocab().items() if token in special}


def _file_words(values: Mapping[str, Any], stop_ids: set[int]) -> list[list[int]]:
    """The file's bad words but for the ids that end a text, as transformers leaves these out."""
    return [word for word in values.get("bad_words_ids", ()) if not (len(word) == 1 and word[0] in stop_ids)]


def _split_words(words: Sequence[str | Sequence[int]], tokenizer: Any) -> tuple[list[list[int]], list[str]]:
    """Words to be matched as ids, and as text. One with a special token, which the text does not show, counts as ids."""
    ids, texts = [], []
    special = _unshown(tokenizer) if any(isinstance(word, str) for word in words) else {}
    for word in words:
        if not isinstance(word, str):
            ids.append(list(word))
        elif any(token in word for token in special):
            ids.append(tokenizer.encode(word, add_special_tokens=False))
        else:
            texts.append(word)
    for word in (*ids, *texts):
        if not word:
            raise ValueError(f"bad word {word!r} has no tokens: expected one at least")
    return ids, texts


def _sequences(
    model: Idefics2, batch: Batch, settings: _Settings, seed: int | Sequence[int], stops: Matcher, banned: Matcher
) -> list[_Sequence]:
    count, last = len(batch.documents), model.config.text.max_position_embeddings
    one = _is_whole(seed)
    seeds = [(int(seed) * 0x9E3779B97F4A7C15 + index) % 2**63 for index in range(count)] if one else [int(own) for own in seed]
    if len(seeds) != count:
        raise ValueError(f"seed holds {len(seeds)} numbers, expected one for each of the {count} documents")
    if outside := next((own for own in seeds if not -(2**63) <= own < 2**64), None):
        raise ValueError(f"seed holds {outside}, expected an integer from -2^63 to 2^64 - 1")
    sequences = []
    for prompt, own_seed in zip(batch.token_ids.split(batch.documents.lengths), seeds, strict=True):
        draw, length = torch.Generator().manual_seed(own_seed), prompt.shape[0]
        text = None if batch.tokenizer is None else _Text(batch.tokenizer, stops, banned)
        new = settings.max_new_tokens if settings.max_length is None else settings.max_length - length
        sequences.append(_Sequence(prompt.tolist(), min(new, last - length), draw, text=text))
    return sequences


def _attach_chains(sequences: list[_Sequence], settings: _Settings, stop_ids: set[int], model: Idefics2) -> None:
    """Gives each sequence what generation_config asks for beyond bad words, temperature and top_p."""
    ends = sorted(end for end in stop_ids if 0 <= end < model.config.text.vocab_size)
    for sequence in sequences:
        prompt = torch.tensor([sequence.prompt], device=model.device)
        document = Document(prompt, sequence.limit, torch.tensor(ends, dtype=torch.int64, device=model.device))
        sequence.processors = processors(settings.values, document)
        if settings.temperature > 0:
            sequence.warpers = warpers(settings.values, settings.temperature, settings.top_p)
        if sequence.processors or sequence.warpers:
            room = torch.zeros(1, sequence.limit, dtype=torch.int64, device=model.device)
            sequence.ids = torch.cat((prompt, room), 1)


def _next_tokens(logits: Tensor, sequences: list[_Sequence], bans: _Bans, settings: _Settings) -> Tensor:
    """One token id for each sequence, from its row of logits [d, vocab]."""
    bans.apply(logits, sequences)
    chosen = _choose_as_told(logits, sequences, settings)
    for row, sequence in enumerate(sequences):
        while sequence.text and sequence.text.banned and sequence.text.completes(token := chosen[row].item()):
            logits[row, token] = float("-inf")
            chosen[row] = _choose_as_told(logits[row : row + 1], [sequence], settings)[0]
            if bool(logits[row, chosen[row]].isneginf()):
                raise ValueError("bad_words leave no token to go on with: expected words that some token avoids")
    return chosen


def _choose_as_told(logits: Tensor, sequences: list[_Sequence], settings: _Settings) -> Tensor:
    """`_choose` after what generation_config asks for."""
    draws = [sequence.draw for sequence in sequences]
    if any(sequence.ids is not None for sequence in sequences):
        logits = torch.cat([_processed(row, sequence) for row, sequence in zip(logits.split(1), sequences, strict=True)])
    if any(sequence.warpers for sequence in sequences):  # temperature and top_p are among them
        return _choose(logits, draws, 1.0, 1.0)
    return _choose(logits, draws, settings.temperature, settings.top_p)


def _processed(scores: Tensor, sequence: _Sequence) -> Tensor:
    """Scores [1, vocab] in fp32, as transformers has them, after the sequence's processors and warpers."""
    ids = sequence.ids[:, : len(sequence.prompt) + len(sequence.tokens)]
    scores = scores.float()
    for process in (*sequence.processors, *sequence.warpers):
        scores = process(ids, scores)
    return scores


def _choose(logits: Tensor, draws: list[torch.Generator], temperature: float, top_p: float) -> Tensor:
    """One token id for each row of logits [d, vocab]."""
    if temperature == 0.0:
        return logits.argmax(-1)
    uniform = torch.cat([torch.rand(1, generator=draw, dtype=torch.float64) for draw in draws]).to(logits.device)
    probabilities, order = (logits.double() / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    cumulative = probabilities.cumsum(-1)
    last = torch.searchsorted(cumulative, torch.full_like(uniform, top_p)[:, None]).clamp_(max=cumulative.shape[1] - 1)
    mass = cumulative.gather(1, last)  # of the smallest set that reaches top_p
    picked = torch.searchsorted(cumulative, uniform[:, None] * mass, right=True).clamp_(max=last)
    return order.gather(1, picked)[:, 0]


def _append(index: int, sequence: _Sequence, token: int, stop_ids: set[int], on_token: OnToken | None) -> None:
    if sequence.ids is not None:
        sequence.ids[0, len(sequence.prompt) + len(sequence.tokens)] = token
    sequence.tokens.append(token)
    if token in stop_ids:
        sequence.finish = "stop"
    elif len(sequence.tokens) == sequence.limit:
        sequence.finish = "length"
    added = "" if sequence.text is None else sequence.text.extend(token, last=bool(sequence.finish))
    if sequence.text is not None and sequence.text.stopped:
        sequence.finish = "stop"
    if on_token is not None:
        on_token(index, token, added)


class _Bans:
    """Sets the logits of tokens that would complete a bad word, given as ids, to minus infinity."""

    def __init__(self, words: list[list[int]], vocab_size: int, device: torch.device) -> None:
        outside = next((word for word in words if not all(0 <= token < vocab_size for token in word)), None)
        if outside is not None:
            raise ValueError(f"bad word {outside} holds ids outside the vocabulary of {vocab_size}")
        self.always = torch.tensor([word[0] for word in words if len(word) == 1], dtype=torch.int64, device=device)
        self.after: dict[int, dict[tuple[int, ...], list[int]]] = {}  # by the length of a word's start: its start to last tokens
        for *start, last in (word for word in words if len(word) > 1):
            self.after.setdefault(len(start), {}).setdefault(tuple(start), []).append(last)

    def apply(self, logits: Tensor, sequences: list[_Sequence]) -> None:
        if len(self.always):
            logits.index_fill_(1, self.always, float("-inf"))
        for length, lasts in self.after.items():
            for row, sequence in enumerate(sequences):
                for last in lasts.get(sequence.end(length), ()):
                    logits[row, last] = float("-inf")


class _Text:
    """Text of a growing list of tokens, each character given out once it is certain; time is linear in the tokens."""

    def __init__(self, tokenizer: Any, stops: Matcher | Sequence[str] = (), banned: Matcher | Sequence[str] = ()) -> None:
        self.tokenizer, self.stopped = tokenizer, False
        self.stops = stops if isinstance(stops, Matcher) else Matcher(stops)
        self.banned = banned if isinstance(banned, Matcher) else Matcher(banned)
        self._given: list[str] = []
        self._pending = ""  # what may yet become a stop string
        self._length = 0  # of what is given and what is pending
        self._stop, self._ban = 0, self.banned.step(0, " ")  # the first word loses its space, which a bad word may have
        # The last tokens that the text shows, which tell where a space belongs; `_read` of them stand in the text, `_shown` characters.
        self._window: list[int] = []
        self._read, self._shown = 0, 0

    @property
    def text(self) -> str:
        return "".join((*self._given, self._pending))

    def completes(self, token: int) -> bool:
        """Whether the text would hold a banned word after this token."""
        whole = self._text_of([*self._window, token])
        return self.banned.finds(self._ban, whole[self._shown :])

    def extend(self, token: int, *, last: bool) -> str:
        """Takes one more token; returns the text that it makes certain. Incomplete characters, and what may yet become a stop
        string, wait for later tokens unless this is the `last`."""
        new = self._take(token, last)
        self._ban = self.banned.run(self._ban, new)
        self._pending += new
        cut = self._length + len(new)
        for character in new:
            self._length += 1
            self._stop = self.stops.step(self._stop, character)
            if found := self.stops.found[self._stop]:
                self.stopped, cut = True, min(cut, self._length - found)
        held = self._length - cut if self.stopped else 0 if last else self.stops.depth[self._stop]
        added, rest = self._pending[: len(self._pending) - held], self._pending[len(self._pending) - held :]
        self._given.append(added)
        self._pending = "" if self.stopped else rest
        return added

    def _take(self, token: int, last: bool) -> str:
        """The characters that a token adds for certain."""
        whole, end = self._decode(token, last)
        new = whole[self._shown : end]
        if whole[-1:] != LOST and len(whole) == self._shown:
            return ""  # a special token, which leaves no trace
        self._window.append(token)
        if end > self._shown:
            held = len(whole) - end
            self._window = self._window[self._read :]
            self._read = len(self._window)
            self._shown = len(self._text_of(self._window)) - held
        return new

    def _decode(self, token: int, last: bool) -> tuple[str, int]:
        """The text of the window and a token, and how many of its characters are certain."""
        whole = self._text_of([*self._window, token])
        if last or not whole.endswith(LOST):
            return whole, len(whole)
        waiting = len(self._window) + 1 - self._read
        if waiting < CHARACTER_BYTES:
            return whole, self._shown
        return whole, len(whole) - (waiting < 2 * CHARACTER_BYTES)  # the last may yet become a character, for a while

    def _text_of(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
