"""Launches of Triton kernels taken from a card that is not there: recorded, interpreted, or compiled for Hopper and executed on the CPU.

    with launches(executed()) as run:
        out = host_function(x)      # kernel[grid](...) inside: the compiled sm_90a code ran, `out` holds its result
    run.counts                      # one for each launch

The host function is called as it stands, with tensors on the CPU. Inside the block memory from `torch.empty` and its kin is filled with NaN
(integers: the largest), so that what a kernel forgets to write, or reads before it is written, shows in the result.
"""

from __future__ import annotations

import itertools
import math
import random
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import BaseBackend, GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction, create_function_from_signature

from idefics2_fast.benchmarks.sm90.counters import Counts
from idefics2_fast.benchmarks.sm90.machine import execute

SM90 = GPUTarget("cuda", 90, 32)
CANARY = 1 << 16  # bytes on either side of a buffer: four fp32 rows of 4096 columns
# NaN, and no index of a row. In fp32 and fp64 a signalling NaN: arithmetic on it gives other bits, so that a store of the result shows.
POISON = {torch.float32: -0x400001, torch.float64: -0x8000000000001}

Handler = Callable[["Launch"], None]


@dataclass(frozen=True, eq=False)
class Launch:
    """`kernel[grid](*arguments, **constexprs, **options)`, the arguments bound by name, defaults filled in."""

    kernel: JITFunction
    grid: tuple[int, int, int]
    arguments: Mapping[str, Any]
    constexprs: Mapping[str, Any]
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.arguments.items() if isinstance(value, Tensor)}


@contextmanager
def launches(handler: Handler) -> Iterator[Any]:
    """Hands every launch of a Triton kernel inside the block to `handler`, in all threads, and yields the handler.

    Raises:
        ValueError: a launch with an argument that is neither a tensor nor a number.
    """

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        assert not warmup, "a launch, not a warm-up"
        handler(_bind(kernel, grid, args, kwargs))

    was_deterministic, launch_on_card = torch.are_deterministic_algorithms_enabled(), JITFunction.run
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty
    JITFunction.run = run
    try:
        yield handler
    finally:
        JITFunction.run = launch_on_card
        torch.use_deterministic_algorithms(was_deterministic)


