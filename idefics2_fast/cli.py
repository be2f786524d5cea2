"""The command line: `idefics2-fast info`, `generate`, `convert`, `train`, `plan`, `bench` and `doctor`.

torch and the engine are imported when the arguments are known to be good: help and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import runpy
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, NoReturn

from idefics2_fast import counters
from idefics2_fast.config import NAMED, Idefics2Config
from idefics2_fast.json_files import short

if TYPE_CHECKING:
    import torch

    from idefics2_fast import Batch, Idefics2, Processor

PROGRAM = "idefics2-fast"
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes of a value
BAR_DELAY = 1.0  # seconds that something may take before it gets a progress bar
CPU_FEATURES = (
    "avx2 fma3 f16c avx512_f avx512_vnni avx512_bf16 avx512_fp16 amx_int8 amx_bf16 amx_fp16 neon dot i8mm bf16 fp16_arith sve sve2 sme"
)

EXAMPLES = {
    "": f"""
  {PROGRAM} info --size idefics2-8b
  {PROGRAM} generate --model HuggingFaceM4/idefics2-8b --image photo.jpg --prompt "What is in this picture?"
  {PROGRAM} convert --model path/to/checkpoint --out path/to/result --dtype bfloat16
  {PROGRAM} train instruct --model path/to/checkpoint --data my.jsonl --out runs/a
  {PROGRAM} bench --quick""",
    "info": f"""
  {PROGRAM} info
  {PROGRAM} info --size idefics2-8b
  {PROGRAM} info --model path/to/checkpoint""",
    "generate": f"""
  {PROGRAM} generate --model path/to/checkpoint --image photo.jpg --prompt "What is in this picture?"
  {PROGRAM} generate --model path/to/checkpoint --image left.png right.png --split --prompt "What differs?" \\
      --max-new-tokens 200 --temperature 0.7 --top-p 0.9 --seed 1
  {PROGRAM} generate --model path/to/checkpoint --adapter runs/a/adapter --image photo.jpg --prompt "What is this?"
  {PROGRAM} generate --model path/to/checkpoint --image photo.jpg --raw --prompt "<image>A photograph of" --stop "." --json""",
    "convert": f"""
  {PROGRAM} convert --model path/to/checkpoint --out path/to/result --dtype bfloat16
  {PROGRAM} convert --model path/to/checkpoint --out path/to/result --max-shard-size 2GB
  {PROGRAM} convert --model path/to/checkpoint --adapter runs/a/adapter --out path/to/merged""",
    "train": f"""
  {PROGRAM} train instruct --help""",
    "plan": f"""
  {PROGRAM} plan instruct --size idefics2-8b --gpus 8""",
    "bench": f"""
  {PROGRAM} bench --quick
  {PROGRAM} bench decode --model small
  {PROGRAM} bench --compare old.jsonl new.jsonl
  python -m idefics2_fast.benchmarks --help""",
    "doctor": f"""
  {PROGRAM} doctor""",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line. A mistake is one line on stderr.

    Args:
        argv: the arguments; None for the process's own.

    Returns:
        The exit code: 0, 2 after a mistake, 130 after Ctrl-C, 141 when the reader of stdout has left.

    Raises:
        SystemExit: by `--help`, by `--version` and by what `train`, `plan` and `bench` run.
    """
    return run_command(lambda: _parse(argv))


