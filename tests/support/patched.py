"""A Hugging Face Idefics2 before and after `patch`, on the same inputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from support.hf import sample, to_hf
from torch import Tensor, nn

from idefics2_fast import Idefics2Config
from idefics2_fast.benchmarks.local_checkpoint import random_model

LATENTS = 8  # of an image, where the released model has 64: fewer rows of logits
TINY = Idefics2Config.named("tiny")
TINY = replace(TINY, perceiver=replace(TINY.perceiver, n_latents=LATENTS))
TOLERANCE = 2e-5  # of the largest value of a tensor, fp32

# Images far smaller than Idefics2's own: the model takes any. Sizes that are no multiple of a patch are cut.
CASES = {
    "text": [[]],
    "one image": [[(56, 84)]],
    "several images": [[(42, 98), (75, 57), (90, 70)]],
    "split": [[(42, 42), (42, 43), (43, 42), (43, 43), (85, 85)]],
    "a batch of all": [[(56, 84)], [], [(98, 42), (56, 56), (60, 61)]],
}
TEXT = r".*text_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)$"
EVERYWHERE = r".*(text_model|vision_model|connector).*\.(q_proj|k_proj|v_proj|o_proj|out_proj|fc1|fc2|gate_proj|up_proj|down_proj)$"


def fresh(**settings: Any) -> nn.Module:
    return random_model(TINY, **settings)


def with_adapter(model: nn.Module, *, targets: str = EVERYWHERE, seed: int = 0, **settings: Any) -> nn.Module:
    """PEFT's wrapper of the model, its adapters away from their start, where half of all gradients are zero."""
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(**{"r": 8, "lora_alpha": 12, "target_modules": targets} | settings))
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * 0.05)
        elif "magnitude" in name:
            parameter.data.mul_(1 + 0.1 * torch.rand(parameter.shape, generator=draw))
    return wrapped.eval()


def inputs_of(case: str = "a batch of all", side: str = "left", dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A padded batch, with labels on half of its text."""
    samples = [sample(sizes, TINY, text=5 + 4 * index, seed=index) for index, sizes in enumerate(CASES[case])]
    inputs = to_hf(samples, dtype)
    if side == "right":
        for name in ("input_ids", "attention_mask"):
            lengths = inputs["attention_mask"].sum(1).tolist()
            inputs[name] = torch.stack([row.roll(n) for row, n in zip(inputs[name], lengths, strict=True)])
    ids, place = inputs["input_ids"], torch.arange(inputs["input_ids"].shape[1])
    trained = inputs["attention_mask"].bool() & (ids != TINY.image_token_id) & (place % 2 == 1)
    return inputs | {"labels": ids.masked_fill(~trained, -100)}


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30)).item()


def evaluated(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Logits [T, V] of the real tokens."""
    with torch.no_grad():
        return model.eval()(**inputs).logits[inputs["attention_mask"].bool()]


def trained(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The loss and every gradient of a training step, under their names."""
    model.train().zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.eval().zero_grad()
    return {"loss": loss.detach()} | grads


def worst(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative error, and where it is.

    A key's bias moves all scores of a query alike: its gradient is zero but for rounding, and measured by the query bias's.
    """
    assert actual.keys() == expected.keys()
    error = lambda name: (actual[name].double() - expected[name].double()).abs().max().item()  # noqa: E731
    measure = lambda name: name.replace("k_proj", "q_proj") if name.endswith("bias") else name  # noqa: E731
    scale = lambda name: expected[measure(name)].double().abs().max().item() or 1e-30  # noqa: E731
    return max((error(name) / scale(name), name) for name in expected)


def kept(model: nn.Module) -> dict[str, dict[str, Any]]:
    """All that hangs on each submodule: attributes, and the entries of those that are dictionaries (hooks, parameters, adapters)."""
    snapshot = {}
    for name, module in model.named_modules():
        attributes = vars(module)
        entries = {f"{key}[{k!r}]": v for key, value in attributes.items() if isinstance(value, dict) for k, v in value.items()}
        config = getattr(module, "config", None)
        settings = {"config": repr(vars(config))} if hasattr(config, "to_dict") else {}
        snapshot[name] = {**attributes, **entries, **settings, "type": type(module)}
    return snapshot


def differences(before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]) -> list[str]:
    """Where two snapshots of a model are not the same objects. `training` may differ."""
    found = [f"module {name}" for name in before.keys() ^ after.keys()]
    for name in before.keys() & after.keys():
        one, other = before[name], after[name]
        found += [f"{name}.{key}" for key in one.keys() ^ other.keys()]
        same = lambda a, b: a is b or (isinstance(a, str | bool | int | float) and a == b)  # noqa: E731
        found += [f"{name}.{key}" for key in one.keys() & other.keys() if key != "training" and not same(one[key], other[key])]
    return found
