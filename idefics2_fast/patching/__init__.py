"""One reversible line that makes a Hugging Face Idefics2 right, unpadded and lean.

    handle = idefics2_fast.patch(model, processor)
    print(handle.report())
    ...
    handle.undo()

Instances are patched: an attribute of a module, or an entry of a dictionary, stands before what the class has. Classes, parameter names,
state dicts, hooks and signatures stay as they were.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import nn

from idefics2_fast.patching.attention import register_attention
from idefics2_fast.patching.dora import Unsupported, dora_variant
from idefics2_fast.patching.ledger import Ledger, by_name, fall_back, patched_names
from idefics2_fast.patching.neftune import Neftune
from idefics2_fast.patching.places import Place, places
from idefics2_fast.patching.vision import Settings
from idefics2_fast.row_norm import OptimizerSteps

__all__ = ["Handle", "Report", "Unsupported", "patch", "patch_classes", "register_attention"]

OLDEST = (5, 20)  # of transformers: its modules as this package knows them
_classes: Handle | None = None


class Report(Mapping[str, str]):
    """What runs now: the names of modules, and for each what runs there or why not. Printed, layers that are alike share a line."""

    def __init__(self, lines: dict[str, str]) -> None:
        self._lines = lines

    def __getitem__(self, module: str) -> str:
        return self._lines[module]

    def __iter__(self) -> Iterator[str]:
        return iter(self._lines)

    def __len__(self) -> int:
        return len(self._lines)

    def __str__(self) -> str:
        alike = Counter((re.sub(r"\b\d+\b", "*", module), what) for module, what in self._lines.items())
        width = max((len(module) for module, _ in alike), default=0)
        return "\n".join(f"{module:<{width}}  {count:>4} x  {what}" for (module, what), count in alike.items())

    __repr__ = __str__


class Handle:
    """What `patch` did. As a context manager it undoes itself at the end of a `with` block."""

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.lines: list[tuple[str, Callable[[], str]]] = []

    def report(self) -> Report:
        return Report({name: what() for name, what in self.lines})

    def undo(self) -> None:
        """Everything as it was: no attribute is left. A second call does nothing."""
        self.ledger.undo()
        self.lines = [(name, lambda: "Hugging Face's: the patch is undone") for name, _ in self.lines]

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def patch(
    model: nn.Module,
    processor: Any = None,
    *,
    attention: bool = True,
    perceiver: bool = True,
    fused_linear_cross_entropy: bool = True,
    dora: bool = True,
    neftune: bool = True,
    image_processor: bool = True,
    rms_norm: bool = True,
    swiglu: bool = True,
    rope: bool = True,
    strict: bool = False,
    neftune_length: str = "document",
) -> Handle:
    """Patches the Idefics2 models within `model`, which may be wrapped (PEFT, torch.compile, parallel wrappers). Adapters come first: those
    added later are left to PEFT.

    Args:
        processor: an Idefics2Processor, for `image_processor`.
        attention: images go through the vision tower unpadded, and their features into the embeddings by one copy.
        perceiver: images are pooled unpadded.
        fused_linear_cross_entropy: the loss of answer rows alone. In training no logits are made unless `skip_logits=False` is passed.
        dora: PEFT's DoRA layers without a matrix beside the weight.
        neftune: noise by each document's own length, none on padding, once transformers' hook is registered.
        image_processor: the processor's images are prepared in C++.
        rms_norm, swiglu, rope: by `liger_kernel`, where it is installed and the model on a GPU.
        strict: raise where Hugging Face's own path would run in place of what is asked for; otherwise a line is logged.
        neftune_length: "document", or "padded" for the row's length with its padding, as Hugging Face has it.

    Raises:
        ValueError: there is no Idefics2 in `model`, or it is patched already; under `strict`, what cannot be patched.
    """
    from transformers.models.idefics2.modeling_idefics2 import Idefics2Model

    models = {name: module for name, module in model.named_modules() if isinstance(module, Idefics2Model)}
    if not models:
        raise ValueError(f"there is no Idefics2 in {type(model).__name__}, expected one of transformers' Idefics2 models or a wrapper")
    if _classes is not None or any(True for module in model.modules() for _ in patched_names(module)):
        raise ValueError(f"{type(model).__name__} is patched already: undo that first")
    handle = Handle()
    if reason := _obstacle():
        return _left(handle, type(model).__name__, reason, strict)
    try:
        register_attention()
        for place in places(Settings(attention, perceiver, strict), fused_linear_cross_entropy, rms_norm, swiglu, rope):
            _patch_instances(handle, model, place, strict)
        if dora:
            _patch_dora(handle, model, strict)
        if neftune:
            for name, module in models.items():
                _patch_neftune(handle, name, module, Neftune(length=neftune_length))
        if image_processor and processor is not None:
            _patch_processor(handle, processor, strict)
        for name, module in model.named_modules():
            if type(module).__module__.startswith("bitsandbytes"):
                handle.lines.append((name, partial(str, f"bitsandbytes's {type(module).__name__}, as it came")))
    except BaseException:
        handle.undo()
        raise
    return handle


def patch_classes(
    *,
    attention: bool = True,
    perceiver: bool = True,
    fused_linear_cross_entropy: bool = True,
    rms_norm: bool = True,
    swiglu: bool = True,
    rope: bool = True,
    strict: bool = False,
) -> Handle:
    """Patches transformers' classes, for models not yet built. What belongs to an instance (adapters, hooks, processors) is `patch`'s.

    Raises:
        ValueError: they are patched already.
    """
    global _classes
    if _classes is not None:
        raise ValueError("transformers' classes are patched already: undo that first")
    handle = Handle()
    if reason := _obstacle():
        return _left(handle, "transformers", reason, strict)
    register_attention()
    for place in places(Settings(attention, perceiver, strict), fused_linear_cross_entropy, rms_norm, swiglu, rope):
        if not place.obstacle:
            handle.ledger.replace_in_class(place.cls, place.method, place.function)
        handle.lines.append((f"{place.cls.__name__}.{place.method}", place.describe))
    _classes = handle
    handle.ledger.later(_forget_classes)
    return handle


def _forget_classes() -> None:
    global _classes
    _classes = None


def _left(handle: Handle, name: str, reason: str, strict: bool) -> Handle:
    fall_back(reason, strict=strict)
    handle.lines.append((name, partial(str, f"Hugging Face's: {reason}")))
    return handle


def _obstacle() -> str:
    import transformers

    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    return "" if version >= OLDEST else f"transformers is {transformers.__version__}, expected {'.'.join(map(str, OLDEST))} or later"


def _patch_instances(handle: Handle, model: nn.Module, place: Place, strict: bool) -> None:
    for name, module in model.named_modules():
        if not isinstance(module, place.cls):
            continue
        what = partial(place.describe, module)
        own = place.method in vars(module) and "_old_forward" not in vars(module)
        if own or getattr(type(module), place.method) is not getattr(place.cls, place.method):
            reason = f"{place.method} of {type(module).__name__} is not transformers' own"
            fall_back(reason, strict=strict)
            what = partial("as it came: {}".format, reason)
        elif not place.obstacle:
            handle.ledger.replace(module, place.method, place.function)
        handle.lines.append((f"{name}.{place.method}".removesuffix(".forward").lstrip(".") or type(module).__name__, what))


def _patch_dora(handle: Handle, model: nn.Module, strict: bool) -> None:
    for name, layer in model.named_modules():
        for adapter, theirs in list(getattr(layer, "lora_variant", {}).items()):
            if "Dora" not in type(theirs).__name__:
                continue
            try:
                handle.ledger.put(layer.lora_variant, adapter, dora_variant(layer, adapter))
                what = "DoRA without the product of its matrices"
            except Unsupported as error:
                fall_back(str(error), strict=strict)
                what = f"PEFT's: {error}"
            handle.lines.append((f"{name}.lora_variant[{adapter}]", partial(str, what)))
    if any(".lora_variant[" in name for name, _ in handle.lines):
        handle.ledger.later(OptimizerSteps().remove)


def _patch_neftune(handle: Handle, name: str, model: nn.Module, neftune: Neftune) -> None:
    handle.ledger.replace(model, "forward", partial(neftune_forward, neftune))
    handle.ledger.later(lambda: neftune.undo(model.get_input_embeddings()))
    handle.lines.append((f"{name}.neftune", partial(str, f"length: {neftune.length}, where transformers' hook is registered")))


def neftune_forward(neftune: Neftune, self: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Idefics2Model.forward, its embeddings with noise where transformers' hook asks for it."""
    kwargs = by_name(original, args, kwargs)
    given = (kwargs.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
    with neftune.forward(self.get_input_embeddings(), *given):
        return original(**kwargs)


def _patch_processor(handle: Handle, processor: Any, strict: bool) -> None:
    from idefics2_fast.image_processor import Idefics2ImageProcessor

    theirs = processor.image_processor
    match = {"Idefics2ImageProcessorPil": "pil", "Idefics2ImageProcessor": "torchvision"}.get(type(theirs).__name__)
    if match is None or isinstance(theirs, Idefics2ImageProcessor):
        what = f"{type(theirs).__name__}, as it came"
        if match is None:
            fall_back(f"the image processor is a {type(theirs).__name__}, expected one of Idefics2", strict=strict)
    else:
        settings = {name: value for name, value in theirs.to_dict().items() if name != "image_processor_type"}
        handle.ledger.put(vars(processor), "image_processor", Idefics2ImageProcessor(**settings, match=match))
        what = f"C++, as {type(theirs).__name__} prepares images"
    handle.lines.append(("processor.image_processor", partial(str, what)))
