"""`make demo`: photographs and questions, answered by transformers and by this engine from one checkpoint, side by side; then a small model
learns to read (`learn.py`)."""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from idefics2_fast.benchmarks import learn
from idefics2_fast.benchmarks.case import Row
from idefics2_fast.benchmarks.photographs import PLACES, photograph
from idefics2_fast.benchmarks.providers import HuggingFace, Provider, answer, load_providers, question
from idefics2_fast.benchmarks.record import device_name, versions
from idefics2_fast.benchmarks.report import BASELINES, ENGINE, seconds, size, speed_up, table
from idefics2_fast.benchmarks.timing import Call, Measurement, Watch, measure, quantiles

MODEL = "small"
NEW_TOKENS = 32
PHASES = ("image processing", "image encoding", "prefill", "decode")


@dataclass(frozen=True)
class Prompt:
    text: str
    photographs: tuple[str, ...]


# Prompts answered in one batch, by whether their images are split.
BATCHES = {
    False: (
        Prompt("What is in this photograph?", ("china.jpg",)),
        Prompt("Who is this, and what is she wearing?", ("grace_hopper.jpg",)),
        Prompt("What do these three have in common?", ("flower.jpg", "coffee.png", "astronaut.png")),
    ),
    True: (Prompt("Describe every corner of this photograph.", ("chelsea.png",)),),
}


def main() -> int:
    """Returns 0; 1 where either part went wrong."""
    begin = time.perf_counter()
    code = compare() or learn.main()
    print(f"\nThis took {time.perf_counter() - begin:.0f} s. Where to go next: README.md; `make bench` measures more.")
    return code


def compare() -> int:
    """Returns 0; 1 where a provider gave other token ids than transformers."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in PLACES:
        photograph(name)
    providers = load_providers(MODEL, torch.float32, device)
    print(_header(providers, device), flush=True)
    tokens: dict[str, list[list[int]]] = {}

    def check(name: str, given: list[list[int]]) -> str:
        tokens[name] = given
        return "" if given == tokens[HuggingFace.name] else "other token ids than transformers"

    calls = {provider.name: _answers(provider) for provider in providers}
    results = measure(calls, check, device=device, seconds=40, rounds=(1, 5), title="answering, in turns")
    print(_transcript(tokens, providers[0]))
    print(_table(results))
    wrong = [name for name, result in results.items() if result.wrong]
    verdict = f"{' and '.join(wrong)} gave other token ids than transformers" if wrong else "All token ids are identical"
    print(f"\n{verdict}.")
    return 1 if wrong else 0


def _answers(provider: Provider) -> Call:
    """All prompts, from the files to the token ids."""

    def call(watch: Watch) -> list[list[int]]:
        tokens = []
        for split, prompts in BATCHES.items():
            watch.start("image processing")
            inputs = provider.process(
                [question(prompt.text, [str(photograph(name)) for name in prompt.photographs]) for prompt in prompts], split=split
            )
            tokens += answer(provider, inputs, NEW_TOKENS, watch)
        return tokens

    return call


def _header(providers: Sequence[Provider], device: torch.device) -> str:
    parameters = sum(parameter.numel() for parameter in providers[-1].model.parameters())
    installed = ", ".join(f"{name} {version}" for name, version in versions().items())
    return (
        f"{device_name(device)}\n{installed}\n\n"
        f"One Hugging Face checkpoint, written by transformers: the size `{MODEL}`, {parameters / 1e6:.0f} million parameters, fp32.\n"
        "The weights are random, so the answers mean nothing: what counts is that transformers and idefics2_fast give the same.\n"
    )


def _size_of(name: str) -> str:
    """Width and height of a photograph."""
    with Image.open(photograph(name)) as image:
        return f"{image.width}x{image.height}"


def _transcript(tokens: dict[str, list[list[int]]], hf: HuggingFace) -> str:
    """Every prompt with its photographs, whether the providers' token ids are identical, and the text."""
    lines = []
    prompts = [(prompt, split) for split, batch in BATCHES.items() for prompt in batch]
    for index, (prompt, split) in enumerate(prompts):
        pictures = ", ".join(f"{name} {_size_of(name)}" for name in prompt.photographs)
        given = {name: answers[index] for name, answers in tokens.items()}
        same = all(ids == given[HuggingFace.name] for ids in given.values())
        text = _printable(hf.processor.decode(given[ENGINE], skip_special_tokens=True))
        lines += [f"{index + 1}. {prompt.text}", f"   {pictures}{', split' if split else ''}"]
        lines += [
            f"   {len(given[ENGINE])} token ids, {'identical' if same else 'DIFFERENT'}: {textwrap.shorten(text, 80, placeholder=' ...')}",
            "",
        ]
    return "\n".join(lines)


def _printable(text: str) -> str:
    return "".join(c if c.isascii() and c.isprintable() else "." for c in text)


def _table(results: dict[str, Measurement]) -> str:
    """Time and peak memory of each phase, over all prompts."""
    header = [f"{NEW_TOKENS} tokens a prompt"]
    for name in results:
        header += [name, "memory"]
    lines = [[*header, *(f"vs {name}" for name in BASELINES)]]
    rows = [*(Row(phase, (phase,)) for phase in PHASES), Row("end to end", PHASES)]
    for row in rows:
        cells = [row.name]
        for result in results.values():
            cells += (
                ["wrong", "-"] if result.wrong else [seconds(quantiles(result.seconds(row.phases)).median), size(result.peak(row.phases))]
            )
        ratios = (speed_up(row, results, ENGINE, baseline) for baseline in BASELINES)
        lines.append(cells + [f"{quantiles(ratio).median:.2f}x" if ratio else "-" for ratio in ratios])
    rounds = max(len(result.rounds) for result in results.values())
    rounds = "one round" if rounds == 1 else f"{rounds} rounds"
    note = "hf: transformers as it comes, one padded batch. hf-tuned: images one by one, no padding, no masks.\n"
    note += f"Medians of {rounds} in turns; memory beyond the models at its peak; vs: how many times as fast idefics2_fast is."
    return f"{table(lines)}\n\n{textwrap.indent(note, '  ')}"


if __name__ == "__main__":
    sys.exit(main())
