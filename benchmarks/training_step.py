"""A DoRA training step of a Hugging Face model, forward, backward and optimizer: as transformers and PEFT come, tuned, and patched.

Run as a module, it takes one step as they come and writes down what that took: a process of its own for what needs a minute and 10 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import idefics2_fast
from idefics2_fast.benchmarks.model import PROMPT, mixed_images
from idefics2_fast.benchmarks.providers import Chat, HuggingFace, HuggingFaceTuned, checkpoint, question
from idefics2_fast.benchmarks.timing import Call, PeakMemory, Watch

# Every linear layer that a fine-tune of Idefics2 adapts: the vision tower, the connector and the language model, without the head.
TARGETS = (
    r".*(vision_model|modality_projection|perceiver_resampler|text_model).*"
    r"\.(q_proj|k_proj|v_proj|o_proj|out_proj|fc1|fc2|gate_proj|up_proj|down_proj)"
)
UNCACHED = f"{HuggingFaceTuned.name}, uncached"
ANSWER_TOKENS = 24  # a tenth

Gradients = dict[str, Tensor]
Adapt = Callable[[nn.Module], nn.Module]


class Step:
    """transformers and PEFT as they come: one padded, masked batch.

    Args:
        adapt: gives the model its adapters, by default `with_adapters`.
    """

    name = "hf"

    def __init__(self, plain: HuggingFace, adapt: Adapt | None = None) -> None:
        self.plain, self.model = plain, (adapt or with_adapters)(plain.model)
        self.trained = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        self.start = {name: parameter.detach().clone() for name, parameter in self.trained.items()}
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=1e-4)
        for parameter in self.trained.values():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()  # its state is there before anything is measured, as in every step but a run's first

    def process(self, chats: Sequence[Chat]) -> Mapping[str, Any]:
        return with_labels(self.plain.process(chats))

    def loss(self, inputs: Mapping[str, Any]) -> Tensor:
        return self.model.train()(**inputs).loss

    def call(self, inputs: Mapping[str, Any]) -> Call:
        """A step from the same parameters each time. Returns their gradients."""

        def run(watch: Watch) -> Gradients:
            with torch.inference_mode(False), torch.enable_grad():
                self.start_anew()
                watch.start("step")
                self.loss(inputs).backward()
                self.optimizer.step()
                watch.stop()
            return {name: parameter.grad for name, parameter in self.trained.items()}

        return run

    @torch.no_grad()
    def start_anew(self) -> None:
        """No gradients, and the parameters as they were."""
        self.optimizer.zero_grad()
        for name, parameter in self.trained.items():
            parameter.copy_(self.start[name])


class TunedStep(Step):
    """Both at their best here: images one by one, unpadded, no masks for them, PEFT's cache of DoRA's norms over the step.

    The cache works in evaluation mode alone, which computes the same: nothing here drops out. It holds a matrix beside every weight, and
    a step without it is leaner.
    """

    def __init__(self, plain: HuggingFace, cached: bool = True, adapt: Adapt | None = None) -> None:
        super().__init__(plain, adapt)
        self.tuned, self.cached = HuggingFaceTuned(plain), cached
        self.name = HuggingFaceTuned.name if cached else UNCACHED

    def process(self, chats: Sequence[Chat]) -> Mapping[str, Any]:
        return with_labels(self.tuned.process(chats))

    def loss(self, inputs: Mapping[str, Any]) -> Tensor:
        from peft.helpers import DoraCaching

        self.model.train()  # drops what is cached, the norms of the last step's weights
        self.model.train(not self.cached)
        with DoraCaching(self.cached):
            images = self.tuned.encode_images(inputs["images"])
            texts = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}
            return self.model(**texts, mm_encoder_outputs={"image": images}, use_cache=False).loss


class PatchedStep(Step):
    """transformers' model with PEFT's adapters under `idefics2_fast.patch`, called as `Step` calls its own."""

    def __init__(self, plain: HuggingFace, name: str = "idefics2_fast", **switches: bool) -> None:
        super().__init__(plain)
        self.name = name
        idefics2_fast.patch(self.model, plain.processor, **switches)


def with_adapters(model: nn.Module) -> nn.Module:
    """DoRA of rank 64 by PEFT, adapters and magnitudes away from where they start, so that every gradient and every norm counts."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(use_dora=True, r=64, lora_alpha=16, lora_dropout=0.0, target_modules=TARGETS))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=draw).to(parameter.device)
                parameter.copy_(parameter * (1 + 0.05 * noise) if "magnitude" in name else noise * (0.02 if "lora_B" in name else 0.05))
    return adapted


def with_labels(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Each document's last tokens are the answer, and trained."""
    labels = inputs["input_ids"].clone()
    labels[:, :-ANSWER_TOKENS] = -100
    return {**inputs, "labels": labels}


def documents(count: int) -> list[Chat]:
    """Documents of some 240 tokens, of different lengths, with one of the committed mixed images each."""
    return [question((PROMPT * 3)[: 600 + 20 * n], [image]) for n, image in enumerate(mixed_images(0.40)[:count])]


def halved(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Every second row and column of the images and their masks."""
    return {**inputs, **{name: inputs[name][..., ::2, ::2].contiguous() for name in ("pixel_values", "pixel_attention_mask")}}


def one_step_alone(size: str, count: int) -> Call:
    """A step of `Step` in a process of its own, on `documents(count)`. It is taken once: other rounds count its time again.

    The call returns the gradients; what the process said last, where it failed.
    """

    @cache
    def taken() -> tuple[dict[str, float], Gradients] | str:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "gradients.safetensors"
            command = [sys.executable, "-m", "idefics2_fast.benchmarks.training_step", size, str(count), str(out)]
            environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONSAFEPATH": "1"}
            child = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
            if child.returncode:
                return f"its process ended with {child.returncode}: {child.stderr.strip().splitlines()[-1:]}"
            return json.loads(child.stdout.splitlines()[-1]), load_file(out)

    def run(watch: Watch) -> Gradients | str:
        result = taken()
        if isinstance(result, str):
            return result
        figures, gradients = result
        watch.seconds["step"] += figures["seconds"]
        if "peak" in figures:
            watch.peaks["step"] = figures["peak"]
        return gradients

    return run


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the gradients to a file, and prints seconds and bytes as a line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m idefics2_fast.benchmarks.training_step", description=__doc__.splitlines()[0])
    parser.add_argument("size")
    parser.add_argument("count", type=int)
    parser.add_argument("out", type=Path)
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with checkpoint(options.size, torch.float32) as folder:
        step = Step(HuggingFace(folder, torch.float32, device))
    call = step.call(step.process(documents(options.count)))
    step.call(halved(step.process(documents(1))))(Watch(device))  # a step that is small, so that the one measured is not the first
    watch = Watch(device, PeakMemory(device) if PeakMemory.available(device) else None)
    save_file({name: gradient.contiguous() for name, gradient in call(watch).items()}, options.out)
    print(json.dumps({"seconds": watch.seconds["step"]} | ({"peak": watch.peaks["step"]} if watch.peaks else {})))


if __name__ == "__main__":
    main()
