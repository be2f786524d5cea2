"""Whether the Triton kernels are right on this device: each is compared with its reference there, the first time that an op would use it.

A verdict belongs to a device, a driver, a version of torch and of Triton, and the kernels' own source; it is kept in a file in the user's
cache folder. A kernel that fails is not used: its op takes the next implementation, after one warning, or, under IDEFICS2_FAST_STRICT=1,
nothing runs. `idefics2-fast doctor` checks all kernels anew.

The rule: an output or gradient may be twice as far from the formula in fp64 as the same precision's PyTorch path is, or as rounding it is.

A kernel that reads where it must not ends CUDA for its process. Its verdict is kept all the same, so the next process does without it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from idefics2_fast import ops
from idefics2_fast.kernels.segments import Segments

IMPLEMENTATION = "triton"
STRICT = "IDEFICS2_FAST_STRICT"
TIMES_WORSE = 2.0
ROUNDING = 12**-0.5  # of a dtype's eps: the root mean square of what rounding changes, at most


@dataclass(frozen=True)
class Verdict:
    """Of one op's kernels. `problem` is empty where they are right; `seconds` the check took, compiling included."""

    op: str
    problem: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.op}: {self.problem or 'ok'} ({self.seconds:.1f} s)"


# --- the checks ---

Arguments = tuple[Sequence[Any], dict[str, Any]]


def _segment_attention(draw: Callable[..., Tensor]) -> Arguments:
    lengths, heads, head_dim = (301, 1, 70), 16, 72
    q, k, v = draw(sum(lengths), 3, heads, head_dim).unbind(1)
    return (q, k, v, Segments.of_lengths(lengths, device=q.device)), {"causal": False, "window": None, "scale": head_dim**-0.5}


def _perceiver_attention(draw: Callable[..., Tensor]) -> Arguments:
    lengths, latents, heads, kv_heads, head_dim = (301, 1, 70), 64, 16, 4, 96
    images = len(lengths)
    context, own = (draw(rows, 2, kv_heads, head_dim).unbind(1) for rows in (sum(lengths), images * latents))
    q = draw(images * latents, heads, head_dim)
    return (q, *context, *own, Segments.of_lengths(lengths, device=q.device)), {"scale": head_dim**-0.5}


def _perceiver_context(draw: Callable[..., Tensor]) -> Arguments:
    return (draw(301, 512), draw(384, 512), 1e-5), {}


def _dora_linear(draw: Callable[..., Tensor]) -> Arguments:
    rows, width, out, rank = 4300, 1024, 1000, 16  # enough of them that no product is the library's
    x, weight, a, b, magnitude, bias = (draw(*shape) for shape in ((rows, width), (out, width), (rank, width), (out, rank), (out,), (out,)))
    return (x, weight, a, b, magnitude * 32, bias), {"scaling": 0.5}  # about as large as the rows' norms


def _embedding(draw: Callable[..., Tensor]) -> Arguments:
    tokens, vocabulary, features = 101, 23, draw(20, 512)
    table = draw(vocabulary, 512)
    every = torch.arange(tokens, device=table.device)
    noise = ops.Noise.of(Segments.of_lengths([60, tokens - 60], device=table.device), alpha=5.0, seed=1, step=2)
    return (every * 7 % vocabulary, table, features, every[5:25], noise), {}


def _linear_cross_entropy(draw: Callable[..., Tensor]) -> Arguments:
    rows, classes = 70, 4099
    hidden, weight = draw(rows, 64), draw(classes, 64)
    targets = torch.arange(rows, device=hidden.device) * 61 % classes
    return (hidden, weight, targets.masked_fill(targets % 5 == 4, -100)), {"z_loss": 1e-3}


# op -> its arguments, the tensors of floats among them drawn by a function of their shape
CASES: dict[str, Callable[[Callable[..., Tensor]], Arguments]] = {
    "segment_attention": _segment_attention,
    "perceiver_attention": _perceiver_attention,
    "perceiver_context": _perceiver_context,
    "dora_linear": _dora_linear,
    "embedding": _embedding,
    "linear_cross_entropy": _linear_cross_entropy,
}


def check(op: str, device: torch.device | str, dtype: torch.dtype = torch.bfloat16) -> Verdict:
    """Compares the op's kernels with the formula, on `device`, forward and backward. Whatever goes wrong is the verdict's problem."""
    start = perf_counter()
    try:
        with _undisturbed():
            problem = _compare(op, torch.device(device), dtype)
    except Exception as error:  # of the compiler, the driver, the kernel: all mean that it cannot be used here
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return Verdict(op, problem, perf_counter() - start)


def _undisturbed() -> ExitStack:
    """Plain tensors and gradients, whatever the caller is in the middle of: inference mode, autocast, tracing with fake tensors."""
    stack = ExitStack()
    for context in (_disable_current_modes(), torch.inference_mode(False), torch.enable_grad()):
        stack.enter_context(context)
    for kind in ("cuda", "cpu"):
        stack.enter_context(torch.autocast(kind, enabled=False))
    return stack


