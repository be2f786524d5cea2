"""Recipes: functions that return one complete, checked, frozen configuration of a training run.

Every value says where it comes from: "paper" (printed in arXiv 2405.02246 or a model card), "code" (read in the code of the authors or of
Hugging Face), "inferred" (computed, or carried over from the same authors' later models) or "ours".
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

SOURCES = ("paper", "code", "inferred", "ours")

# Where training does not end up: a run may be resumed after a change of these.
PLACES = ("model", "data", "out", "save_every", "keep", "log_to", "workers")


def given(default: Any, source: str, note: str = "") -> Any:
    """A field of a recipe with its default, the default's source, and a remark."""
    assert source in SOURCES
    return field(default=default, metadata={"source": source, "note": note})


@dataclass(frozen=True)
class Recipe:
    """All that decides what a run does. Units: tokens, patches, optimizer steps, pixels.

    Raises:
        ValueError: values that are out of range or that exclude each other, at construction.
    """

    model: str = given("", "ours", "folder or hub name of a checkpoint in Hugging Face's format")
    data: str = given("", "ours", "a .jsonl, .json or .parquet file, or a folder of them")
    out: str = given("", "ours", "folder of the run")
    seed: int = given(0, "ours")
    held_out: int = given(0, "ours", "rows at the end of the data that are not trained on, and answered when the run ends")

    shuffle: bool = given(True, "ours", "another order in each epoch; False keeps the rows' own, for a curriculum")

    join: bool = given(True, "paper", "rows of one question each about the same image files become one dialogue, where it surely fits")

    # what is trained
    adapter: Literal["dora", "lora", "full"] = given("dora", "paper", "section 3.4: DoRA in instruction tuning")
    rank: int = given(64, "inferred", "the authors' pre-training adapters; not printed for instruction tuning")
    alpha: float = given(16.0, "inferred", "as rank")
    dropout: float = given(0.1, "inferred", "as rank")
    targets: tuple[str, ...] = given(("vision", "text"), "code", "parts whose matrices carry adapters")
    trained: tuple[str, ...] = given(("connector", "new_tokens"), "code", "parts that are trained whole beside the adapters")

    # the batch
    steps: int = given(1000, "ours")
    tokens: int = given(2048, "code", "capacity of a packed row in tokens; OBELICS rows in pre-training")
    patches: int = given(9800, "ours", "capacity of a packed row in patches: two images of 980 x 980")
    packs: int = given(8, "ours", "packed rows per optimizer step, over all ranks; each is one pass through the model")
    split_share: float = given(0.5, "paper", "image splitting on half of the samples suffices")
    upscale_share: float = given(0.5, "code", "random up-scaling; unconfirmed for Idefics2 itself")
    upscale_most: float = given(2.0, "code", "as upscale_share: the factor is drawn from Triangular(1.5, M, M)")
    neftune_alpha: float = given(5.0, "inferred", "NEFTune's own value; not printed")
    noise_images: bool = given(False, "ours", "the authors' code noises image rows as well")

    # the optimizer
    learning_rate: float = given(1e-4, "inferred", "proxy; not printed for instruction tuning")
    betas: tuple[float, float] = given((0.9, 0.999), "code")
    weight_decay: float = given(0.1, "code", "none on biases, norms and latents")
    clip: float = given(1.0, "code", "largest norm of the gradient")
    warmup: int = given(50, "inferred")
    schedule: Literal["constant", "linear", "cosine"] = given(
        "linear", "inferred", "warm-up, then constant or slowly decaying: unknown which"
    )
    z_loss: float = given(0.0, "ours")

    # how it runs
    dtype: Literal["bfloat16", "float32"] = given("bfloat16", "code", "of the frozen weights and the arithmetic; trained weights are fp32")
    checkpointing: Literal["none", "selective", "full"] = given("selective", "code", "recompute activations in the backward pass")
    compile: bool = given(False, "ours")
    workers: int = given(2, "ours", "threads that prepare batches")
    save_every: int = given(200, "ours")
    keep: int = given(2, "ours", "checkpoints that are kept")
    log_to: tuple[str, ...] = given((), "ours", "beside JSON lines: tensorboard, trackio, wandb")
    roll_back: bool = given(True, "ours", "go back to the last checkpoint where the loss jumps; not where data gets harder on purpose")
    skip_at_most: int = given(5, "ours", "steps in a row that a loss or gradient may be non-finite")

    def __post_init__(self) -> None:
        _check(self)

    def digest(self) -> str:
        """Hash of all that decides the numbers of a run: a checkpoint belongs to one."""
        return hash_of(asdict(self))


def hash_of(values: Mapping[str, Any]) -> str:
    """The digest of a recipe with these values; those of PLACES do not count."""
    counted = {name: value for name, value in values.items() if name not in PLACES}
    return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()[:16]


