"""Generation: one packed prefill, then one token a sequence a step, each sequence with its own length, seed and end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from idefics2_fast.batch import Batch
from idefics2_fast.cache import KVCache
from idefics2_fast.layers import BASE, Norms, Route

if TYPE_CHECKING:
    from idefics2_fast.model import Idefics2

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


@torch.inference_mode()
def generate(
    model: Idefics2,
    batch: Batch,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | Sequence[int] = 0,
    stop_tokens: Sequence[int] | None = None,
    stop_strings: Sequence[str] = (),
    bad_words: Sequence[str | Sequence[int]] = (),
    on_token: OnToken | None = None,
) -> Generation:
    """Continues every document of the batch.

    A document's continuation does not depend on the documents beside it, sampled ones included.

    Args:
        temperature: 0 is greedy; otherwise logits are divided by it and a token is drawn.
        top_p: draw from the smallest set of tokens whose probability reaches this (nucleus sampling, arXiv 1904.09751).
        seed: document d draws from a generator of its own, seeded by (seed, d), or by its entry of a list of D seeds.
        stop_tokens: ids that end a document; None for the checkpoint's own.
        stop_strings: texts that end a document; one that names a special token counts as that token.
        bad_words: words, as text or ids, that are never completed.
        on_token: called with every token as it is made.

    Raises:
        ValueError: settings out of range, an empty batch, a prompt that leaves no position free, strings without a tokenizer.
    """
    _check(model, batch, max_new_tokens, temperature, top_p)
    batch = replace(model.routed(batch), norms=_norms(model))
    if batch.tokenizer is None and (stop_strings or any(isinstance(word, str) for word in bad_words)):
        raise ValueError("stop_strings and bad_words given as text need a tokenizer: make the batch with a Processor, or give ids")
    stop_ids, strings = _stops(model, batch, stop_tokens, stop_strings)
    bans = _Bans([_ids(word, batch.tokenizer) for word in bad_words], model.config.text.vocab_size, model.device)
    sequences = _sequences(model, batch, max_new_tokens, seed, strings)
    cache = KVCache(model.config.text, [len(s.prompt) + s.limit for s in sequences], dtype=model.dtype, device=model.device)
    logits, active = prefill(model, batch, cache), list(range(len(sequences)))
    rows = torch.tensor(active, device=model.device)
    while active:
        bans.apply(logits, [sequences[i] for i in active])
        chosen = _choose(logits, [sequences[i].draw for i in active], temperature, top_p)
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


def _check(model: Idefics2, batch: Batch, max_new_tokens: int, temperature: float, top_p: float) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, expected 1 or more")
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}, expected 0 (greedy) or more")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p is {top_p}, expected more than 0 and at most 1")
    limit = model.config.text.max_position_embeddings
    for index, length in enumerate(batch.documents.lengths):
        if length == 0:
            raise ValueError(f"document {index} is empty: expected one token at least")
        if length >= limit:
            raise ValueError(f"document {index} has {length} tokens: expected fewer than the model's {limit} positions")
    if len(batch.documents) == 0:
        raise ValueError("the batch has no documents: expected one at least")


def _stops(model: Idefics2, batch: Batch, tokens: Sequence[int] | None, strings: Sequence[str]) -> tuple[set[int], list[str]]:
    ids = set(model.config.eos_token_ids if tokens is None else tokens)
    if any(not string for string in strings):
        raise ValueError("stop_strings holds an empty string: expected text")
    special = batch.tokenizer.get_added_vocab() if strings else {}
    ids.update(special[string] for string in strings if string in special)
    return ids, [string for string in strings if string not in special]


def _ids(word: str | Sequence[int], tokenizer: Any) -> list[int]:
    ids = tokenizer.encode(word, add_special_tokens=False) if isinstance(word, str) else list(word)
    if not ids:
        raise ValueError(f"bad word {word!r} has no tokens: expected one at least")
    return ids


def _sequences(model: Idefics2, batch: Batch, max_new_tokens: int, seed: int | Sequence[int], stop_strings: list[str]) -> list[_Sequence]:
    count, last = len(batch.documents), model.config.text.max_position_embeddings
    seeds = [(seed * 0x9E3779B97F4A7C15 + index) % 2**63 for index in range(count)] if isinstance(seed, int) else list(seed)
    if len(seeds) != count:
        raise ValueError(f"seed holds {len(seeds)} numbers, expected one for each of the {count} documents")
    sequences = []
    for prompt, own_seed in zip(batch.token_ids.split(batch.documents.lengths), seeds, strict=True):
        draw = torch.Generator().manual_seed(own_seed)
        text = None if batch.tokenizer is None else _Text(batch.tokenizer, stop_strings)
        sequences.append(_Sequence(prompt.tolist(), min(max_new_tokens, last - prompt.shape[0]), draw, text=text))
    return sequences


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
    """Sets the logits of tokens that would complete a bad word to minus infinity."""

    def __init__(self, words: list[list[int]], vocab_size: int, device: torch.device) -> None:
        outside = next((word for word in words if not all(0 <= token < vocab_size for token in word)), None)
        if outside is not None:
            raise ValueError(f"bad word {outside} holds ids outside the vocabulary of {vocab_size}")
        self.always = torch.tensor([word[0] for word in words if len(word) == 1], dtype=torch.int64, device=device)
        self.longer = [word for word in words if len(word) > 1]

    def apply(self, logits: Tensor, sequences: list[_Sequence]) -> None:
        if len(self.always):
            logits.index_fill_(1, self.always, float("-inf"))
        for row, sequence in enumerate(sequences if self.longer else ()):
            for *start, last in self.longer:
                if (sequence.prompt + sequence.tokens)[-len(start) :] == start:
                    logits[row, last] = float("-inf")


class _Text:
    """Text of a growing list of tokens, each character given out once it is certain."""

    def __init__(self, tokenizer: Any, stop_strings: list[str]) -> None:
        self.tokenizer, self.stop_strings = tokenizer, stop_strings
        self.tokens: list[int] = []
        self.text, self.given, self.stopped = "", 0, False
        self.context, self.read = 0, 0  # tokens[context:read] stand in the text already; they show where a space belongs

    def extend(self, token: int, *, last: bool) -> str:
        """Takes one more token; returns the text that it makes certain. Incomplete characters, and what may yet become a stop
        string, wait for later tokens unless this is the `last`."""
        self.tokens.append(token)
        known, whole = self._decode(self.tokens[self.context : self.read]), self._decode(self.tokens[self.context :])
        if last or not whole.endswith("\ufffd"):
            self.text += whole[len(known) :]
            self.context, self.read = self.read, len(self.tokens)
        ends = [at for string in self.stop_strings if (at := self.text.find(string, max(0, self.given - len(string)))) >= 0]
        if ends:
            self.stopped, self.text = True, self.text[: min(ends)]
        certain = len(self.text) - (0 if last or self.stopped else self._possible_stop())
        added = self.text[self.given : certain]
        self.given = max(self.given, certain)
        return added

    def _possible_stop(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        return max((n for stop in self.stop_strings for n in range(1, len(stop)) if self.text.endswith(stop[:n])), default=0)

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
