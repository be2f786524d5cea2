"""One linear layer under DoRA, forward and backward: what it costs beyond the frozen layer, here and by PEFT.

`python -m idefics2_fast.benchmarks.dora_linear` prints each case and then what must hold. Every call of this engine computes the norms
anew, as the first pass after an optimizer step does. A provider whose output or gradients are not PEFT's gets no time.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from idefics2_fast.benchmarks.model import Case, Row
from idefics2_fast.benchmarks.record import Record, commit, default_path, device_name, versions, write_records
from idefics2_fast.benchmarks.report import ENGINE, records, seconds, size, table
from idefics2_fast.benchmarks.timing import Call, Measurement, Watch, measure, quantiles
from idefics2_fast.patching.dora import dora_variant
from idefics2_fast.row_norm import OptimizerSteps, expire

# (out, in) of Mistral's attention and MLP projections.
SHAPES = ((4096, 4096), (14336, 4096))
TOKENS, RANK, ALPHA = 1024, 64, 16
FROZEN, PEFT, KEPT = "frozen", "peft", f"{ENGINE}, norms kept"
PHASES = ("forward", "backward")
REQUIRED, AIM, MEMORY = 0.35, 0.25, 0.25


def layer_case(shape: tuple[int, int], dropout: float, device: torch.device) -> Case:
    """PEFT's layer, a twin that shares its parameters but computes by this engine, and the frozen layer beneath both."""
    out, width = shape
    theirs = _peft_layer(nn.Linear(width, out, bias=False, device=device), dropout)
    ours = copy.copy(theirs)
    ours.lora_variant = {"default": dora_variant(theirs, "default")}
    x = torch.randn(TOKENS, width, device=device, requires_grad=True)
    grad = torch.randn(TOKENS, out, device=device)
    leaves = [x, *(parameter for parameter in theirs.parameters() if parameter.requires_grad)]

    def call(layer: nn.Module, leaves: Sequence[Tensor], fresh: bool = False) -> Call:
        def run(watch: Watch) -> list[Tensor]:
            torch.manual_seed(0)  # of dropout
            if fresh:
                expire()
            with torch.inference_mode(False), torch.enable_grad():
                watch.start("forward")
                y = layer(x)
                watch.start("backward")
                return [y.detach(), *torch.autograd.grad(y, leaves, grad)]

        return run

    calls = {FROZEN: call(theirs.base_layer, [x]), PEFT: call(theirs, leaves), ENGINE: call(ours, leaves, True), KEPT: call(ours, leaves)}
    row = Row(f"{out}x{width}, {TOKENS} tokens, rank {RANK}" + (f", dropout {dropout}" if dropout else ""), PHASES)
    return Case("dora_linear", calls, _same_as(calls[PEFT](Watch(device))), (row,))


def _peft_layer(base: nn.Linear, dropout: float) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, use_dora=True, target_modules=["0"], init_lora_weights=False)
    return get_peft_model(nn.Sequential(base), config).base_model.model[0]


def _same_as(expected: Sequence[Tensor]) -> object:
    def check(name: str, actual: Sequence[Tensor]) -> str:
        if name == FROZEN:
            return ""
        errors = [((left - right).norm() / right.norm()).item() for left, right in zip(actual, expected, strict=True)]
        return "" if max(errors) <= 1e-5 else f"off by {max(errors):.1e}, 1e-5 is allowed"

    return check


def time_overhead(results: Mapping[str, Measurement], name: str) -> list[float]:
    """Time beyond the frozen layer as a part of PEFT's, round by round."""
    rounds = zip(*(results[provider].seconds(PHASES) for provider in (FROZEN, PEFT, name)), strict=True)
    return [(own - frozen) / (peft - frozen) for frozen, peft, own in rounds]


def memory_overhead(results: Mapping[str, Measurement], name: str) -> float | None:
    """Peak memory beyond the frozen layer's as a part of PEFT's."""
    frozen, peft, own = (results[provider].peak(PHASES) for provider in (FROZEN, PEFT, name))
    return None if own is None else (own - frozen) / (peft - frozen)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0; 1 where a provider was wrong or a requirement does not hold."""
    options = _parser().parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{device_name(device)}; {versions()}")
    summary = [["overhead, part of PEFT's", "required", "aim", "measured", ""]]
    steps = OptimizerSteps()
    for shape, dropout in [(shape, 0.0) for shape in options.shape or SHAPES] + [(shape, 0.1) for shape in (options.shape or SHAPES)[:1]]:
        case = layer_case(shape, dropout, device)
        row = case.rows[0]
        results = measure(case.calls, case.check, device=device, seconds=options.seconds, rounds=(5, 25), title=row.name)
        if any(result.wrong for result in results.values()):
            summary.append([row.name, "-", "-", "; ".join(result.wrong for result in results.values()), "FAIL"])
            continue
        print(f"\n{_table(row, results)}", flush=True)
        summary += _lines(row, results, judged=not dropout)
        write_records(options.out or default_path(device), [*records(case, results, device), *_overheads(case, results, device)])
    steps.remove()
    print(f"\n{table(summary)}")
    return int(any(line[-1] == "FAIL" for line in summary))


def _table(row: Row, results: Mapping[str, Measurement]) -> str:
    lines = [["provider", "forward", "backward", "both", "memory"]]
    for name, result in results.items():
        times = [seconds(quantiles(result.seconds(phases)).median) for phases in (PHASES[:1], PHASES[1:], PHASES)]
        lines.append([name, *times, size(result.peak(PHASES))])
    return f"dora_linear: {row.name}\n{table(lines)}"


def _lines(row: Row, results: Mapping[str, Measurement], judged: bool) -> list[list[str]]:
    lines = []
    for what, value, most, aim in (
        ("time", quantiles(time_overhead(results, ENGINE)).median, REQUIRED, f"{AIM:.0%}"),
        ("memory", memory_overhead(results, ENGINE), MEMORY, "-"),
    ):
        if value is not None:
            verdict = ("pass" if value <= most else "FAIL") if judged else ""
            lines.append([f"{row.name}, {what}", f"<= {most:.0%}" if judged else "-", aim if judged else "-", f"{value:.1%}", verdict])
    return lines


def _overheads(case: Case, results: Mapping[str, Measurement], device: torch.device) -> list[Record]:
    common = {"suite": case.suite, "case": case.rows[0].name, "pass_": "both", "device": device_name(device)}
    common |= {"versions": versions(), "commit": commit(), "unit": "x"}
    made = []
    for name in (ENGINE, KEPT):
        low, median, high = quantiles(time_overhead(results, name))
        made.append(Record(provider=name, metric="time overhead against peft", value=median, low=low, high=high, **common))
        if (memory := memory_overhead(results, name)) is not None:
            made.append(Record(provider=name, metric="memory overhead against peft", value=memory, **common))
    return made


def _shape(text: str) -> tuple[int, int]:
    out, width = text.split("x")
    return int(out), int(width)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m idefics2_fast.benchmarks.dora_linear", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=_shape, action="append", metavar="OUTxIN", help=f"instead of {SHAPES}; may be given again")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long each case may take")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON lines to add to, by default results/<device>.jsonl in this package")
    return parser


if __name__ == "__main__":
    sys.exit(main())