def _compare(op: str, device: torch.device, dtype: torch.dtype) -> str:
    """What is wrong, in words."""
    rows = ops.IMPLEMENTATIONS[op]
    path = next(name for name, (runs, _) in rows.items() if name != IMPLEMENTATION and runs(device.type, dtype, 512))
    exact = _outputs(rows["reference"][1], op, device, dtype, torch.float64)
    usual = _outputs(rows[path][1], op, device, dtype, dtype)
    kernel = _outputs(rows[IMPLEMENTATION][1], op, device, dtype, dtype)
    for name, ours, theirs, truth in zip(_names(len(exact)), kernel, usual, exact, strict=True):
        error, allowed = _distance(ours, truth), TIMES_WORSE * max(_distance(theirs, truth), ROUNDING * torch.finfo(dtype).eps)
        if not error <= allowed:  # NaN as well
            return f"{name} is {error:.1e} from the formula, {path}'s {_distance(theirs, truth):.1e}"
    return ""


def _outputs(function: Callable[..., Tensor], op: str, device: torch.device, drawn: torch.dtype, dtype: torch.dtype) -> list[Tensor]:
    """The op's output and its gradients, for numbers drawn in `drawn` and computed with in `dtype`."""
    generator = torch.Generator().manual_seed(0)
    leaves: list[Tensor] = []

    def draw(*shape: int) -> Tensor:
        leaf = torch.randn(shape, generator=generator).to(drawn).to(device, dtype).requires_grad_()
        leaves.append(leaf)
        return leaf

    arguments, settings = CASES[op](draw)
    output = function(*arguments, **settings)
    output = output if isinstance(output, Tensor) else output[0]  # what comes with it has no gradient
    cotangent = torch.randn(output.shape, generator=generator).to(drawn).to(device, dtype)
    return [output.detach(), *torch.autograd.grad(output, leaves, cotangent)]


def _names(count: int) -> list[str]:
    return ["output", *(f"gradient {index}" for index in range(1, count))]


def _distance(x: Tensor, truth: Tensor) -> float:
    return float((x.double() - truth).norm() / truth.norm())


# --- verdicts kept ---


@torch.compiler.assume_constant_result
def installed(package: str) -> bool:
    """Whether a package can be imported here."""
    return _found(package)


@cache
def _found(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@torch.compiler.assume_constant_result
def trusts(op: str) -> bool:
    """Whether the op's kernels may be used on the current CUDA device: the kept verdict, or that of a check made now.

    Raises:
        RuntimeError: they are wrong here, and IDEFICS2_FAST_STRICT=1.
    """
    return judge(op, torch.device("cuda", torch.cuda.current_device()), strict=os.environ.get(STRICT) == "1")


@cache
def judge(op: str, device: torch.device, dtype: torch.dtype = torch.bfloat16, *, strict: bool = False) -> bool:
    """`trusts` for any device. Asks once in a process, so that it warns once."""
    verdict = kept(op, device) or keep(check(op, device, dtype), device)
    if not verdict.problem:
        return True
    message = f"the Triton kernels of {op} are wrong on this device, {verdict.problem}"
    if strict:
        raise RuntimeError(f"{message} ({STRICT} forbids another implementation)")
    warnings.warn(f"{message}: another implementation is used. See `idefics2-fast doctor`.", RuntimeWarning, stacklevel=2)
    return False


def kept(op: str, device: torch.device) -> Verdict | None:
    """The verdict of an earlier check on this machine."""
    record = _records().get(machine(op, device))
    return None if record is None else Verdict(**record)


def keep(verdict: Verdict, device: torch.device) -> Verdict:
    """Writes the verdict beside the others: the whole file or nothing of it."""
    try:
        cache_file().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=cache_file().parent, delete=False) as file:
            json.dump(_records() | {machine(verdict.op, device): asdict(verdict)}, file, indent=1)
        os.replace(file.name, cache_file())
    except OSError as error:
        warnings.warn(f"{cache_file()} cannot be written, so kernels are checked in every process: {error}", RuntimeWarning, stacklevel=2)
    return verdict


def cache_file() -> Path:
    """doctor.json in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "idefics2_fast" / "doctor.json"


def _records() -> dict[str, dict[str, Any]]:
    try:
        return json.loads(cache_file().read_text())
    except (OSError, ValueError):  # none yet, or one that cannot be read: as good as none
        return {}


def machine(op: str, device: torch.device) -> str:
    """What a verdict belongs to."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in ("torch", "triton"))
    return f"{op} on {name}, driver {_driver()}, {versions}, source {_source()}"


@cache
def _driver() -> str:
    version = Path("/proc/driver/nvidia/version")
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", version.read_text()) if version.exists() else None
    return found[0] if found else "unknown"


@cache
def _source() -> str:
    """A digest of the kernels' code: a change of it asks for new verdicts."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(ops.KERNELS).glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


# --- the command ---


def examine(op: str, device: torch.device | str = "cuda", dtype: torch.dtype = torch.bfloat16) -> Verdict:
    """Checks an op's kernels on a device, whatever was kept, and keeps the verdict."""
    return keep(check(op, device, dtype), torch.device(device))
