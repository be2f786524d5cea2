"""What `ptxas` made of every kernel at every shipped config, read out of the machine code for sm_90.

    python -m idefics2_fast.benchmarks.sm90.resources           # prints the table
    python -m idefics2_fast.benchmarks.sm90.resources --write   # and records it: benchmarks/results/sm90-resources.json

The configs come from `kernels/tuned.py`, the launches from the ops' own host functions, called on tensors of representative shapes.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import triton

from idefics2_fast.benchmarks.sm90.launches import Compiled, Launch, compile, launches, recorded
from idefics2_fast.kernels.segments import Segments
from idefics2_fast.kernels.tuned import CONFIGS

RESULTS = Path(__file__).parents[1] / "results" / "sm90-resources.json"

# Limits of a multiprocessor of compute capability 9.0 (CUDA C++ Programming Guide, technical specifications per compute capability).
REGISTERS, WARPS, CTAS, SHARED = 65536, 64, 32, 233472
REGISTERS_UNIT, SHARED_UNIT, SHARED_RESERVED = 256, 128, 1024  # of a warp, of a CTA, kept by the system in every CTA
SCHEDULERS = 4


# --- machine code ---


@dataclass(frozen=True)
class Instruction:
    opcode: str  # with its modifiers: LDG.E.128
    text: str


@dataclass(frozen=True)
class HotLoop:
    """The instructions that run most: `kind` says whether they are a loop with tensor-core products, a loop, or the whole body."""

    kind: str
    instructions: Sequence[Instruction]

    @property
    def loads(self) -> Counter[int]:
        """Loads from global memory by bytes of a thread's access."""
        return Counter(width for instruction in self.instructions if (width := _load_width(instruction.opcode)))


def _load_width(opcode: str) -> int:
    """Bytes that a thread loads from global memory; 0 for anything else."""
    parts = opcode.split(".")
    if parts[0] not in ("LDG", "LDGSTS", "LD"):
        return 0
    return next((width for name, width in _WIDTHS.items() if name in parts), 4)


_WIDTHS = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
_LINE = re.compile(r"^(?P<label>\.L_\w+):|^\s*/\*[0-9a-f]{4,}\*/\s+(?P<text>(?:@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)[^;]*);")


def read(sass: str) -> tuple[list[Instruction], list[tuple[int, int]]]:
    """The instructions of disassembled code, and its loops as (first, last) instruction of each backward branch.

    No loop is what runs back from behind the kernel's end: the slow way of a wait, moved there.
    """
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    loops = []
    for match in filter(None, map(_LINE.match, sass.splitlines())):
        if match["label"]:
            labels[match["label"]] = len(instructions)
            continue
        target = re.search(r"`\((\.L_\w+)\)", match["text"]) if match["opcode"].startswith("BRA") else None
        first = labels.get(target[1], len(instructions)) if target else len(instructions)
        if first < len(instructions) and not any(i.text.strip() == "EXIT" for i in instructions[first:]):
            loops.append((first, len(instructions)))
        instructions.append(Instruction(match["opcode"], match["text"]))
    return instructions, loops