def instruct(model: str | Path, data: str | Path, out: str | Path, **changes: Any) -> Recipe:
    """Instruction tuning: DoRA adapters, NEFTune, loss on answers alone (paper, section 3.4).

    Args:
        changes: fields of `Recipe` to set otherwise.

    Raises:
        ValueError: a field that does not exist, a value that cannot be.
    """
    _check_names(changes)
    if changes.get("adapter") == "full":
        changes = {"dropout": 0.0} | changes
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in changes.items()}
    return Recipe(model=str(model), data=str(data), out=str(out), **settings)


RECIPES = {"instruct": instruct}


def table(recipe: Recipe) -> str:
    """One line a value: name, value, source of the default or "set here", remark."""
    lines = []
    for entry in fields(recipe):
        value = getattr(recipe, entry.name)
        source = entry.metadata["source"] if value == entry.default else "set here"
        lines.append(f"{entry.name:<16} {_shown(value):<28} {source:<9} {entry.metadata['note']}".rstrip())
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


PARTS = ("vision", "connector", "text")


def _check_names(names: Iterable[str]) -> None:
    known = {entry.name for entry in fields(Recipe)}
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            raise ValueError(f"a recipe has no field {name!r}{f', did you mean {near[0]!r}?' if near else ''}")


def _check(r: Recipe) -> None:
    """Each rule: does it hold, what is wrong, what was expected."""
    for name, hint in get_type_hints(Recipe).items():
        _expect(_is(getattr(r, name), hint), name, r, _named(hint))
        _expect(hint is not int or abs(getattr(r, name)) < 2**63, name, r, "less than 2**63")
    for name in ("rank", "tokens", "patches", "packs", "steps", "save_every", "keep", "skip_at_most", "workers"):
        _expect(getattr(r, name) >= 1, name, r, "1 or more")
    for name in ("split_share", "upscale_share"):
        _expect(0 <= getattr(r, name) <= 1, name, r, "between 0 and 1")
    _expect(0 <= r.seed < 2**63, "seed", r, "0 or more, below 2**63")
    _expect(0 <= r.dropout < 1, "dropout", r, "at least 0 and below 1")
    _expect(r.upscale_most >= 1.5 or not r.upscale_share, "upscale_most", r, "1.5 or more: the factor is drawn from Triangular(1.5, M, M)")
    for name in ("alpha", "learning_rate", "clip"):
        _expect(getattr(r, name) > 0, name, r, "above 0")
    for name in ("weight_decay", "neftune_alpha", "z_loss", "warmup", "held_out"):
        _expect(getattr(r, name) >= 0, name, r, "0 or more")
    _expect(all(0 <= b < 1 for b in r.betas), "betas", r, "two numbers, each at least 0 and below 1")
    _expect(r.warmup < r.steps or r.schedule == "constant", "warmup", r, f"below steps = {r.steps}: the rate would never reach its peak")
    _expect(set(r.targets) <= set(PARTS), "targets", r, "parts among " + ", ".join(PARTS))
    _expect(set(r.trained) <= {*PARTS, "head", "new_tokens"}, "trained", r, "parts among " + ", ".join((*PARTS, "head", "new_tokens")))
    if r.adapter == "full":
        _expect(not r.dropout, "dropout", r, "0 with adapter='full': dropout stands on the adapters' branch")
    else:
        _check_adapters(r)


def _check_adapters(r: Recipe) -> None:
    both = sorted(set(r.targets) & set(r.trained))
    _expect(not both, "trained", r, f"no part of `targets`: {', '.join(both)} cannot be trained whole and carry adapters")
    _expect(bool(r.targets), "targets", r, f"a part at least with adapter={r.adapter!r}")
    _expect(
        not ({"connector"} & set(r.targets) and r.dropout),
        "dropout",
        r,
        "0 with adapters on the connector: its matrices are used themselves",
    )
    whole = sorted({"head", "text"} & set(r.trained))
    _expect(not (whole and "new_tokens" in r.trained), "trained", r, f"not both new_tokens and {', '.join(whole)}, which hold those rows")


def _is(value: Any, hint: Any) -> bool:
    """Whether a value is of a field's type."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is tuple:
        first, *others = get_args(hint)
        kinds = [first] * len(value) if others == [...] else [first, *others]
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_is, value, kinds))
    if hint is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and abs(value) <= sys.float_info.max
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _named(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(get_args(hint))
    if get_origin(hint) is tuple:
        return f"a tuple of {get_args(hint)[0].__name__}"
    return {int: "a whole number", float: "a finite number", str: "text", bool: "True or False"}[hint]


def _expect(holds: bool, name: str, recipe: Recipe, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {getattr(recipe, name)!r}, expected {expected}")
