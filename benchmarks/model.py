"""The model's suites: image encoding, time to the first token, decoding. transformers and this engine side by side, on the same weights.

A provider's output must come as near to the reference as numbers of its type allow: in fp32 within 2e-5 of the largest value, in half
precision within 1.5 times transformers' own error. The reference is transformers in fp32, every image by itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from idefics2_fast import Idefics2
from idefics2_fast.benchmarks.case import Case, LeftOut, Row, Scope
from idefics2_fast.benchmarks.providers import (
    Chat,
    Engine,
    HuggingFace,
    HuggingFaceCompiled,
    HuggingFaceTuned,
    Provider,
    answer,
    load_providers,
    question,
)
from idefics2_fast.benchmarks.timing import Call, Watch
from idefics2_fast.kernels.linear import needs_upcast
from idefics2_fast.layers import Linear

# (height, width) of mixed images after resizing, by the share of a padded batch that is image: at 0.40 phone screens, video frames and
# thumbnails, upright and lying (the first four alone have that share too); at 0.75 large photographs and pages.
MIXED_SIZES = {
    0.40: ((980, 452), (551, 980), (480, 640), (378, 672), (452, 980), (980, 551), (640, 480), (504, 504)),
    0.75: ((980, 980), (980, 735), (735, 980), (980, 653), (653, 980), (980, 784), (784, 980), (551, 980)),
}
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
DTYPES = {"tiny": (torch.float32,), "small": (torch.float32, torch.bfloat16)}
SHARES = {"tiny": tuple(MIXED_SIZES), "small": (0.40,)}  # `small` at 0.75 takes minutes
NEW_TOKENS = 65  # the first comes with the prefill
LINEAR_LAYERS = "linear layers alone"
PROMPT = (
    "Two travellers met on a mountain road. One carried a lamp, the other a map, and neither would say where the road began. "
    "They walked together until the evening. What did they find, and why did they turn back?"
)


def fill(sizes: Sequence[tuple[int, int]]) -> float:
    """Real pixels of images over those of the batch that pads them to the greatest height and width."""
    heights, widths = zip(*sizes, strict=True)
    return sum(height * width for height, width in sizes) / (len(sizes) * max(heights) * max(widths))


@dataclass(frozen=True)
class Setting:
    """A model in some precision, held by every provider, and the reference for their outputs."""

    name: str
    hf: HuggingFace
    tuned: HuggingFaceTuned
    engine: Engine | HuggingFace
    reference: HuggingFaceTuned
    compiled: HuggingFaceCompiled | None = None

    @property
    def size(self) -> str:
        return self.name.split()[0]

    @property
    def providers(self) -> tuple[Provider, ...]:
        return self.hf, self.tuned, self.engine


def load_setting(size: str, dtype: torch.dtype, device: torch.device, compiled: bool = False) -> Setting:
    name = f"{size} {DTYPE_NAMES[dtype]}"
    hf, tuned, engine = load_providers(size, dtype, device)
    by_compiler = HuggingFaceCompiled(hf) if compiled else None
    if dtype == torch.float32:
        return Setting(name, hf, tuned, engine, tuned, by_compiler)
    exact = copy.deepcopy(hf)
    exact.model.float()
    return Setting(name, hf, tuned, engine, HuggingFaceTuned(exact), by_compiler)


def calls_of(setting: Setting, call: Callable[[Provider], Call]) -> tuple[dict[str, Call], dict[str, str]]:
    """Every provider's call, and who is absent. What torch.compile makes is made by now: the first call takes a minute."""
    calls = {provider.name: call(provider) for provider in setting.providers}
    if setting.compiled is None:
        return calls, {HuggingFaceCompiled.name: "compiling takes minutes, and is done for `tiny` alone, in runs that are not quick"}
    made = call(setting.compiled)
    try:
        with torch.inference_mode():
            made(Watch(setting.compiled.device))
    except RuntimeError as error:
        return calls, {HuggingFaceCompiled.name: f"torch.compile says: {str(error).splitlines()[0]}"}
    return calls | {HuggingFaceCompiled.name: made}, {}