def hot_loop(sass: str) -> HotLoop:
    """The innermost loops with tensor-core products; without one, the largest innermost loop; without one, all of it."""
    instructions, loops = read(sass)

    def innermost(loops: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        return [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]

    multiply = [loop for loop in loops if any(i.opcode.startswith(("HGMMA", "HMMA")) for i in instructions[loop[0] : loop[1] + 1])]
    if multiply:
        return HotLoop("products", [i for first, last in innermost(multiply) for i in instructions[first : last + 1]])
    if loops:
        first, last = max(innermost(loops), key=lambda loop: loop[1] - loop[0])
        return HotLoop("loop", instructions[first : last + 1])
    return HotLoop("body", instructions)


def resident_ctas(registers: int, shared: int, num_warps: int) -> int:
    """CTAs that one multiprocessor holds at a time, by the rules of CUDA's occupancy calculator."""
    of_a_warp = -(-registers * 32 // REGISTERS_UNIT) * REGISTERS_UNIT
    warps = REGISTERS // of_a_warp // SCHEDULERS * SCHEDULERS
    of_a_cta = -(-(shared + SHARED_RESERVED) // SHARED_UNIT) * SHARED_UNIT
    return min(CTAS, WARPS // num_warps, warps // num_warps, SHARED // of_a_cta)


# --- the table ---


@dataclass(frozen=True)
class Resources:
    """One kernel at one config. Spills count instructions that touch a thread's stack, `loads` global loads of the hot loop by bytes."""

    config: Mapping[str, int]
    registers: int
    stack: int
    spills: int
    shared: int
    ctas: int
    products: Mapping[str, int]
    hot: str
    instructions: int
    loads: Mapping[str, int]


def measure(kernel: Compiled, launch: Launch) -> Resources:
    """The resources of a launch's compiled code."""
    instructions, _ = read(kernel.sass)
    hot = hot_loop(kernel.sass)
    products = Counter(i.opcode.removeprefix("HGMMA.").split(".")[0] for i in instructions if i.opcode.startswith("HGMMA"))
    return Resources(
        config=_config(launch),
        registers=kernel.registers,
        stack=kernel.stack,
        spills=sum(i.opcode.startswith(("LDL", "STL")) for i in instructions),
        shared=kernel.shared,
        ctas=resident_ctas(kernel.registers, kernel.shared, kernel.num_warps),
        products=dict(sorted(products.items())),
        hot=hot.kind,
        instructions=len(hot.instructions),
        loads={str(width): count for width, count in sorted(hot.loads.items())},
    )


def _config(launch: Launch) -> dict[str, int]:
    blocks = {name: value for name, value in launch.constexprs.items() if re.fullmatch(r"[BD][A-Z0-9]|BLOCK|ROWS", name)}
    return {**blocks, **{name: value for name, value in launch.options.items() if name in ("num_warps", "num_stages")}}


def table(ops: Mapping[str, Sequence[str]] | None = None) -> dict[str, Resources]:
    """Resources by "op/shape class/case/kernel", under the first case that has the kernel with these constants; a second one is "kernel 2".

    Args:
        ops: the shape classes that are wanted of each op; None for all of `tuned.CONFIGS`.
    """
    rows: dict[str, Resources] = {}
    for op, classes in ({op: shape_classes(op) for op in CONFIGS} if ops is None else ops).items():
        for shape_class in classes:
            seen: set[Compiled] = set()
            for case in CASES[op]:
                for launch in launches_of(op, shape_class, case):
                    if (kernel := compile(launch)) not in seen:
                        seen.add(kernel)
                        key = f"{op}/{shape_class}/{case}/{launch.name}"
                        rows[f"{key} 2" if key in rows else key] = measure(kernel, launch)
    return rows


def shape_classes(op: str) -> list[str]:
    """The shape classes of all passes of an op."""
    return list(dict.fromkeys(shape_class for classes in CONFIGS[op].values() for shape_class in classes))


def launches_of(op: str, shape_class: str, case: str) -> list[Launch]:
    """What the op's host code launches, forward and backward, in one of its cases."""
    kind, bound = shape_class.split()
    with launches(recorded()) as record:
        CASES[op][case]({"half": torch.bfloat16, "float": torch.float32}[kind], int(bound))
    return record.launches


# --- the ops ---


def _perceiver_attention(images: int, dtype: torch.dtype, head_dim: int) -> None:
    from idefics2_fast.kernels.perceiver_attention_triton import attend

    latents, heads, kv_heads, patches = 64, 16, 4, 4900
    q = torch.zeros(images * latents, heads, head_dim, dtype=dtype, requires_grad=True)
    of_context = torch.zeros(images * patches, 3, 2, kv_heads, head_dim, dtype=dtype)[:, 1].requires_grad_()
    of_latents = torch.zeros(images * latents, 2, kv_heads, head_dim, dtype=dtype, requires_grad=True)
    out = attend(q, *of_context.unbind(1), *of_latents.unbind(1), Segments.of_lengths([patches] * images), scale=head_dim**-0.5)
    out.sum().backward()


def _segment_attention(causal: bool, dtype: torch.dtype, head_dim: int) -> None:
    from idefics2_fast.kernels.segment_attention_triton import attend

    lengths, heads, kv_heads, window = ([4900, 300], 32, 8, 4096) if causal else ([4900, 300], 16, 16, None)
    qkv = torch.zeros(sum(lengths), heads + 2 * kv_heads, head_dim, dtype=dtype, requires_grad=True)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], 1)
    attend(q, k, v, Segments.of_lengths(lengths), causal=causal, window=window, scale=head_dim**-0.5).sum().backward()


def _perceiver_context(dtype: torch.dtype, width: int) -> None:
    from idefics2_fast.kernels.perceiver_context_triton import project

    patches, width, outs = 4900, min(width, 4096), 3 * 2 * 4 * 96
    x = torch.zeros(patches, width, dtype=dtype, requires_grad=True)
    project(x, torch.zeros(outs, width, dtype=dtype, requires_grad=True), 1e-5).sum().backward()


def _dora_linear(dtype: torch.dtype, rank: int) -> None:
    from idefics2_fast.kernels.dora_linear_triton import project

    rows, width, rank = 8192, 1024, min(rank, 128)
    x, b = torch.zeros(rows, width, dtype=dtype, requires_grad=True), torch.zeros(width, rank, requires_grad=True)
    a, magnitude = torch.zeros(rank, width, requires_grad=True), torch.zeros(width, requires_grad=True)
    project(x, torch.zeros(width, width, dtype=dtype), a, b, magnitude, torch.zeros(width, dtype=dtype), scaling=0.25).sum().backward()


def _embedding(noisy: bool, dtype: torch.dtype, width: int) -> None:
    from idefics2_fast.kernels.embedding import Noise
    from idefics2_fast.kernels.embedding_triton import embedding

    tokens, vocabulary, images, width = 256, 128, 64, min(width, 4096)
    weights = torch.zeros(vocabulary, width, dtype=dtype, requires_grad=True)
    features = torch.zeros(images, width, dtype=dtype, requires_grad=True)
    noise = Noise.of(Segments.of_lengths([tokens]), alpha=5.0, seed=1, step=2) if noisy else None
    embedding(torch.arange(tokens) % vocabulary, weights, features, torch.arange(images), noise).sum().backward()


def _linear_cross_entropy(gradient: bool, dtype: torch.dtype, classes: int) -> None:
    from idefics2_fast.kernels.linear_cross_entropy_triton import room, softmax

    rows, classes = 4, min(classes, 1 << 17) - 765  # 32003, and other numbers that no power of two divides
    logits = room(torch.zeros(0), classes, rows, dtype).zero_()
    softmax(logits, torch.zeros(rows, dtype=torch.int64), None, -100, 0.0, gradient)


Case = Callable[[torch.dtype, int], None]

# op -> its cases: host code run for a dtype and the bound of a shape class
CASES: dict[str, dict[str, Case]] = {
    "segment_attention": {"images": partial(_segment_attention, False), "text": partial(_segment_attention, True)},
    "perceiver_attention": {"1 image": partial(_perceiver_attention, 1), "8 images": partial(_perceiver_attention, 8)},
    "perceiver_context": {"1 image": _perceiver_context},
    "dora_linear": {"1024 columns": _dora_linear},
    "embedding": {"plain": partial(_embedding, False), "noise": partial(_embedding, True)},
    "linear_cross_entropy": {"training": partial(_linear_cross_entropy, True), "evaluation": partial(_linear_cross_entropy, False)},
}


# --- what is wanted ---


@dataclass(frozen=True)
class Design:
    """What a kernel is meant to be.

    Attributes:
        products: by the config, n of the tensor-core products m64 n* k16 that half precision takes.
        narrow: loads of less than 16 bytes that the hot loop may have, each of them one for a whole row: an index, a length, a statistic.
        ctas, or_warps: CTAs that a multiprocessor must hold, or, if it holds fewer, the warps of each.
    """

    products: Callable[[Mapping[str, int]], set[int]] = lambda config: set()
    narrow: Callable[[Resources], int] = lambda row: 0
    ctas: int = 1
    or_warps: int = 0


def product_columns(rows: int, columns: Sequence[int], num_warps: int) -> set[int]:
    """n of the products of tiles [rows, columns]: four warps take 64 rows; warps beyond those share the columns."""
    across = max(1, num_warps // 4 // max(1, rows // 64))
    return {min(256, n // across) for n in columns}


def _rows_in_place(config: Mapping[str, int]) -> set[int]:
    return product_columns(config["BM"], [config["BN"], config["D1"], config["D2"]], config["num_warps"])


def _keys_in_place(config: Mapping[str, int]) -> set[int]:
    return product_columns(config["BN"], [config["BM"], config["D1"], config["D2"]], config["num_warps"])


def _matrix(config: Mapping[str, int]) -> set[int]:
    return product_columns(config["BM"], [config["BN"]], config["num_warps"])


def _half_matrix(config: Mapping[str, int]) -> set[int]:
    """A product in fp32 beside those in half precision has tiles of fewer rows."""
    return _matrix(config) if config["BM"] >= 64 else set()


DESIGNS = {
    "segment_attention/_forward": Design(products=_rows_in_place, ctas=2, or_warps=8),
    "segment_attention/_deltas": Design(),
    "segment_attention/_backward_q": Design(products=_rows_in_place, ctas=2, or_warps=8),
    # lse and delta of a block's rows; tiles of so few columns that a thread has no 16 bytes of them: the second pieces of q and grad
    "segment_attention/_backward_kv": Design(
        products=_keys_in_place,
        narrow=lambda row: 2 + 2 * (row.config["BM"] * row.config["D2"] < 8 * 32 * row.config["num_warps"]),
        ctas=2,
    ),
    "perceiver_attention/_forward": Design(products=_rows_in_place, ctas=2, or_warps=8),
    # A split is a turn of the loop, and has one lse a row; where there is one split there is no loop.
    "perceiver_attention/_combine": Design(narrow=lambda row: 1 if row.hot == "loop" else row.config["BM"]),
    "perceiver_attention/_deltas": Design(),
    "perceiver_attention/_backward_q": Design(products=_rows_in_place),
    "perceiver_attention/_backward_kv": Design(products=_keys_in_place),
    "perceiver_attention/_sum_splits": Design(),
    "perceiver_context/_rstd": Design(),
    "perceiver_context/_forward": Design(products=_matrix),
    "perceiver_context/_backward_rows": Design(),
    "perceiver_context/_backward_x": Design(products=_matrix),
    "perceiver_context/_backward_weight": Design(products=_matrix),
    "dora_linear/_square": Design(),
    "dora_linear/_cross": Design(products=_matrix),
    "dora_linear/_norm": Design(),
    "dora_linear/_forward": Design(products=_matrix),
    "dora_linear/_backward_gain": Design(),
    "dora_linear/_backward_lost": Design(narrow=lambda row: row.config["BM"]),
    "dora_linear/_backward_x": Design(products=_matrix),
    "dora_linear/_outer": Design(products=_half_matrix),
    "embedding/embedding_forward": Design(narrow=lambda row: 3),
    "embedding/embedding_table_grad": Design(narrow=lambda row: row.config["ROWS"]),
    "linear_cross_entropy/_softmax": Design(narrow=lambda row: 2),
}
MORE_INSTRUCTIONS = 1.1  # of those recorded, before it counts as a fault


def faults(key: str, row: Resources, before: Resources | None = None) -> list[str]:
    """What is wrong with a kernel of `table`, in words: nothing where it is as designed, and no longer than `before`."""
    op, shape_class, _, kernel = key.split("/")
    design = DESIGNS[f"{op}/{kernel.split()[0]}"]
    wanted = {f"64x{n}x16" for n in design.products(row.config)} if shape_class.startswith("half") else set()
    narrow = sum(count for width, count in row.loads.items() if int(width) < 16)
    found = []
    if row.spills or row.stack:
        found.append(f"{row.spills} instructions spill, {row.stack} bytes of stack")
    if set(row.products) != wanted:
        found.append(f"products of {sorted(row.products)}, designed {sorted(wanted)}")
    if narrow > design.narrow(row):
        found.append(f"{narrow} loads of less than 16 bytes in the hot loop, designed {design.narrow(row)}: {row.loads}")
    if row.ctas < design.ctas and row.config["num_warps"] < max(1, design.or_warps):
        found.append(f"{row.ctas} CTAs of {row.config['num_warps']} warps on a multiprocessor, designed {design.ctas}")
    if before and row.instructions > MORE_INSTRUCTIONS * before.instructions:
        found.append(f"{row.instructions} instructions in the hot loop, {before.instructions} before")
    return [f"{key}: {fault}" for fault in found]


def recorded_table() -> tuple[str, dict[str, Resources]]:
    """The version of Triton that made the committed table, and the table."""
    record = json.loads(RESULTS.read_text())
    return record["triton"], {key: Resources(**row) for key, row in record["kernels"].items()}


def markdown(rows: Mapping[str, Resources]) -> str:
    """The table for people."""
    lines = [
        "| op, shape class, case | kernel | config | registers | shared KB | CTAs an SM | products | hot loop | its loads |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for key, row in rows.items():
        *place, kernel = key.split("/")
        config = " ".join(f"{name}={value}" for name, value in row.config.items())
        products = " ".join(f"{shape}:{count}" for shape, count in row.products.items()) or "-"
        loads = " ".join(f"{count}x{width}B" for width, count in row.loads.items()) or "-"
        cells = (
            ", ".join(place),
            f"`{kernel}`",
            config,
            row.registers,
            f"{row.shared / 1024:.0f}",
            row.ctas,
            products,
            row.instructions,
            loads,
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """Prints the table and what is wrong with it; `--write` records it."""
    rows = table()
    print(markdown(rows))
    for fault in (fault for key, row in rows.items() for fault in faults(key, row)):
        print(fault)
    if "--write" in arguments:
        record = {"triton": triton.__version__, "kernels": {key: asdict(row) for key, row in rows.items()}}
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
