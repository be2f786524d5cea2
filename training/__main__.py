"""`python -m idefics2_fast.training`, `idefics2-fast train` and `idefics2-fast plan`: recipes as commands, their fields as flags."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from idefics2_fast.cli import PROGRAM, Parser, path_of, print_table, run_command
from idefics2_fast.config import NAMED, Idefics2Config
from idefics2_fast.training.plan import CARD, PEAK_FLOPS, Plan, count_trained, plan, too_large
from idefics2_fast.training.recipe import RECIPES, Recipe, table

if TYPE_CHECKING:
    from idefics2_fast.training.run import Fitted

NOT_SAVED = 74  # sysexits.h's EX_IOERR
SIGNALLED = (75, 130)
MODULE = "python -m idefics2_fast.training"

EXAMPLES = """
examples:
  idefics2-fast train instruct --model HuggingFaceM4/idefics2-8b --data my.jsonl --out runs/a --check
  idefics2-fast train instruct --model path/to/checkpoint --data rows.parquet --out runs/b --rank 16 --learning-rate 5e-5 --held-out 20
  torchrun --nproc-per-node 8 -m idefics2_fast.training instruct --model path/to/checkpoint --data my.jsonl --out runs/c --packs 64
  idefics2-fast plan instruct --size idefics2-8b --gpus 8 --mfu 0.4
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; see `idefics2_fast.cli.main`.

    Returns:
        The exit code: 0; 1 where the guard stopped the run; 2 after a mistake; 74 where a checkpoint could not be saved; 75 after
        SIGTERM, when the same command goes on; 130 after Ctrl-C.
    """
    return run_command(lambda: _parse(sys.argv[1:] if argv is None else argv))


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    program = MODULE if Path(sys.argv[0]).name == "__main__.py" else sys.argv[0]
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter, "epilog": EXAMPLES, "allow_abbrev": False}
    parser = Parser(prog=program, description="Train Idefics2 vision-language models.", **style)
    commands = parser.add_subparsers(dest="recipe", metavar="RECIPE", required=True)
    for name, recipe in RECIPES.items():
        _add_train(commands.add_parser(name, help=recipe.__doc__.split("\n")[0], **style), name)
    planning = commands.add_parser("plan", help="Memory, FLOPs and time of a recipe, without running it.", **style)
    planned = planning.add_subparsers(dest="recipe", metavar="RECIPE", required=True)
    for name in RECIPES:
        _add_plan(planned.add_parser(name, **style), name)
    return parser.parse_args(argv)


def _add_train(command: argparse.ArgumentParser, recipe: str) -> None:
    _add_common(command, lambda arguments: _train(arguments, recipe))
    command.add_argument(
        "--check", action="store_true", help="look at every row first, decode its images, and train only if all can be used"
    )
    command.add_argument("--wait-for-room", action="store_true", help="on a full disk wait for room, and do not end with exit code 74")
    for name in ("model", "data", "out"):
        command.add_argument(f"--{name}", required=True, type=_place, metavar="PATH", help=_field(name).metadata["note"])


def _add_plan(command: argparse.ArgumentParser, recipe: str) -> None:
    _add_common(command, lambda arguments: _plan(arguments, recipe))
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", metavar="DIR|ID", help="a checkpoint: its folder, or its name on the Hugging Face hub")
    which.add_argument("--size", choices=NAMED, help="a named size, without a checkpoint")
    command.add_argument("--gpus", type=int, default=1, metavar="N", help="default: %(default)s")
    command.add_argument("--mfu", type=float, default=0.4, metavar="SHARE", help="of the peak FLOPs of an H100 (default: %(default)s)")


def _add_common(command: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int]) -> None:
    command.set_defaults(run=run)
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    group = command.add_argument_group("the recipe")
    for name, hint in get_type_hints(Recipe).items():
        if name not in ("model", "data", "out"):
            group.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, help=_help(_field(name)), **_kind(hint))


def _field(name: str) -> Field:
    return next(entry for entry in fields(Recipe) if entry.name == name)


def _help(entry: Field) -> str:
    shown = ",".join(map(str, entry.default)) if isinstance(entry.default, tuple) else entry.default
    note = f"{entry.metadata['note']}; " if entry.metadata["note"] else ""
    return f"{note}default: {shown} ({entry.metadata['source']})".replace("%", "%%")


def _kind(hint: Any) -> dict[str, Any]:
    """How a field's flag is read."""
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    if get_origin(hint) is tuple:
        return {"type": _several(get_args(hint)[0]), "metavar": "A,B"}
    return {"type": hint, "metavar": {int: "N", float: "X", str: "TEXT"}[hint]}