def left_out(suite: str, setting: Setting, asked: bool) -> str:
    """Why a suite is not run for a model here; "" where it is. `asked`: for this size alone."""
    model = setting.engine.model
    if suite != "decode" and setting.size == "small" and not asked:
        return "it takes minutes: --model small"
    if suite != "decode" and needs_upcast(model.device.type, model.dtype):
        return "this processor multiplies half precision number by number, and transformers takes minutes for each call"
    return ""


def cases(scope: Scope) -> Iterator[Case | LeftOut]:
    """The cases of the wanted suites, model by model."""
    for size in scope.sizes:
        for dtype in DTYPES[size]:
            setting = load_setting(size, dtype, scope.device, compiled=not scope.quick and size == "tiny")
            for suite in scope.parts:
                if reason := left_out(suite, setting, asked=scope.model is not None):
                    yield LeftOut(suite, setting.name, reason)
                else:
                    yield from scope.first(cases_of(suite, setting, scope.quick))


def cases_of(suite: str, setting: Setting, quick: bool = False) -> Iterator[Case]:
    """The cases of one suite for one model."""
    if suite == "encode":
        yield from (encode_case(setting, share, 2 if quick else 8) for share in SHARES[setting.size])
    elif suite == "first_token":
        yield first_token_case(setting, 2 if quick else 4)
    elif suite == "decode":
        yield decode_case(setting)


def mixed_images(share: float) -> list[Image.Image]:
    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in MIXED_SIZES[share]]


def encode_case(setting: Setting, share: float, images: int = 8) -> Case:
    """Vision tower and connector, from so many preprocessed images of mixed sizes."""
    needs = {"hf": 8.0, "hf-tuned": 1.0} if share == 0.40 else {"hf-tuned": 1.0}
    return encoding(setting, mixed_images(share)[:images], f"{images} images, fill {share:.2f}", needs)


def encoding(setting: Setting, images: Sequence[Image.Image], name: str, needs: Mapping[str, float]) -> Case:
    """Vision tower and connector, from images that are preprocessed."""
    chats = [question("What is this?", [image]) for image in images]

    def call(provider: Provider) -> Call:
        inputs = provider.process(chats)

        def run(watch: Watch) -> Tensor:
            watch.start("image encoding")
            return provider.encode(inputs)

        return run

    row = Row(f"{setting.name}, {name}", ("image encoding",), needs=needs)
    check = _near(setting, lambda provider: provider.encode(provider.process(chats)))
    calls, absent = calls_of(setting, call)
    return Case("encode", calls, check, (row,), absent)


def first_token_case(setting: Setting, prompts: int = 4) -> Case:
    """Prompts with one image each, to the logits of their first new tokens."""
    chats = [question(PROMPT[: 60 + 20 * n], [image]) for n, image in enumerate(mixed_images(0.40)[:prompts])]
    return answering_first(setting, chats, f"{prompts} prompts", {"hf": 5.0})


def answering_first(setting: Setting, chats: Sequence[Chat], name: str, needs: Mapping[str, float]) -> Case:
    """From chats to the logits of their first new tokens, with the processing of images and without."""

    def call(provider: Provider) -> Call:
        def run(watch: Watch) -> Tensor:
            watch.start("image processing")
            inputs = provider.process(chats)
            watch.start("first token")
            return provider.first_logits(inputs)

        return run

    name = f"{setting.name}, {name}"
    rows = (
        Row(f"{name}, preprocessed images", ("first token",), needs=needs),
        Row(f"{name}, image processing included", ("image processing", "first token"), needs=needs),
    )
    check = _near(setting, lambda provider: provider.first_logits(provider.process(chats)))
    calls, absent = calls_of(setting, call)
    return Case("first_token", calls, check, rows, absent)


