"""`python -m idefics2_fast.benchmarks`: runs suites, prints tables, keeps the results."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import torch

from idefics2_fast.benchmarks import compare, page, readme
from idefics2_fast.benchmarks.case import ENGINE, SIZES, Case, Figures, LeftOut, Scope, threads
from idefics2_fast.benchmarks.record import RESULTS, Record, default_path, device_name, versions, write_records
from idefics2_fast.benchmarks.report import case_table, derived, figures_table, judged, records, records_of, verdicts
from idefics2_fast.benchmarks.timing import Measurement, measure

# suite -> the module whose `cases` makes it
KERNELS = ("dora_linear", "embedding", "linear_cross_entropy", "perceiver", "segment_attention")
MODEL = ("encode", "first_token", "decode")
SUITES = {"images": "images", **{name: name for name in KERNELS}, "sm90": "sm90.suite", **dict.fromkeys(MODEL, "model")}
SUITES |= {name: name for name in ("instruct", "patch", "scaling")}
GROUPS = {"kernels": KERNELS, "model": MODEL}
QUICK, FULL = {"seconds": 2, "rounds": (3, 41)}, {"seconds": 6, "rounds": (3, 25), "once": 2}

EXAMPLES = """
suites: {suites}
groups: {groups}

hf        transformers as it comes: one padded batch
hf-tuned  transformers at its best: images one by one, no padding, no masks
A provider that is not installed, or needs another device, has a row that says so.

examples:
  python -m idefics2_fast.benchmarks --quick
  python -m idefics2_fast.benchmarks decode --model small
  python -m idefics2_fast.benchmarks kernels images --out results.jsonl
  python -m idefics2_fast.benchmarks --compare old.jsonl new.jsonl --threshold 0.05
  python -m idefics2_fast.benchmarks --report report.html --no-run
""".format(suites=", ".join(SUITES), groups="; ".join(f"{name}: {', '.join(parts)}" for name, parts in GROUPS.items()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0; 1 where this engine was wrong or something became slower; 130 after Ctrl-C, which keeps what was measured."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.compare:
        try:
            return compare.main(*options.compare, options.threshold)
        except (OSError, ValueError) as error:
            parser.error(str(error))
    if options.readme:
        return readme.main()
    status = 0 if options.no_run else _run(options)
    if options.report:
        files = [options.out] if options.out else sorted(RESULTS.glob("*.jsonl"))
        print(f"Report: {page.write_report(options.report, [path for path in files if path.exists()])}")
    return status


def _run(options: argparse.Namespace) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{device_name(device)}; " + ", ".join(f"{name} {version}" for name, version in versions().items()))
    held: list[bool] = []
    status = 0
    try:
        for shown, made, verdict, wrong in _results(options, device):
            print(f"\n{shown}", flush=True)
            held += verdict
            status |= wrong
            for path, lines in groupby(made, lambda record: options.out or default_path(record.device)):
                if options.out or not options.quick:
                    write_records(path, lines)
    except KeyboardInterrupt:
        print("\nInterrupted. What stands above was measured.")
        status = 130
    kept = f"Results: {options.out or RESULTS}" if options.out or not options.quick else "Not kept: --out FILE keeps them."
    print(f"\n{sum(held)} of {len(held)} requirements hold. {kept}")
    return status


def _results(options: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, list[Record], list[bool], bool]]:
    """Of each case, of figures and of what is left out: what is shown and kept, which requirements hold, whether this engine was wrong."""
    for what in _cases(options, device):
        if isinstance(what, LeftOut):
            yield f"{what.suite}: {what.case} is left out: {what.reason}", records_of(what, device), [], False
        elif isinstance(what, Figures):
            yield figures_table(what), records_of(what, device), judged(what), False
        else:
            place = what.device or device
            with threads(what.threads):
                results = _measured(what, place, QUICK if options.quick else FULL)
                made = records(what, results, place)
            held = [holds for row in what.rows for holds in verdicts(row, results).values()]
            held += judged(derived(what, results))
            yield case_table(what, results), made, held, ENGINE in results and bool(results[ENGINE].wrong)


def _measured(case: Case, device: torch.device, effort: dict[str, object]) -> dict[str, Measurement]:
    results = measure(case.calls, case.check, device=device, title=f"{case.suite}, {case.rows[0].name}", **effort)
    return results | {name: Measurement(absent=reason) for name, reason in case.absent.items()}


def _cases(options: argparse.Namespace, device: torch.device) -> Iterator[Case | Figures | LeftOut]:
    """What the wanted suites make; a module is imported when its turn comes, and one that cannot be is left out."""
    chosen = [part for name in options.suites or SUITES for part in GROUPS.get(name, (name,))]
    for home, parts in groupby(dict.fromkeys(chosen), SUITES.get):
        scope = Scope(device, tuple(parts), options.quick, options.model)
        try:
            module = importlib.import_module(f"idefics2_fast.benchmarks.{home}")
        except ModuleNotFoundError as error:
            yield from (LeftOut(part, "all cases", f"{error.name} is not installed") for part in scope.parts)
            continue
        yield from module.cases(scope)


def _suite(name: str) -> str:
    if name not in SUITES and name not in GROUPS:
        raise argparse.ArgumentTypeError(f"no suite {name!r}: expected {', '.join([*GROUPS, *SUITES])}")
    return name


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m idefics2_fast.benchmarks",
        description="Times this engine beside transformers and others, on the same weights, in one run.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("suites", nargs="*", type=_suite, metavar="suite", help="suites or groups of them; all where none is named")
    parser.add_argument("--quick", action="store_true", help="the tiny model, the first case of each suite, few rounds; not kept unasked")
    parser.add_argument("--model", choices=SIZES, help="this size alone")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON lines to add to, by default results/<device>.jsonl in this package")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write a page of the results, of --out or of all that are kept")
    parser.add_argument("--no-run", action="store_true", help="with --report: of what is there")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="what became slower from one file to another")
    parser.add_argument("--threshold", type=float, default=compare.THRESHOLD, help="share that counts, by default %(default)s")
    parser.add_argument("--readme", action="store_true", help="write the README's figures from the results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
