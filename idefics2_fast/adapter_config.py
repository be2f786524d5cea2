"""PEFT's `adapter_config.json`: which fields are read, which change nothing here, and which are refused.

The file comes from strangers: every field is checked for its type and range, and patterns for the time that they can take. A field is
read (`READ`), changes no logits whatever it says (`HARMLESS`, with the reason), or stands for another formula and is refused unless it is
off (`REFUSED`). A field that is in none of these is refused unless it is empty. The fields are those of PEFT 0.21's LoraConfig.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from idefics2_fast.json_files import distinct

# Fields that change no logits, and why.
HARMLESS = {
    "task_type": "chooses PEFT's wrapper of the model",
    "auto_mapping": "finds the base model's class",
    "peft_version": "says which PEFT wrote the file",
    "base_model_name_or_path": "names the base, which is given",
    "revision": "of the base, which is given",
    "inference_mode": "says what is trained next",
    "lora_dropout": "acts in training alone",
    "fan_in_fan_out": "PEFT sets it to false on linear layers, embeddings do not read it",
    "loftq_config": "read by one initialisation alone, see init_lora_weights",
    "eva_config": "read by one initialisation alone, see init_lora_weights",
    "corda_config": "read by one initialisation alone, see init_lora_weights",
    "lora_ga_config": "read by one initialisation alone, see init_lora_weights",
    "megatron_core": "names a package for Megatron's layers",
    "qalora_group_size": "read with use_qalora alone",
    "ensure_weight_tying": "acts where head and embedding are tied, which this model's are not",
    "runtime_config": "PEFT does not read it from a file",
}

# Fields that stand for another formula, with the value that is off.
REFUSED = {
    "megatron_config": None,
    "velora_config": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "monteclora_config": None,
    "layer_replication": None,
    "target_parameters": None,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
}

# Initialisations that leave the base as it is. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) take something out of it.
INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal", "mica")

FILE_BYTES = 16 * 2**20
# What keeps a pattern's matching short: characters, repetitions one after another, and no repetition of a group.
PATTERN_LENGTH, REPETITIONS = 2**16, 6


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30 and math.isfinite(value)


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value < 2**31


def _is_index(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool)


def _map_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def _list_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _either(*checks: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: any(check(value) for check in checks)


# The fields that are read: their default, what they may be, and that in words.
READ: dict[str, tuple[Any, Callable[[Any], bool], str]] = {
    "peft_type": (None, lambda value: value == "LORA", "'LORA'"),
    "r": (8, _is_rank, "1 or more"),
    "lora_alpha": (8, _is_number, "a finite number"),
    "use_rslora": (False, _is_switch, "true or false"),
    "use_dora": (False, _is_switch, "true or false"),
    "lora_bias": (False, _is_switch, "true or false"),
    "bias": ("none", lambda value: value in ("none", "all", "lora_only"), "'none', 'all' or 'lora_only'"),
    "init_lora_weights": (
        True,
        lambda value: isinstance(value, bool | str) and value in INITIALISATIONS,
        f"one of {', '.join(map(str, INITIALISATIONS))}: others change the base; PEFT's save_pretrained converts such adapters "
        "with path_initial_model_for_weight_conversion",
    ),
    "rank_pattern": ({}, _map_of(_is_rank), "ranks by names of modules"),
    "alpha_pattern": ({}, _map_of(_is_number), "numbers by names of modules"),
    "target_modules": (None, _either(_is_text, _are_names), "names of modules, or a pattern"),
    "exclude_modules": (None, _either(_is_text, _are_names), "names of modules, or a pattern"),
    "layers_to_transform": (None, _either(_is_index, _list_of(_is_index)), "numbers of layers"),
    "layers_pattern": (None, _either(_is_text, _are_names), "names of lists of layers"),
    "modules_to_save": (None, _are_names, "names of modules"),
    "trainable_token_indices": (
        None,
        _either(_list_of(_is_index), _map_of(_list_of(_is_index))),
        "ids of tokens, or those by names of modules",
    ),
}


@dataclass(frozen=True)
class AdapterConfig:
    """What is read of an `adapter_config.json`, checked; names of modules are Hugging Face's.

    Attributes:
        path: of the file, for messages.
        fields: those of `READ`, with defaults where the file has none.
    """

    path: Path
    fields: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> AdapterConfig:
        """Reads and checks a file.

        Raises:
            ValueError: damaged JSON; a field of another type or range, or one that stands for a formula that is not here.
        """
        raw = _parse(path)
        if (kind := raw.get("peft_type")) != "LORA":  # first: the fields of other kinds of adapters have other names
            found = "no peft_type" if kind is None else f"peft_type = {kind!r:.200}"
            raise ValueError(f"{path} has {found}, expected 'LORA': this engine computes no other kind of adapter")
        for name, value in raw.items():
            if name in READ or name in HARMLESS:
                continue
            off = REFUSED.get(name)
            if value is not None and value != off and value not in ([], {}, "", False):
                raise ValueError(f"{path} has {name} = {value!r:.200}, expected {off!r}: this engine does not compute it")
        fields = {}
        for name, (default, check, expected) in READ.items():
            value = raw.get(name)
            no_number = value is None and name in raw and type(default) is int  # PEFT's default is that of a field that is left out
            if no_number or (value is not None and not check(value)):
                raise ValueError(f"{path} has {name} = {value!r:.200}, expected {expected}")
            fields[name] = default if value is None else value
        if fields["lora_bias"] and fields["use_dora"]:
            raise ValueError(f"{path} has lora_bias and use_dora, expected one of them, as PEFT does")
        config = cls(path, fields)
        config._check_patterns()
        return config

    @property
    def dora(self) -> bool:
        return self.fields["use_dora"]

    @property
    def shifts(self) -> bool:
        """Whether B has a bias of its own."""
        return self.fields["lora_bias"]

    @property
    def bias(self) -> str:
        """Which biases are trained: "none", "all", or "lora_only", those of the modules with adapters."""
        return self.fields["bias"]

    @property
    def modules_to_save(self) -> list[str]:
        return self.fields["modules_to_save"] or []

    @property
    def token_indices(self) -> dict[str, list[int]]:
        """Ids of tokens whose rows are trained, by the ends of tables' names."""
        given = self.fields["trainable_token_indices"] or {}
        return given if isinstance(given, dict) else {"embed_tokens": given}

    def rank(self, module: str) -> int:
        return self._patterned("rank_pattern", module, self.fields["r"])

    def scaling(self, module: str) -> float:
        """s of a module: alpha / r, or alpha / sqrt(r)."""
        rank, alpha = self.rank(module), self._patterned("alpha_pattern", module, self.fields["lora_alpha"])
        return alpha / math.sqrt(rank) if self.fields["use_rslora"] else alpha / rank

    def targets(self, module: str) -> bool:
        """Whether PEFT would put an adapter on this module. Source: PEFT 0.21, `check_target_module_exists`."""
        wanted, excluded = self.fields["target_modules"], self.fields["exclude_modules"]
        if excluded and (re.fullmatch(excluded, module) if isinstance(excluded, str) else _ends_with(module, excluded)):
            return False
        if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.modules_to_save):
            return False
        if wanted is None:
            return True
        if isinstance(wanted, str):
            every = wanted.lower() == "all-linear"
            return module != "lm_head" if every else re.fullmatch(wanted, module) is not None
        return module in wanted or (_ends_with(module, wanted) and self._has_layer(module))

    def _has_layer(self, module: str) -> bool:
        wanted, patterns = self.fields["layers_to_transform"], self.fields["layers_pattern"]
        if wanted is None or wanted == []:
            return True
        patterns = [patterns] if isinstance(patterns, str) else patterns
        tried = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns or []] or [r".*?\.[^.]*\.(\d+)\."]
        found = next((match for pattern in tried if (match := re.match(pattern, module))), None)
        return found is not None and int(found[1]) in ([wanted] if isinstance(wanted, int) else wanted)

    def _patterned(self, field: str, module: str, default: Any) -> Any:
        patterns = self._compiled[field]
        return next((value for pattern, value in patterns if pattern.match(module)), default)

    @cached_property
    def _compiled(self) -> dict[str, list[tuple[re.Pattern[str], Any]]]:
        """The keys as PEFT matches them. Source: PEFT 0.21, `get_pattern_key`."""
        return {
            field: [(re.compile(rf"(.*\.)?({key})$"), value) for key, value in self.fields[field].items()]
            for field in ("rank_pattern", "alpha_pattern")
        }

    def _check_patterns(self) -> None:
        fields, layers = self.fields, self.fields["layers_pattern"]
        patterns = {name: [*fields[name]] for name in ("rank_pattern", "alpha_pattern")}
        patterns |= {name: [fields[name]] for name in ("target_modules", "exclude_modules") if isinstance(fields[name], str)}
        patterns |= {"modules_to_save": self.modules_to_save, "layers_pattern": [layers] if isinstance(layers, str) else layers or []}
        for name, pattern in ((name, pattern) for name, given in patterns.items() for pattern in given):
            if reason := _too_much(pattern):
                raise ValueError(f"{self.path} has {pattern!r:.200} in {name}, {reason}")