def decode_case(setting: Setting) -> Case:
    """One sequence, token by token, after its prefill."""
    chats = [question(PROMPT)]

    def call(provider: Provider) -> Call:
        inputs = provider.process(chats)
        return lambda watch: answer(provider, inputs, NEW_TOKENS, watch)[0]

    calls, absent = calls_of(setting, call)
    calls[LINEAR_LAYERS] = linear_layers(setting.engine.model, NEW_TOKENS - 1)
    needs = {LINEAR_LAYERS: 0.85} if setting.name == "small fp32" else {"hf": 1.2}
    row = Row(f"{setting.name}, 1 sequence, a token", ("decode",), steps=NEW_TOKENS - 1, needs=needs)
    return Case("decode", calls, _likeliest(setting, chats), (row,), absent)


def linear_layers(model: Idefics2, tokens: int) -> Call:
    """The products of the language model and its head on one token at a time, and nothing between them: a bound for decoding."""
    layers = [layer for layer in (*model.text_model.modules(), model.lm_head) if isinstance(layer, Linear)]
    inputs = {width: torch.randn(1, width, dtype=model.dtype, device=model.device) for width in {layer.in_features for layer in layers}}

    def run(watch: Watch) -> None:
        watch.start("decode")
        for _ in range(tokens):
            for layer in layers:
                F.linear(inputs[layer.in_features], layer.weight, layer.bias)

    return run


def _near(setting: Setting, output: Callable[[Provider], Tensor]) -> Callable[[str, Tensor], str]:
    """A check of tensors against the reference's."""

    @cache
    def expected() -> tuple[Tensor, float]:
        values = output(setting.reference)
        return values, _allowed(setting, values, lambda: output(setting.tuned))

    @torch.inference_mode()
    def check(name: str, actual: Tensor) -> str:
        values, allowed = expected()
        if actual.shape != values.shape:
            return f"shape {list(actual.shape)}, expected {list(values.shape)}"
        error = _error(actual, values)
        return "" if error <= allowed else f"off by {error:.1e}, {allowed:.1e} is allowed"

    return check


def _likeliest(setting: Setting, chats: Sequence[Chat]) -> Callable[[str, list[int]], str]:
    """A check of greedy tokens: none may be less likely, by the reference, than the likeliest by more than the errors of two logits."""
    prompt = setting.tuned.process(chats)["input_ids"]

    def logits(provider: HuggingFaceTuned, tokens: list[int]) -> Tensor:
        ids = torch.cat([prompt, torch.tensor([tokens[:-1]], device=provider.device)], 1)
        return provider.model(input_ids=ids).logits[0, -len(tokens) :]

    @torch.inference_mode()
    def check(name: str, tokens: list[int] | None) -> str:
        if name == LINEAR_LAYERS:  # a bound, not an answer
            return ""
        if len(tokens) != NEW_TOKENS:
            return f"{len(tokens)} tokens, expected {NEW_TOKENS}"
        values = logits(setting.reference, tokens)
        allowed = 2 * _allowed(setting, values, lambda: logits(setting.tuned, tokens))
        chosen = values.gather(1, torch.tensor(tokens, device=values.device)[:, None])[:, 0]
        gap = (values.amax(1) - chosen).max().item()
        return "" if gap <= allowed else f"a token's logit is {gap:.1e} below the greatest, {allowed:.1e} is allowed"

    return check


def _allowed(setting: Setting, expected: Tensor, theirs: Callable[[], Tensor]) -> float:
    """The greatest error that an output may have; `theirs` is transformers' in the setting's precision."""
    if setting.reference is setting.tuned:
        return 2e-5 * expected.abs().max().item()
    return 1.5 * _error(theirs(), expected)


def _error(actual: Tensor, expected: Tensor) -> float:
    return (actual.float() - expected).abs().max().item()