def _bind(kernel: JITFunction, grid: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Launch:
    options = {name: value for name, value in kwargs.items() if name not in kernel.arg_names}
    bound = kernel.signature.bind(*args, **{name: value for name, value in kwargs.items() if name in kernel.arg_names})
    bound.apply_defaults()
    constexprs = {parameter.name: bound.arguments[parameter.name] for parameter in kernel.params if parameter.is_constexpr}
    arguments = {name: value for name, value in bound.arguments.items() if name not in constexprs}
    for name, value in arguments.items():
        if not (value is None or isinstance(value, Tensor | int | float)):
            raise ValueError(f"{kernel.fn.__name__}: {name} is a {type(value).__name__}: expected a tensor, a number or None")
    grid = tuple(grid(bound.arguments) if callable(grid) else grid)
    return Launch(kernel, (*grid, 1, 1)[:3], arguments, constexprs, options)


# --- compiled ---


@dataclass(frozen=True, eq=False)
class Compiled:
    """A kernel as `ptxas` left it. `parameters`: name -> type of those it has in PTX; what Triton made a constant is not one."""

    name: str
    ptx: str
    cubin: bytes
    parameters: Mapping[str, str]
    shared: int
    num_warps: int

    @cached_property
    def sass(self) -> str:
        """The machine code, disassembled."""
        return _read_cubin(self.cubin, "nvdisasm", "-c")

    @cached_property
    def registers(self) -> int:
        """Registers of a thread."""
        return self._usage("REG")

    @cached_property
    def stack(self) -> int:
        """Bytes of a thread's stack: 0 where nothing spills."""
        return self._usage("STACK")

    def _usage(self, field: str) -> int:
        return int(re.search(rf"\b{field}:(\d+)", _read_cubin(self.cubin, "cuobjdump", "-res-usage"))[1])


def _read_cubin(cubin: bytes, tool: str, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        program = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
        done = subprocess.run([program, option, file.name], check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.stdout


_compiled: dict[tuple[str, str, GPUTarget], Compiled] = {}


def compile(launch: Launch, target: GPUTarget = SM90) -> Compiled:
    """The launch's kernel for `target`, specialised as by Triton's launcher: for multiples of 16 among pointers and integers, and for 1.

    Raises:
        KeyError: an option that Triton does not know.
    """
    backend, bind = _binder(launch.kernel, target)
    given = {**launch.arguments, **launch.constexprs, **launch.options}
    bound, specialization, others = bind(**given)
    key = (launch.kernel.cache_key, str((specialization, sorted(launch.options.items()))), target)
    if key not in _compiled:
        options, signature, constexprs, attributes = launch.kernel._pack_args(backend, given, bound, specialization, others)
        source = ASTSource(launch.kernel, signature, constexprs, attributes)
        kernel = triton.compile(source, target=target, options=options.__dict__)
        parameters = {name: kind for name, kind in signature.items() if kind != "constexpr"}
        _compiled[key] = Compiled(
            launch.name, kernel.asm["ptx"], kernel.asm["cubin"], parameters, kernel.metadata.shared, kernel.metadata.num_warps
        )
    return _compiled[key]


@cache
def _binder(kernel: JITFunction, target: GPUTarget) -> tuple[BaseBackend, Callable[..., Any]]:
    backend = make_backend(target)
    return backend, create_function_from_signature(kernel.signature, kernel.params, backend)


# --- handlers ---


class recorded:
    """Collects the launches and runs none: outputs are poison."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def __call__(self, launch: Launch) -> None:
        self.launches.append(launch)


class executed:
    """Runs the compiled sm_90a code on the CPU, in the tensors' own memory. `counts`: what each launch did; `launches`: the launches.

    Args:
        ctas: which CTAs of a launch run, such as `chosen(8)`; None for all. The rest of the outputs stays poison.

    Raises:
        Fault: what `machine.execute` finds. A tensor that is still as `torch.empty` left it counts as never written.
    """

    def __init__(self, ctas: Callable[[Launch], Iterable[tuple[int, int, int]]] | None = None) -> None:
        self.ctas = ctas
        self.launches: list[Launch] = []
        self.counts: list[Counts] = []

    def __call__(self, launch: Launch) -> None:
        kernel = compile(launch)
        counts = execute(
            kernel.ptx,
            grid=launch.grid,
            arguments={name: _plain(launch.arguments[name]) for name in kernel.parameters},
            shared_bytes=kernel.shared,
            num_warps=kernel.num_warps,
            ctas=None if self.ctas is None else self.ctas(launch),
            unwritten=[name for name, tensor in launch.tensors.items() if name in kernel.parameters and _is_untouched(tensor)],
        )
        self.launches.append(launch)
        self.counts.append(counts)


def chosen(count: int, seed: int = 0) -> Callable[[Launch], list[tuple[int, int, int]]]:
    """For `executed`: the first CTA, the last, the corners between them, and others drawn by `seed`: up to `count`."""

    def choose(launch: Launch) -> list[tuple[int, int, int]]:
        corners = list(dict.fromkeys(itertools.product(*((0, size - 1) for size in launch.grid))))
        corners = [corners[0], corners[-1], *corners[1:-1]] if len(corners) > 1 else corners
        drawn = random.Random(seed).sample(range(math.prod(launch.grid)), min(count, math.prod(launch.grid)))
        x, y, _ = launch.grid
        return list(dict.fromkeys([*corners, *((at % x, at // x % y, at // (x * y)) for at in drawn)]))[:count]

    return choose


def _plain(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _is_untouched(tensor: Tensor) -> bool:
    """Whether all of it still is what `torch.empty` filled it with."""
    if tensor.numel() == 0 or tensor.dtype == torch.bool:
        return False
    return bool((tensor.isnan() if tensor.is_floating_point() else tensor == torch.iinfo(tensor.dtype).max).all())


class interpreted:
    """Triton's interpreter, without its environment variable: for fp32, fp64 and integers; it is wrong in bf16.

    Raises:
        ValueError: a bf16 tensor.
        AssertionError: the kernel wrote outside of its tensors. A read outside of them returns NaN, or -1.
    """

    def __call__(self, launch: Launch) -> None:
        for name, tensor in launch.tensors.items():
            if tensor.dtype == torch.bfloat16:
                raise ValueError(f"{launch.name}: {name} is bfloat16, in which Triton's interpreter is wrong: expected fp32 or fp64")
        with between_canaries(launch) as arguments, _kernels_as_python():
            run = interpreter.InterpretedFunction(launch.kernel.fn).run
            run(**arguments, **launch.constexprs, grid=launch.grid, warmup=False)


# Stands for a function that sees both modules of the language: the interpreter replaces the builtins of those that a function sees.
_SEES_ALL = SimpleNamespace(__globals__={"tl": triton.language, "core": triton.language.core})


@contextmanager
def _kernels_as_python() -> Iterator[None]:
    """Lets Triton's functions, those of its library and the kernels' helpers, call each other as Python."""

    def call(kernel: JITFunction, *args: Any, **kwargs: Any) -> Any:
        return interpreter.InterpretedFunction(kernel.fn).rewrite()(*args, **kwargs)

    call_outside, scope = JITFunction.__call__, interpreter._patch_lang(_SEES_ALL)
    JITFunction.__call__ = call
    try:
        with triton.knobs.runtime.scope():
            triton.knobs.runtime.interpret = True
            yield
    finally:
        JITFunction.__call__ = call_outside
        scope.restore()


# --- canaries ---


@contextmanager
def between_canaries(launch: Launch) -> Iterator[dict[str, Any]]:
    """The launch's arguments with every tensor moved: strided as it was, in memory of its own, poison around it and between its elements.

    Addresses keep their residue modulo 256; tensors whose memory overlaps (views of one buffer, in-place outputs) move together.
    Afterwards the tensors' elements are copied back.

    Raises:
        AssertionError: bytes outside of the tensors have changed.
    """
    places = [_Place(group, number) for number, group in enumerate(_overlapping(launch.tensors))]
    yield {**launch.arguments, **{name: tensor for place in places for name, tensor in place.moved.items()}}
    for place in places:
        place.give_back(launch.name)


def _overlapping(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    groups: list[dict[str, Tensor]] = []
    end = -1
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_ptr()):
        start, stop = _span(tensor)
        if start >= end:
            groups.append({})
        groups[-1][name] = tensor
        end = max(end, stop)
    return groups


def _span(tensor: Tensor) -> tuple[int, int]:
    """The addresses of the first byte and behind the last one."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (0 if tensor.numel() == 0 else (last + 1) * tensor.itemsize)


class _Place:
    """Memory for tensors that lie in one span of addresses, and poison of its own, so that a copy of another place's shows."""

    def __init__(self, tensors: Mapping[str, Tensor], number: int) -> None:
        self.tensors = tensors
        start = min(_span(tensor)[0] for tensor in tensors.values())
        stop = max(_span(tensor)[1] for tensor in tensors.values())
        (word,) = {_WORDS[tensor.itemsize] for tensor in tensors.values()}
        room = torch.empty(2 * CANARY + 512 + (stop - start + 255) // 256 * 256, dtype=torch.int8)
        shift = CANARY + (start - room.data_ptr() - CANARY) % 256 - start
        self.words, self.poison = room.view(word), POISON.get(next(iter(tensors.values())).dtype, -1) - number
        self.words.fill_(self.poison)
        self.moved = {name: self._move(tensor, shift) for name, tensor in tensors.items()}

    def _move(self, tensor: Tensor, shift: int) -> Tensor:
        offset = (tensor.data_ptr() + shift) // tensor.itemsize
        moved = self.words.as_strided(tensor.shape, tensor.stride(), offset).view(tensor.dtype)
        _elements(moved).copy_(_elements(tensor))
        return moved

    def give_back(self, kernel: str) -> None:
        for name, tensor in self.tensors.items():
            _elements(tensor).copy_(_elements(self.moved[name]))
        for moved in self.moved.values():
            _elements(moved).view(self.words.dtype).fill_(self.poison)
        changed = self.words != self.poison
        if changed.any():
            first, last = changed.nonzero()[[0, -1], 0].mul(self.words.itemsize).add(self.words.data_ptr()).tolist()
            near = ", ".join(f"{name} at {moved.data_ptr():#x} {list(moved.shape)}" for name, moved in self.moved.items())
            raise AssertionError(f"{kernel} wrote outside of its tensors, between {first:#x} and {last:#x} ({near})")


_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _elements(tensor: Tensor) -> Tensor:
    """The tensor without its broadcast axes, each element once."""
    once = [min(size, 1) if stride == 0 else size for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return tensor.detach().as_strided(once, tensor.stride())
