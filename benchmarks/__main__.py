"""`python -m idefics2_fast.benchmarks`: runs suites, prints a table, keeps the results."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch

from idefics2_fast.benchmarks import images, model, patch
from idefics2_fast.benchmarks.model import Case, cases, left_out, load_setting
from idefics2_fast.benchmarks.record import default_path, device_name, versions, write_records
from idefics2_fast.benchmarks.report import case_table, records, verdicts
from idefics2_fast.benchmarks.timing import Measurement, measure

INSTRUCT = "instruct"  # needs the extra `train`
SUITES = (*model.SUITES, patch.SUITE, images.SUITE, INSTRUCT)
COMMANDS = ("dora_linear", "embedding", "linear_cross_entropy", "perceiver")  # suites with options and a table of their own
SETTINGS = {"tiny": (torch.float32,), "small": (torch.float32, torch.bfloat16)}

EXAMPLES = """
hf        transformers as it comes: one padded batch
hf-tuned  transformers at its best: images one by one, no padding, no masks

examples:
  python -m idefics2_fast.benchmarks --quick
  python -m idefics2_fast.benchmarks decode --model small
  python -m idefics2_fast.benchmarks encode first_token --out results.jsonl
  python -m idefics2_fast.benchmarks images
  python -m idefics2_fast.benchmarks patch --model small
  python -m idefics2_fast.benchmarks instruct --model tiny

with options of their own, --help shows them:
  python -m idefics2_fast.benchmarks dora_linear
  python -m idefics2_fast.benchmarks embedding
  python -m idefics2_fast.benchmarks linear_cross_entropy
  python -m idefics2_fast.benchmarks perceiver
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0; 1 where a provider's output was wrong; 130 after Ctrl-C, which keeps what was measured."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in COMMANDS:
        return importlib.import_module(f"idefics2_fast.benchmarks.{arguments[0]}").main(arguments[1:])
    options = _parser().parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = options.out or (None if options.quick else default_path(device))
    print(f"{device_name(device)}; " + ", ".join(f"{name} {version}" for name, version in versions().items()))
    held: list[bool] = []
    status = 0
    try:
        for case, results, measured_on in _measured(options, device):
            print(f"\n{case_table(case, results)}", flush=True)
            held += [holds for row in case.rows for holds in verdicts(row, results).values()]
            if any(result.wrong for result in results.values()):
                status = 1
            if path is not None:
                write_records(path, records(case, results, measured_on))
        if INSTRUCT in (options.suites or SUITES) and options.model in (None, "tiny") and not options.quick:
            held += _loader_figures(path)
    except KeyboardInterrupt:
        print("\nInterrupted. What stands above was measured.")
        status = 130
    print(f"\n{sum(held)} of {len(held)} required speeds hold." + (f" Results: {path}" if path else " Not kept: --out FILE keeps them."))
    return status


def _measured(options: argparse.Namespace, device: torch.device) -> Iterator[tuple[Case, dict[str, Measurement], torch.device]]:
    """Each case, its results, and where they were taken: images are prepared on the CPU."""
    chosen, cpu = options.suites or SUITES, torch.device("cpu")
    effort = {"seconds": 4, "rounds": (3, 7)} if options.quick else {"seconds": 20, "rounds": (3, 25)}
    most = 1 if options.quick else None
    for case in _cases_of_models(options, chosen, device, most):
        yield case, measure(case.calls, case.check, device=device, title=f"{case.suite}, {case.rows[0].name}", **effort), device
    if images.SUITE in chosen:
        with images.prepared() as prepared:
            for case, _ in islice(prepared.cases(), most):
                yield case, measure(case.calls, case.check, device=cpu, title=case.rows[0].name, **effort), cpu


def _loader_figures(path: Path | None) -> list[bool]:
    """What the trainer's loader does, printed and kept; whether each requirement holds."""
    from idefics2_fast.benchmarks import instruct

    figures = instruct.loader_figures()
    print(f"\n{instruct.figures_table(figures)}", flush=True)
    if path is not None:
        write_records(path, [figure.record() for figure in figures])
    return [figure.holds for figure in figures]


def _cases_of_models(options: argparse.Namespace, chosen: Sequence[str], device: torch.device, most: int | None) -> Iterator[Case]:
    of_model = [suite for suite in chosen if suite in model.SUITES]
    if not of_model and not {patch.SUITE, INSTRUCT} & set(chosen):
        return
    for name in [options.model] if options.model else ["tiny"] if options.quick else list(SETTINGS):
        for dtype in SETTINGS[name] if of_model else ():
            setting = load_setting(name, dtype, device)
            for suite in of_model:
                if reason := left_out(suite, setting):
                    print(f"\n{suite}: {setting.name} is left out: {reason}")
                    continue
                yield from islice(cases(suite, setting), most)
        if patch.SUITE in chosen:
            yield from islice(patch.cases(name, device), most)
        if INSTRUCT in chosen:
            from idefics2_fast.benchmarks import instruct

            yield from islice(instruct.cases(name), most)


def _suite(name: str) -> str:
    if name not in SUITES:
        raise argparse.ArgumentTypeError(f"no suite {name!r}: expected {', '.join(SUITES)}")
    return name


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m idefics2_fast.benchmarks",
        description="Times this engine beside transformers, on the same random weights, in one run.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("suites", nargs="*", type=_suite, metavar="suite", help=f"{', '.join(SUITES)}; all of them where none is named")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="the tiny model, the first case of each suite, few rounds: under two minutes on a quiet machine",
    )
    parser.add_argument("--model", choices=list(SETTINGS), help="this size alone")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON lines to add to, by default results/<device>.jsonl in this package")
    return parser


if __name__ == "__main__":
    sys.exit(main())