def _several(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """Reads values of a kind with commas between them."""

    def read(text: str) -> tuple[Any, ...]:
        try:
            return tuple(kind(part) for part in text.split(",") if part)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not A,B: expected each a {kind.__name__}") from None

    return read


def _place(text: str) -> str:
    path_of(text)
    return text


def _recipe_of(arguments: argparse.Namespace, name: str, **places: str) -> Recipe:
    given = {entry.name: getattr(arguments, entry.name) for entry in fields(Recipe) if hasattr(arguments, entry.name)}
    return RECIPES[name](**given | places)


# --- train ---


def _train(arguments: argparse.Namespace, name: str) -> int:
    recipe = _recipe_of(arguments, name)
    from idefics2_fast.training.checkpoint import CheckpointError, is_full
    from idefics2_fast.training.guard import GuardError
    from idefics2_fast.training.loader import TooManyRejections
    from idefics2_fast.training.run import fit

    first = int(os.environ.get("RANK", 0)) == 0
    if arguments.check and (bad := _check(recipe, shown=first)):
        return bad
    if first:
        print(table(recipe), flush=True)
    try:
        result = fit(recipe, wait_for_room=True) if arguments.wait_for_room else fit(recipe)
    except TooManyRejections as error:  # a list, line by line
        print(error, file=sys.stderr)
        return 2
    except GuardError as error:
        print(error, file=sys.stderr)
        return 1
    except Exception as error:
        if not (isinstance(error, CheckpointError) or is_full(error)) or arguments.debug:
            raise
        if first:
            print(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return NOT_SAVED
    if first:
        print(_ended(recipe, result), flush=True)
    return result.exit_code


def _ended(recipe: Recipe, result: Fitted) -> str:
    loss = "" if math.isnan(result.loss) else f", loss {result.loss:.4f}"
    if result.exit_code:
        return f"stopped by a signal after {result.steps} steps{loss}; {result.weights}; the same command goes on"
    from idefics2_fast.training.report import REPORT

    return f"{result.steps} steps{loss or ', there was nothing left to do'}; {result.weights}, {Path(recipe.out) / REPORT}"


def _check(recipe: Recipe, shown: bool) -> int:
    """2 where a row cannot be used; each such row is printed.

    Rows are joined, planned and their images decoded as in a run, so that both leave out the same.
    Rows held out are looked at, too.
    """
    from idefics2_fast import Processor
    from idefics2_fast.training.loader import decode_images
    from idefics2_fast.training.run import planner_of, trained_rows
    from idefics2_fast.training.sources import Last, check, open_source

    source, bad = open_source(recipe.data), 0
    processor = Processor.from_pretrained(recipe.model)
    planner = planner_of(recipe, processor)
    trained = trained_rows(source, recipe, processor)
    if shown:
        print(f"looking at {len(source)} rows and decoding their images", flush=True)
    for part in (trained, Last(source, recipe.held_out)):
        for rejection in check(part, lambda sample: decode_images(planner(sample), processor), recipe.workers):
            bad += rejection.rows
            if shown:
                print(rejection.reason, file=sys.stderr)
    if shown:
        print(f"{bad} of {len(source)} rows cannot be used", file=sys.stderr)
    return 2 if bad else 0


# --- plan ---


def _plan(arguments: argparse.Namespace, name: str) -> int:
    recipe = _recipe_of(arguments, name, model=arguments.model or arguments.size, data="", out="")
    if not 0 < arguments.mfu <= 1:
        raise ValueError(f"mfu is {arguments.mfu}, expected a share above 0, 1 at most")
    if arguments.size is not None:
        config = Idefics2Config.named(arguments.size)
    else:
        from idefics2_fast.weights import resolve_checkpoint

        config = Idefics2Config.from_hf(resolve_checkpoint(arguments.model, weights=False))
    planned = plan(config, recipe, arguments.gpus)
    print(f"{name} on {arguments.gpus} GPUs: packs of {recipe.tokens:,} tokens and {recipe.patches:,} patches, {recipe.packs} a step\n")
    print_table(_rows(planned, recipe, config, arguments), figures=True)
    problem = too_large(planned, recipe, arguments.gpus)
    print(f"\n{problem or f'fits a card of {CARD / 1e9:.0f} GB'}")
    return 0


def _rows(planned: Plan, recipe: Recipe, config: Idefics2Config, arguments: argparse.Namespace) -> list[tuple[str, str]]:
    memory = [(name, f"{value / 1e9:.2f} GB") for name, value in planned._asdict().items() if name != "flops"]
    seconds = planned.seconds(arguments.gpus, arguments.mfu)
    return [
        ("trained parameters", f"{count_trained(config, recipe).total:,}"),
        *memory,
        ("memory of a GPU", f"{planned.memory / 1e9:.2f} GB"),
        ("FLOPs of a step", f"{planned.flops:.3e}"),
        (f"a step at MFU {arguments.mfu:g} of {PEAK_FLOPS / 1e12:.0f} TFLOP/s", f"{seconds:.2f} s"),
        ("tokens/s", f"{recipe.packs * recipe.tokens / seconds:,.0f}"),
        (f"{recipe.steps:,} steps", f"{recipe.steps * seconds / 3600:.2f} h"),
    ]


def end(code: int) -> NoReturn:
    """Ends the process; after a signal without waiting for threads that a slow disk holds up: all that counts is saved."""
    if code in SIGNALLED:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    end(main())
