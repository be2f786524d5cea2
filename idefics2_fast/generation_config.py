"""generation_config.json: what a checkpoint asks of generation, applied as transformers applies it.

The formulas are transformers' own logits processors (`transformers/generation/logits_process.py`), one chain a document, in the order of
its `_get_logits_processor`. Bad words are `generate`'s, since words of any number cost the same there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from idefics2_fast.config import TOKEN_ID
from idefics2_fast.json_files import (
    BOOL,
    TEXT,
    Field,
    check_fields,
    either,
    listed,
    optional,
    read_object_if_there,
    real,
    short,
    whole,
)

logger = logging.getLogger("idefics2_fast")

FILE = "generation_config.json"

_IDS = listed(TOKEN_ID)
_COUNT = whole(0, 2**31 - 1)
_SHARE = real(0.0, 1.0)
_POSITIVE = real(0.0, above=True)
_PAIR = Field("[token ids, number]", lambda v: _is_pair(v, listed(TOKEN_ID, least=1), real(-1e30)))
_DECAY = Field("[start, factor]", lambda v: _is_pair(v, _COUNT, _POSITIVE))

# Applied, and what each must be.
FIELDS = {
    name: optional(field)
    for name, field in {
        "bos_token_id": TOKEN_ID,
        "pad_token_id": either(TOKEN_ID, whole(-1, -1)),
        "eos_token_id": either(TOKEN_ID, listed(TOKEN_ID, least=1)),
        "max_new_tokens": whole(1, 2**31 - 1),
        "max_length": whole(1, 2**31 - 1),
        "min_length": _COUNT,
        "min_new_tokens": _COUNT,
        "stop_strings": either(TEXT, listed(TEXT)),
        "do_sample": BOOL,
        "temperature": real(0.0),
        "top_k": _COUNT,
        "top_p": _SHARE,
        "min_p": _SHARE,
        "top_h": real(0.0, 1.0, above=True),
        "typical_p": _SHARE,
        "epsilon_cutoff": _SHARE,
        "eta_cutoff": _SHARE,
        "repetition_penalty": _POSITIVE,
        "encoder_repetition_penalty": _POSITIVE,
        "no_repeat_ngram_size": _COUNT,
        "encoder_no_repeat_ngram_size": _COUNT,
        "bad_words_ids": listed(listed(TOKEN_ID, least=1)),
        "sequence_bias": listed(_PAIR),
        "suppress_tokens": _IDS,
        "begin_suppress_tokens": _IDS,
        "forced_bos_token_id": TOKEN_ID,
        "forced_eos_token_id": either(TOKEN_ID, listed(TOKEN_ID, least=1)),
        "remove_invalid_values": BOOL,
        "exponential_decay_length_penalty": _DECAY,
    }.items()
}
# Another algorithm, and other text, unless they have one of these values.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "guidance_scale": (1, 1.0),
    "penalty_alpha": (0, 0.0),
    "diversity_penalty": (0, 0.0),
    "dola_layers": (),
    "constraints": (),
    "force_words_ids": (),
    "token_healing": (False,),
    "watermarking_config": (),
}
# Of no consequence for the text that is made.
_SILENT = (
    "_from_model_config",
    "transformers_version",
    "renormalize_logits",
    "length_penalty",
    "early_stopping",
    "return_dict_in_generate",
    "decoder_start_token_id",
    "compile_config",
    "disable_compile",
    "low_memory",
    "prefill_chunk_size",
    "is_assistant",
    "_commit_hash",
)
_SILENT_KINDS = ("use_", "output_", "cache_", "assistant_", "num_assistant_", "prompt_lookup_")
# Values by which transformers leaves other fields unused.
_DEFAULTS = {"num_return_sequences": 1, "max_time": None}

Chain = Callable[[Tensor, Tensor], Tensor]  # (ids [1, n], scores [1, vocab]) to scores [1, vocab]


Maker = Callable[..., Chain]

PROCESSORS: dict[str, Maker] = {
    "sequence_bias": lambda hf, v, d: hf.SequenceBiasLogitsProcessor([[list(ids), float(bias)] for ids, bias in v]),
    "encoder_repetition_penalty": lambda hf, v, d: hf.EncoderRepetitionPenaltyLogitsProcessor(float(v), d.prompt),
    "repetition_penalty": lambda hf, v, d: hf.RepetitionPenaltyLogitsProcessor(float(v)),
    "no_repeat_ngram_size": lambda hf, v, d: hf.NoRepeatNGramLogitsProcessor(v),
    "encoder_no_repeat_ngram_size": lambda hf, v, d: hf.EncoderNoRepeatNGramLogitsProcessor(v, d.prompt),
    "min_length": lambda hf, v, d: hf.MinLengthLogitsProcessor(v, d.ends),
    "min_new_tokens": lambda hf, v, d: hf.MinNewTokensLengthLogitsProcessor(d.length, v, d.ends),
    "forced_bos_token_id": lambda hf, v, d: hf.ForcedBOSTokenLogitsProcessor(v),
    "forced_eos_token_id": lambda hf, v, d: hf.ForcedEOSTokenLogitsProcessor(d.length + d.limit, v, d.prompt.device),
    "remove_invalid_values": lambda hf, v, d: hf.InfNanRemoveLogitsProcessor(),
    "exponential_decay_length_penalty": lambda hf, v, d: hf.ExponentialDecayLengthPenalty(tuple(v), d.ends, d.length),
    "suppress_tokens": lambda hf, v, d: hf.SuppressTokensLogitsProcessor(v, d.prompt.device),
    "begin_suppress_tokens": lambda hf, v, d: hf.SuppressTokensAtBeginLogitsProcessor(v, d.length, d.prompt.device),
}
WARPERS: dict[str, Maker] = {
    "top_h": lambda hf, v: hf.TopHLogitsWarper(v),
    "top_k": lambda hf, v: hf.TopKLogitsWarper(v),
    "top_p": lambda hf, v: hf.TopPLogitsWarper(v),
    "min_p": lambda hf, v: hf.MinPLogitsWarper(v),
    "typical_p": lambda hf, v: hf.TypicalLogitsWarper(v),
    "epsilon_cutoff": lambda hf, v: hf.EpsilonLogitsWarper(v),
    "eta_cutoff": lambda hf, v: hf.EtaLogitsWarper(v),
}
# Values by which transformers leaves a processor or a warper out.
OFF: dict[str, tuple[Any, ...]] = {
    "sequence_bias": ([],),
    "encoder_repetition_penalty": (1,),
    "repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "remove_invalid_values": (False,),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "top_k": (0,),
    "typical_p": (0, 1),
    "epsilon_cutoff": (0, 1),
    "eta_cutoff": (0, 1),
}


def read_generation_config(folder: Path) -> dict[str, Any]:
    """The whole content of a folder's generation_config.json; empty where there is none.

    Raises:
        ValueError: a damaged file, or a field with a value of another kind.
    """
    path = Path(folder) / FILE
    values = read_object_if_there(path)
    check_generation_config(values, f"{path}: ")
    return values


def log_ignored(values: Mapping[str, Any], folder: Path) -> None:
    """Names in one line the fields of a file that this engine does not apply."""
    if ignored := [name for name, value in values.items() if _is_ignored(name, value)]:
        logger.warning("%s: not applied by this engine: %s", folder / FILE, ", ".join(map(short, ignored)))


def check_generation_config(values: Mapping[str, Any], where: str = "generation_config: ") -> None:
    """Refuses values of another kind.

    Raises:
        ValueError: names the field.
    """
    check_fields(values, FIELDS, where)


def _is_pair(value: Any, first: Field, second: Field) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and first.holds(value[0]) and second.holds(value[1])


def _is_ignored(name: str, value: Any) -> bool:
    if name in FIELDS or name in NEUTRAL or name in _SILENT or name.startswith(_SILENT_KINDS):
        return False
    return value is not None and value != _DEFAULTS.get(name)


def require_computed(values: Mapping[str, Any]) -> None:
    """Refuses values that ask for another algorithm.

    Raises:
        ValueError: names field and value.
    """
    for name, neutral in NEUTRAL.items():
        value = values.get(name)
        if value is not None and value not in neutral:
            found = f"generation_config: {name} is {short(value)}, which this engine does not compute"
            raise ValueError(f"{found}: expected it without, in the file or in generate(generation_config=...)")


def eos_ids(values: Mapping[str, Any], default: tuple[int, ...]) -> tuple[int, ...]:
    """The ids that end a text, as a tuple; `default` where there are none."""
    ids = values.get("eos_token_id")
    if ids is None:
        return default
    return (ids,) if isinstance(ids, int) else tuple(ids)


def check_ids(values: Mapping[str, Any], vocab_size: int) -> None:
    """Refuses ids that the vocabulary does not hold, of fields that set logits.

    Raises:
        ValueError: names the field and the id.
    """
    found = {name: values.get(name) or [] for name in ("suppress_tokens", "begin_suppress_tokens")}
    found["sequence_bias"] = [token for ids, _ in values.get("sequence_bias") or [] for token in ids]
    found["forced_eos_token_id"] = list(eos_ids({"eos_token_id": values.get("forced_eos_token_id")}, ()))
    found["forced_bos_token_id"] = list(eos_ids({"eos_token_id": values.get("forced_bos_token_id")}, ()))
    for name, ids in found.items():
        if outside := [token for token in ids if token >= vocab_size]:
            raise ValueError(f"generation_config: {name} holds {outside[0]}, expected ids of the vocabulary of {vocab_size}")


@dataclass(frozen=True)
class Document:
    """What processors know of a document: its prompt [1, n], the new tokens at most, the ids that end it."""

    prompt: Tensor
    limit: int
    ends: Tensor

    @property
    def length(self) -> int:
        return self.prompt.shape[1]


def processors(values: Mapping[str, Any], document: Document) -> list[Chain]:
    """transformers' processors for one document, in its order; none where the values ask for nothing."""
    import transformers.generation.logits_process as hf

    return [make(hf, values[name], document) for name, make in PROCESSORS.items() if _is_on(name, values)]


def warpers(values: Mapping[str, Any], temperature: float, top_p: float) -> list[Chain]:
    """transformers' warpers for sampling, in its order; none where temperature and top_p are all that there is."""
    import transformers.generation.logits_process as hf

    given = {**values, "top_p": None if top_p == 1.0 else top_p}
    chosen = [name for name in WARPERS if _is_on(name, given)]
    if set(chosen) <= {"top_p"}:
        return []
    return [hf.TemperatureLogitsWarper(float(temperature)), *(WARPERS[name](hf, given[name]) for name in chosen)]


def _is_on(name: str, values: Mapping[str, Any]) -> bool:
    value = values.get(name)
    return value is not None and value not in OFF.get(name, ())
