"""The scaling suite: how cost grows with the size of images, their number, tokens, adapters, answers and ranks, and how it should.

An exponent is the slope of log time over log size, fitted by least squares, round by round; the expected one is that of the FLOPs that the
work takes by formula. Time that does not grow, such as what a call costs in any case, makes the fitted one smaller, never greater.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

from idefics2_fast import Idefics2Config
from idefics2_fast.benchmarks.case import CPU, ENGINE, Case, Figure, Figures, LeftOut, Row, Scope
from idefics2_fast.benchmarks.dora_linear import TOKENS, layer_case
from idefics2_fast.benchmarks.instruct import SIZES, documents, stored
from idefics2_fast.benchmarks.linear_cross_entropy import loss_case
from idefics2_fast.benchmarks.model import PROMPT, Setting, answering_first, encoding, load_setting
from idefics2_fast.benchmarks.providers import checkpoint, question
from idefics2_fast.benchmarks.record import device_name
from idefics2_fast.benchmarks.timing import Call, Measurement, Watch, quantiles
from idefics2_fast.counters import forward_flops

SUITE = "scaling"
SIZE = "tiny"
FITTED, EXPECTED = "exponent", "expected exponent"
MARGIN = 0.25  # an exponent may be so much greater than the expected one, which knows nothing of caches
EDGES, IMAGES, LENGTHS, RANKS, SHARES = (378, 546, 756, 980), (1, 2, 4, 8), (256, 512, 1024, 2048), (8, 32, 128, 512), (0.05, 0.1, 0.2, 0.4)
PATCH, LAYER, STEPS, WARM = 14, 1024, 8, 3
WORLDS = (1, 2, 4, 8)


def cases(scope: Scope) -> Iterator[Case | Figures | LeftOut]:
    yield from scope.first(_cases(scope.device, IMAGES[:3] if scope.quick else IMAGES))
    if not scope.quick:
        yield from worlds()


def _cases(device: torch.device, images: Sequence[int]) -> Iterator[Case]:
    setting = load_setting(SIZE, torch.float32, device)
    config = Idefics2Config.named(SIZE)
    tuned = (ENGINE, "hf-tuned")
    made = {count: encoding(setting, [picture(EDGES[0])] * count, "", {}) for count in images}
    yield joined("images of a batch", made, tuned, float)
    made = {(edge // PATCH) ** 2: encoding(setting, [picture(edge)], "", {}) for edge in EDGES}
    yield joined("patches of an image", made, tuned, lambda patches: forward_flops(config, [], [int(patches)]).total)
    made = {length: prompt_case(setting, length) for length in LENGTHS}
    yield joined("tokens of a prompt", made, tuned, lambda tokens: forward_flops(config, [int(tokens)], head_rows=1).total)
    del setting
    made = {rank: layer_case((LAYER, LAYER), 0.0, device, rank) for rank in RANKS}
    yield joined("rank of a DoRA layer", made, (ENGINE, "peft"), layer_flops)
    made = {100 * share: loss_case("frozen", device, share) for share in SHARES}
    yield joined("percent of tokens that are answers", made, (ENGINE,), float)


def picture(edge: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (edge, edge, 3), dtype=np.uint8))


def prompt_case(setting: Setting, tokens: int) -> Case:
    """The first token after a text of about so many."""
    words = (PROMPT + " ") * (1 + tokens // 40)
    ids = setting.hf.processor.tokenizer(words)["input_ids"][: tokens - 8]  # the chat's own are eight
    return answering_first(setting, [question(setting.hf.processor.tokenizer.decode(ids, skip_special_tokens=True))], "", {})


def layer_flops(rank: float) -> float:
    """A frozen layer forward and back to its input; A and B forward, and back to input and weights; the norms' product of weight and A."""
    return 4 * TOKENS * LAYER**2 + 6 * TOKENS * rank * 2 * LAYER + 2 * rank * LAYER**2


def joined(axis: str, sizes: Mapping[float, Case], providers: Sequence[str], flops: Callable[[float], float]) -> Case:
    """One case of the cases at several sizes: each provider takes them all in turn, every size a phase."""

    def call(provider: str) -> Call:
        def run(watch: Watch) -> list[object]:
            outputs = []
            for size, case in sizes.items():
                own = Watch(watch.device, watch.memory)
                outputs.append(case.calls[provider](own))
                own.stop()
                watch.seconds[f"{size:g}"] += sum(own.seconds.values())
                if own.peaks:
                    watch.peaks[f"{size:g}"] = max(own.peaks.values())
            return outputs

        return run

    def check(provider: str, outputs: Sequence[object]) -> str:
        wrong = (case.check(provider, output) for case, output in zip(sizes.values(), outputs, strict=True))
        return next(filter(None, wrong), "")

    phases = [f"{size:g}" for size in sizes]
    expected = exponent(list(sizes), [flops(size) for size in sizes])

    def derived(results: Mapping[str, Measurement]) -> Figures:
        made = [Figure(EXPECTED, expected, "")]
        for provider, result in results.items():
            low, middle, high = quantiles([exponent(list(sizes), [times[phase] for phase in phases]) for times in result.rounds])
            limit = expected + MARGIN if provider == ENGINE else None
            made.append(Figure(FITTED, middle, "", limit, False, low, high, provider))
        return Figures(SUITE, axis, made)

    rows = tuple(Row(f"{axis}: {phase}", (phase,), pass_="both") for phase in phases)
    return Case(SUITE, {provider: call(provider) for provider in providers}, check, rows, derived=derived)


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The slope of log cost over log size."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


# --- ranks ---


def worlds() -> Iterator[Figures | LeftOut]:
    """A step's time over gloo with as many packs as ranks, a core each: it should not grow."""
    cores = len(os.sched_getaffinity(0))
    times = {}
    for ranks in WORLDS:
        if ranks > cores:
            yield LeftOut(SUITE, f"ranks: {ranks}", f"there are {cores} cores, and ranks that share one say nothing")
        else:
            times[ranks] = step_seconds(ranks)
            yield Figures(SUITE, f"ranks: {ranks}", [Figure("time", times[ranks], "s")], device=device_name(CPU))
    if len(times) > 1:
        fitted = Figure(FITTED, exponent(list(times), list(times.values())), "", MARGIN, at_least=False)
        yield Figures(SUITE, "ranks", [Figure(EXPECTED, 0.0, ""), fitted], device=device_name(CPU))


def step_seconds(ranks: int, steps: int = STEPS) -> float:
    """The median of a run's steps; the first are left out."""
    with checkpoint(SIZE, torch.float32) as folder:
        data, out = folder / "rows.jsonl", folder / "run"
        data.write_text("".join(f"{json.dumps(row)}\n" for row in stored(documents(SIZES[SIZE]) * 8, folder)))
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
            "-m",
            "idefics2_fast.training",
        ]
        command += ["instruct", "--model", str(folder), "--data", str(data), "--out", str(out), "--steps", str(steps), "--warmup", "0"]
        command += ["--packs", str(ranks), "--tokens", "512", "--patches", "4900", "--dtype", "float32", "--held-out", "0"]
        command += ["--split-share", "0", "--upscale-share", "0"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
        child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if child.returncode:
            raise RuntimeError(f"{ranks} ranks ended with {child.returncode}: {child.stderr[-500:]}")
        return median(json.loads(line)["seconds"] for line in _lines(out)[WARM:])


def _lines(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text().splitlines()