def run_command(parse: Callable[[], argparse.Namespace]) -> int:
    """Runs what arguments name: their `run`, which may return an exit code. A mistake is one line on stderr; see `main`."""
    debug, code = False, 0
    _show_anything()
    try:
        arguments = parse()
        debug = arguments.debug
        code = arguments.run(arguments) or 0
        print(end="", flush=True)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes stdout once more when it ends
        return 141
    except (ValueError, OSError) as error:
        if debug:
            traceback.print_exc()
        print(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return code


def _show_anything() -> None:
    """Escapes what a terminal that is not UTF-8 cannot show: an answer is never cut."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


# --- arguments ---


class Parser(argparse.ArgumentParser):
    """Mistakes become ValueErrors, so that `main` prints them as all others: one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog=PROGRAM, description="Run and train Idefics2 vision-language models.", **_style(""))
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {metadata.version('idefics2-fast')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary, add_arguments, run in (
        ("info", "Show versions, this machine, and the sizes and costs of a model.", _add_info, _info),
        ("generate", "Answer a prompt about images.", _add_generate, _generate),
        ("convert", "Write a checkpoint in another dtype, or in shards of another size.", _add_convert, _convert),
        ("train", "Train by a recipe; arguments other than --debug are its own.", None, _train),
        ("plan", "Show the memory, FLOPs and time of a recipe; arguments other than --debug are its own.", None, _plan),
        ("bench", "Run the benchmarks beside transformers and others; arguments other than these go to them.", None, _bench),
        ("doctor", "Check the Triton kernels on this machine's CUDA device, each against its formula.", None, _doctor),
    ):
        command = commands.add_parser(name, help=summary, description=summary, add_help=run not in (_train, _plan), **_style(name))
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(run=run)
        if add_arguments is not None:
            add_arguments(command)
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.run not in (_train, _plan, _bench):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest = rest
    return arguments


def _style(command: str) -> dict[str, object]:
    epilog = f"examples:{EXAMPLES[command]}"
    return {"epilog": epilog, "formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}


def _add_info(command: argparse.ArgumentParser) -> None:
    which = command.add_mutually_exclusive_group()
    which.add_argument("--model", metavar="DIR|ID", help="a checkpoint: its folder, or its name on the Hugging Face hub")
    which.add_argument("--size", choices=NAMED, help="a named size, without a checkpoint")
    _add_revision(command)


def _add_revision(command: argparse.ArgumentParser) -> None:
    command.add_argument("--revision", metavar="NAME", help="branch, tag or commit, of a model on the hub")


def _add_adapter(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument(
        "--adapter",
        action="append",
        default=[],
        type=path_of,
        metavar="DIR",
        help=f"an adapter in PEFT's format, {what}; several are applied one after another",
    )


def _add_generate(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", required=True, metavar="DIR|ID", help="a checkpoint: its folder, or its name on the Hugging Face hub")
    _add_revision(command)
    _add_adapter(command, "applied to the model")
    command.add_argument("--prompt", required=True, type=_text, metavar="TEXT")
    command.add_argument(
        "--image", nargs="+", action="extend", default=[], metavar="FILE", help="images, in the order of the prompt's marks"
    )
    form = command.add_mutually_exclusive_group()
    form.add_argument(
        "--chat", action="store_true", default=None, help="a user's turn, images first (default where there is a chat template)"
    )
    form.add_argument("--raw", action="store_false", dest="chat", help="the prompt as it is, with <image> where an image goes")
    command.add_argument(
        "--split", action=argparse.BooleanOptionalAction, help="images as four quarters and the whole (default: the checkpoint's)"
    )
    own = "default: the checkpoint's generation_config.json"
    command.add_argument("--max-new-tokens", type=int, metavar="N", help=f"{own}, or 64")
    command.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help=f"0 is greedy; above it, tokens are drawn ({own}, or 0)",
    )
    command.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help=f"draw from the likeliest tokens that reach P together ({own}, or 1)",
    )
    command.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    command.add_argument(
        "--stop",
        type=_text,
        nargs="+",
        action="extend",
        metavar="TEXT",
        help=f"texts that end the answer ({own})",
    )
    command.add_argument(
        "--bad-word",
        type=_text,
        action="append",
        metavar="TEXT",
        help=f"a text that does not appear; can be given several times ({own})",
    )
    command.add_argument("--dtype", choices=DTYPES, help="default: the checkpoint's own")
    command.add_argument("--device", type=_device_name, metavar="DEVICE", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    command.add_argument("--json", action="store_true", help="print one line of JSON: tokens, text, finish, and seconds in each phase")


def _add_convert(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", required=True, metavar="DIR|ID", help="the checkpoint to read")
    _add_revision(command)
    _add_adapter(command, "merged into the weights")
    command.add_argument("--out", required=True, type=path_of, metavar="DIR", help="the folder to write")
    command.add_argument("--dtype", choices=DTYPES, help="default: the checkpoint's own")
    command.add_argument(
        "--max-shard-size", type=_size, default="5GB", metavar="SIZE", help="of a file, such as 500MB (default: %(default)s)"
    )
    command.add_argument("--force", action="store_true", help="overwrite a checkpoint")


def _text(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("it is empty, expected text")
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes that Python could not decode stand in the arguments as surrogates
        raise argparse.ArgumentTypeError(f"{text!r} is not valid text in this terminal's encoding") from None
    return text


def path_of(text: str) -> Path:
    """A path that was given. An empty one, of a variable that is not set, would be this folder.

    Raises:
        argparse.ArgumentTypeError: it is empty.
    """
    if not text:
        raise argparse.ArgumentTypeError("it is empty, expected a path")
    return Path(text)


def _device_name(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a device: expected cpu, cuda or cuda:N")
    return text


def _size(text: str) -> int:
    """Bytes; units are decimal, as in transformers' `max_shard_size`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmgt]?)b?", text, re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: expected a number of bytes, or one with KB, MB, GB or TB")
    size = float(match[1]) * 1000 ** " kmgt".index(match[2].lower() or " ")
    if size >= 2**63:
        raise argparse.ArgumentTypeError(f"{short(text)} is not a size: expected less than 2**63 bytes")
    return int(size)


# --- info ---


def _info(arguments: argparse.Namespace) -> None:
    config = None
    if arguments.revision is not None and arguments.model is None:
        raise ValueError(f"revision {arguments.revision!r} was given without --model: revisions belong to hub ids")
    if arguments.model is not None:
        from idefics2_fast.weights import resolve_checkpoint

        config = Idefics2Config.from_hf(resolve_checkpoint(arguments.model, arguments.revision, weights=False))
    elif arguments.size is not None:
        config = Idefics2Config.named(arguments.size)
    print_table(_machine())
    print("\nimplementation that each op takes here")
    print_table(_implementations(config or Idefics2Config()))
    if config is not None:
        print(f"\nmodel {arguments.model or arguments.size}")
        print_table(_geometry(config))
        print()
        print_table(_sizes(config), figures=True)
        print()
        print_table(_costs(config), figures=True)


def print_table(rows: Sequence[Sequence[str]], *, figures: bool = False) -> None:
    """Aligned columns; of figures to the right, but for the first."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.rjust(width) if figures else cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip())


def _machine() -> list[tuple[str, str]]:
    import torch

    versions = [f"{package} {metadata.version(package)}" for package in ("idefics2-fast", "torch", "transformers")]
    cpu = torch.cpu.get_capabilities()
    rows = [
        ("versions", ", ".join([*versions, f"python {sys.version.split()[0]}"])),
        ("cpu", f"{cpu.get('cpu_name', 'unknown')} ({cpu['architecture']}), {torch.get_num_threads()} threads"),
        ("cpu features", " ".join(name for name in CPU_FEATURES.split() if cpu.get(name)) or "none"),
    ]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        rows.append((f"cuda:{index}", f"{device.name}, {_bytes(device.total_memory)}, compute capability {device.major}.{device.minor}"))
    return rows


def _implementations(config: Idefics2Config) -> list[tuple[str, ...]]:
    import torch

    from idefics2_fast import ops

    device = _find_device(None)
    likes = [torch.empty(1, config.text.head_dim, dtype=getattr(torch, name), device=device) for name in DTYPES]
    rows = [(op, *(ops.choose(op, like) for like in likes), ", ".join(known)) for op, known in ops.IMPLEMENTATIONS.items()]
    return [(str(device), *DTYPES, "of"), *rows]


def _geometry(config: Idefics2Config) -> list[tuple[str, str]]:
    vision, perceiver, text = config.vision, config.perceiver, config.text
    side, window = vision.positions_per_side, f"window {text.sliding_window}" if text.sliding_window else "no window"
    return [
        (
            "vision",
            f"{vision.num_hidden_layers} layers, width {vision.hidden_size}, {vision.num_attention_heads} heads of {vision.head_dim}, "
            f"MLP {vision.intermediate_size}, patches of {vision.patch_size} pixels, {side} x {side} positions",
        ),
        (
            "perceiver",
            f"{perceiver.depth} layers, {perceiver.n_latents} latents, {perceiver.n_heads} heads of {perceiver.head_dim} "
            f"over {perceiver.num_key_value_heads} of keys and values",
        ),
        (
            "text",
            f"{text.num_hidden_layers} layers, width {text.hidden_size}, {text.num_attention_heads} heads of {text.head_dim} "
            f"over {text.num_key_value_heads} of keys and values, MLP {text.intermediate_size}, "
            f"vocabulary {text.vocab_size}, {text.max_position_embeddings} positions, {window}",
        ),
    ]


def _sizes(config: Idefics2Config) -> list[tuple[str, ...]]:
    """Parameters and bytes of every part, and the FLOPs of a prompt with one image and 32 more tokens."""
    parameters = counters.count_parameters(config)
    flops = counters.forward_flops(config, [config.perceiver.n_latents + 32], [(980 // config.vision.patch_size) ** 2], head_rows=1)
    lines = zip((*parameters._fields, "total"), (*parameters, parameters.total), (*flops, flops.total), strict=True)
    rows = [(name, f"{count:,}", *(_bytes(count * size) for size in DTYPES.values()), f"{work / 1e9:,.1f}") for name, count, work in lines]
    return [("part", "parameters", *DTYPES, "GFLOP for one 980 x 980 image and 32 tokens"), *rows]


def _costs(config: Idefics2Config) -> list[tuple[str, ...]]:
    """What a sequence costs in memory and what a decoded token reads."""
    context = 1024
    cache = [_bytes(counters.cache_bytes_per_token(config, size)) for size in DTYPES.values()]
    reads = [_bytes(counters.decode_bytes(config, context, size)) for size in DTYPES.values()]
    return [("bytes", *DTYPES), ("KV cache, a token", *cache), (f"read to decode token {context}", *reads)]


def _bytes(count: int) -> str:
    """With a decimal unit: 16.8 GB."""
    size, units = float(count), iter(("B", "KB", "MB", "GB", "TB"))
    unit = next(units)
    while size >= 999.95:
        size, unit = size / 1000, next(units)
    return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"


# --- generate ---


class _Stream:
    """Takes tokens as they are made: keeps them, prints their text, tells the first from the others on the clock."""

    def __init__(self, clock: _Clock, shown: bool) -> None:
        self.clock, self.shown = clock, shown
        self.tokens: list[int] = []
        self.text = ""

    def __call__(self, document: int, token: int, text: str) -> None:
        if not self.tokens:
            self.clock.lap("prefill")
        self.tokens.append(token)
        self.text += text
        if self.shown:
            print(text, end="", flush=True)


class _Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = perf_counter()

    def lap(self, phase: str) -> None:
        now = perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now


def _generate(arguments: argparse.Namespace) -> None:
    """All that can be wrong with the prompt and the images comes to light before the weights are read."""
    clock = _Clock()
    from idefics2_fast import Idefics2, Processor
    from idefics2_fast.weights import resolve_checkpoint

    device = _find_device(arguments.device)
    _check_adapters(arguments.adapter)
    folder = resolve_checkpoint(arguments.model, arguments.revision)
    processor = Processor.from_pretrained(folder, split_images=arguments.split)
    clock.lap("load")
    batch = _batch(processor, arguments)
    clock.lap("prepare")
    with _progress("reading weights") as progress:
        model = Idefics2.from_pretrained(folder, dtype=arguments.dtype, device=device, progress=progress)
    _apply_adapters(model, arguments.adapter)
    clock.lap("load")
    stream, finish = _Stream(clock, shown=not arguments.json), "interrupted"
    try:
        out = model.generate(
            batch.to(device),
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            seed=arguments.seed,
            stop_strings=arguments.stop,
            bad_words=arguments.bad_word,
            on_token=stream,
        )
        finish = out.finish[0]
    finally:
        clock.lap("decode")
        if stream.tokens:
            result = {"tokens": stream.tokens, "text": stream.text, "finish": finish, "seconds": clock.seconds}
            print(json.dumps(result) if arguments.json else "", flush=True)


def _check_adapters(folders: Sequence[Path]) -> None:
    """Before the weights are read."""
    for folder in folders:
        if not (folder / "adapter_config.json").is_file():
            raise ValueError(f"no adapter at {folder}: expected adapter_config.json and adapter_model.safetensors")


def _apply_adapters(model: Idefics2, folders: Sequence[Path], *, merge: bool = False) -> None:
    """Loads adapters, each on the model that the ones before it have made; the last one is merged only if asked for."""
    from idefics2_fast import load_adapters, merge_adapters

    for folder in folders:
        load_adapters(model, folder)
        if merge or folder is not folders[-1]:
            merge_adapters(model)


def _find_device(name: str | None) -> torch.device:
    """The device of that name; without a name a GPU where there is one."""
    import torch

    count = torch.cuda.device_count()
    device = torch.device(name or ("cuda" if count else "cpu"))
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"device {name!r} is not there: torch sees {count} CUDA devices")
    return device


def _batch(processor: Processor, arguments: argparse.Namespace) -> Batch:
    chat = processor.tokenizer.chat_template is not None if arguments.chat is None else arguments.chat
    if not chat:
        return processor(arguments.prompt, arguments.image)
    content = [*({"type": "image"} for _ in arguments.image), {"type": "text", "text": arguments.prompt}]
    return processor.chat([{"role": "user", "content": content}], arguments.image)


@contextmanager
def _progress(description: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr for bytes done of bytes in all: on a terminal, and for what takes longer than BAR_DELAY."""
    from tqdm import tqdm

    with tqdm(desc=description, unit="B", unit_scale=True, delay=BAR_DELAY, disable=None, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


# --- convert, and what runs other packages ---


def _convert(arguments: argparse.Namespace) -> None:
    from idefics2_fast import Idefics2, weights

    _check_adapters(arguments.adapter)
    source, out = weights.resolve_checkpoint(arguments.model, arguments.revision), arguments.out
    existing = [name for name in ("config.json", weights.SINGLE_FILE, weights.INDEX_FILE) if (out / name).exists()]
    if out.exists() and (not out.is_dir() or out.samefile(source)):
        raise ValueError(f"cannot write to {out}: expected a folder other than the one that is read")
    if existing and not arguments.force:
        raise ValueError(f"{out} holds a checkpoint ({existing[0]}): give another folder, or --force to overwrite it")
    _check_processor(source)
    with _progress("reading weights") as progress:
        model = Idefics2.from_pretrained(source, dtype=arguments.dtype, progress=progress)
    _apply_adapters(model, arguments.adapter, merge=True)
    with _progress("writing weights") as progress:
        weights.save_checkpoint(
            model.hf_tensors(),
            model.config.to_hf(),
            out,
            generation=model.generation_config,
            max_shard_size=arguments.max_shard_size,
            progress=progress,
        )
    others = {path for pattern in weights.HUB_PATTERNS for path in source.glob(pattern) if path.suffix != ".safetensors"}
    for path in sorted(others - {source / "config.json", source / weights.INDEX_FILE}):
        shutil.copy(path, out)
    size = counters.count_parameters(model.config).total * model.dtype.itemsize
    print(f"{out}: {_bytes(size)} in {str(model.dtype).removeprefix('torch.')}")


def _check_processor(folder: Path) -> None:
    """A checkpoint may come without a processor, but not with one that cannot be read."""
    from idefics2_fast import Processor

    if any(folder.glob("*tokenizer*")) or any(folder.glob("*processor_config.json")):
        Processor.from_pretrained(folder)


def _train(arguments: argparse.Namespace) -> None:
    _run_training(f"{PROGRAM} train", arguments)


def _plan(arguments: argparse.Namespace) -> None:
    _run_training(PROGRAM, arguments, "plan")


def _run_training(program: str, arguments: argparse.Namespace, *first: str) -> None:
    sys.argv = [program, *first, *arguments.rest, *(["--debug"] if arguments.debug else [])]
    runpy.run_module("idefics2_fast.training", run_name="__main__")


def _bench(arguments: argparse.Namespace) -> None:
    sys.argv = [f"{PROGRAM} bench", *arguments.rest]
    runpy.run_module("idefics2_fast.benchmarks", run_name="__main__")


def _doctor(arguments: argparse.Namespace) -> int:
    import torch

    from idefics2_fast import doctor

    if not torch.cuda.is_available():
        print("No CUDA device: the Triton kernels are not used here.")
        return 0
    verdicts = []
    for op in doctor.CASES:
        verdicts.append(doctor.examine(op))
        print(verdicts[-1], flush=True)
    return int(any(verdict.problem for verdict in verdicts))