def _too_much(pattern: str) -> str | None:
    """Why a pattern is refused: it cannot be compiled, or could take too long."""
    if len(pattern) > PATTERN_LENGTH:
        return f"expected {PATTERN_LENGTH} characters at most"
    bare = re.sub(r"\\.|\[[^\]]*\]", "x", pattern)
    if re.search(r"\)[*+{]", bare) or _repetitions(bare) > REPETITIONS:
        return f"expected {REPETITIONS} repetitions one after another at most, and none of a group"
    try:
        re.compile(f"({pattern})")
    except (re.error, RecursionError, OverflowError) as error:
        return f"which is no pattern: {error}"
    return None


def _repetitions(bare: str) -> int:
    """The most repetitions on one way through a pattern without escapes and sets."""
    ways = [[0]]
    for character in bare:
        if character == "(":
            ways.append([0])
        elif character == "|":
            ways[-1].append(0)
        elif character == ")" and len(ways) > 1:
            inner = max(ways.pop())
            ways[-1][-1] += inner
        elif character in "*+{":
            ways[-1][-1] += 1
    return sum(map(max, ways))


def _ends_with(module: str, names: Iterable[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def _parse(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > FILE_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes, expected {FILE_BYTES} at most")
        parsed = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=distinct)
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path}: damaged JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"{path}: damaged JSON: expected an object, found {type(parsed).__name__}")
    return parsed
