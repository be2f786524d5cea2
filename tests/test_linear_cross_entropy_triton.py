"""The softmax kernel of the answer-only cross-entropy: interpreted in fp32 and fp64, and its Hopper code executed on the CPU in bf16."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.kernels import check_deterministic, check_fake, check_fork, check_fullgraph, check_operator
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from idefics2_fast import doctor, ops
from idefics2_fast.benchmarks.sm90.faults import OutOfBounds
from idefics2_fast.benchmarks.sm90.launches import chosen, compile, executed, interpreted, launches, recorded
from idefics2_fast.kernels import linear_cross_entropy
from idefics2_fast.kernels import linear_cross_entropy_triton as ours
from idefics2_fast.kernels.linear_cross_entropy import IGNORED, chunked, reference
from idefics2_fast.kernels.linear_cross_entropy_triton import fused, room, softmax

HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64
RELATIVE = {DOUBLE: 1e-12, SINGLE: 1e-6}
ROUNDING = 2  # a kernel in half precision may err so many times as much as PyTorch in the same precision


def draw(rows: int, width: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden rows, a head whose logits are of size 2, targets of which every fifth does not count."""
    generator = torch.Generator().manual_seed(rows + 31 * classes)
    hidden = torch.randn(rows, width, generator=generator, dtype=DOUBLE).to(dtype)
    weight = (torch.randn(classes, width, generator=generator, dtype=DOUBLE) * 2 / width**0.5).to(dtype)
    targets = torch.randint(0, classes, (rows,), generator=generator)
    targets[4::5] = IGNORED
    return hidden, weight, targets


def run(function, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, **arguments) -> dict[str, Tensor]:
    """The sum and both gradients, computed in `dtype`."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight)]
    total, count = function(*leaves, targets, **arguments)
    assert count == (targets != IGNORED).sum()
    grads = torch.autograd.grad(total * 0.7, leaves)
    return {"sum": total.detach(), "hidden": grads[0], "weight": grads[1]}


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item() if expected.numel() else 0.0


def blocks_of(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(ours, "config", lambda *_: {"BLOCK": size, "num_warps": 4, "num_stages": 1})


def logits_of(z: Tensor) -> Tensor:
    """Rows of logits [r, V] where the kernel wants them, poison between them."""
    logits = room(z, z.shape[1], z.shape[0], z.dtype)
    logits.T.copy_(z)
    return logits


# --- in the interpreter ---


@settings(max_examples=10, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 3, 18]),
    classes=st.integers(1, 100),
    block=st.sampled_from([16, 64, 128]),
    weighted=st.booleans(),
    z_loss=st.sampled_from([0.0, 0.1]),
    trained=st.sampled_from([(True, True), (True, False), (False, True)]),
)
def test_sum_and_gradients_are_the_formulas(rows, classes, block, weighted, z_loss, trained):
    """One block or many, one chunk or several, and only the gradients that are wanted."""
    arguments = {"row_weights": torch.linspace(0, 2, rows) if weighted else None, "z_loss": z_loss}
    for dtype, relative in RELATIVE.items():
        *operands, targets = draw(rows, 24, classes, dtype)
        given_ = [x.requires_grad_(on) for x, on in zip(operands, trained, strict=True)]
        exact = [x.detach().double().requires_grad_(on) for x, on in zip(operands, trained, strict=True)]
        with pytest.MonkeyPatch.context() as patch, launches(interpreted()):
            blocks_of(patch, block)
            patch.setitem(linear_cross_entropy.LOGITS, "cpu", 16 * classes)
            actual, count = fused(*given_, targets, **arguments)
        expected, _ = reference(*exact, targets, **arguments)
        assert count == (targets != IGNORED).sum()
        assert error(actual, expected) <= relative
        (actual * 3).backward()
        (expected * 3).backward()
        for x, y, on in zip(given_, exact, trained, strict=True):
            assert (x.grad is None) == (not on)
            assert not on or error(x.grad, y.grad) <= 2 * relative


@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:All-NaN slice encountered")  # NaN in a row that does not count
@pytest.mark.parametrize("block", [16, 256])
@pytest.mark.parametrize("dtype", RELATIVE)
def test_each_row(monkeypatch, dtype, block):
    """Losses, lse and gradients of rows with logits of size 1, of 3000, with the largest at the end, and of rows that do not count."""
    blocks_of(monkeypatch, block)
    z = torch.randn(6, 97, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    z[1] *= 3000
    z[2] -= 3000
    z[5, 96] += 20
    targets, weights = torch.tensor([5, 96, 0, 31, IGNORED, 32]), torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0, 3.0])
    z = z.to(dtype)
    exact = z.double().clone().requires_grad_()
    lse = exact.logsumexp(1)
    expected = weights * (lse - exact.gather(1, targets.clamp(min=0)[:, None])[:, 0] + 0.1 * lse**2) * (targets != IGNORED)
    expected.sum().backward()
    z[4] = torch.nan
    logits = logits_of(z)
    with launches(interpreted()):
        losses, of_rows = softmax(logits, targets, weights, IGNORED, 0.1, True)
    assert losses.dtype == of_rows.dtype == dtype
    for row in range(6):
        if row != 4:
            assert error(of_rows[row], lse[row]) <= RELATIVE[dtype]
        assert error(losses[row], expected[row]) <= RELATIVE[dtype]
        assert error(logits[:, row], exact.grad[row]) <= (3000 if row in (1, 2) else 1) * RELATIVE[dtype]


def test_without_gradients_logits_stay():
    z = torch.randn(3, 70)
    logits = logits_of(z)
    with launches(interpreted()):
        softmax(logits, torch.tensor([1, 2, 3]), None, IGNORED, 0.0, False)
    assert torch.equal(logits.T, z)


@pytest.mark.parametrize("classes", [32003, 33000])
def test_the_models_vocabulary(classes):
    """V = 32003 in one block, as shipped, and more classes than one block takes."""
    for dtype, relative in RELATIVE.items():
        z = torch.randn(2, classes, generator=torch.Generator().manual_seed(0), dtype=DOUBLE).to(dtype)
        logits, targets = logits_of(z), torch.tensor([classes - 1, 7])
        with launches(interpreted()):
            losses, _ = softmax(logits, targets, None, IGNORED, 0.0, True)
        exact = z.double().clone().requires_grad_()
        expected = torch.nn.functional.cross_entropy(exact, targets, reduction="none")
        expected.sum().backward()
        assert error(losses, expected) <= relative
        assert error(logits.T, exact.grad) <= relative


# --- what surrounds it ---


def arguments_of(rows: int = 5, dtype: torch.dtype = SINGLE) -> tuple:
    hidden, weight, targets = draw(rows, 8, 70, dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def of_sum(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return fused(hidden, weight, targets)[0].view(1) / 3


def test_the_operator_is_well_formed():
    with launches(interpreted()):
        check_operator(ours._forward, (*arguments_of(dtype=DOUBLE), None, IGNORED, 0.0, DOUBLE, True, True))
        check_fullgraph(of_sum, arguments_of())
        check_deterministic(of_sum, arguments_of())
        check_fake(of_sum, arguments_of())
        check_fork(of_sum, arguments_of())


def test_operands_in_another_layout():
    hidden, weight, targets = arguments_of(dtype=DOUBLE)
    expected = run(reference, hidden, weight, targets, DOUBLE)
    with launches(interpreted()):
        for permuted in ((hidden.detach().T.contiguous().T, weight), (hidden, weight.detach().T.contiguous().T)):
            actual = run(fused, *permuted, targets.repeat_interleave(2)[::2], DOUBLE)
            assert all(error(actual[name], expected[name]) <= 1e-12 for name in expected)


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """Names of the operators that ran, and the largest tensor that one returned."""

    def __init__(self) -> None:
        super().__init__()
        self.names, self.largest = set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.names.add(function.overloadpacket._qualified_op_name)
        sizes = (x.untyped_storage().nbytes() // x.itemsize for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, Tensor))
        self.largest = max(self.largest, *sizes, 0)
        return out


def test_nothing_waits_for_the_device_and_logits_exist_for_one_chunk(monkeypatch):
    """16 of 70 rows at a time, between which no number comes back to the host."""
    monkeypatch.setitem(linear_cross_entropy.LOGITS, "cpu", 16 * 97)
    hidden, weight, targets = draw(70, 12, 97, SINGLE)
    with torch.no_grad(), launches(recorded()) as record, Calls() as calls:
        ours._forward._init_fn(hidden, weight, targets, torch.ones(70), IGNORED, 0.1, SINGLE, True, True)
    assert len(record.launches) == 5
    assert calls.largest == 16 * 128, "a chunk's rows of 97 logits and their padding"
    assert not {name for name in calls.names if any(word in name for word in ("local_scalar", "item", "nonzero", "masked_select"))}


def test_ops_takes_it_on_a_gpu(monkeypatch):
    monkeypatch.setattr(ops, "_trusted", lambda op: True)
    ops._preferred.cache_clear()
    try:
        assert ops._preferred("linear_cross_entropy", "cuda", HALF, 4096) == "triton"
        assert ops._preferred("linear_cross_entropy", "cpu", HALF, 4096) == "chunked"
    finally:
        ops._preferred.cache_clear()
    with ops.using(linear_cross_entropy="triton"), launches(interpreted()) as run_:
        ops.linear_cross_entropy(*arguments_of())
    assert run_ is not None


def test_the_doctor_finds_it_right():
    with launches(interpreted()):
        assert doctor.check("linear_cross_entropy", "cpu", SINGLE).problem == ""


# --- Hopper code ---

# rows, width, classes
SHAPES = [
    (7, 64, 97),
    (1, 16, 1),
    (3, 32, 4095),
    (2, 64, 32003),
    (5, 64, 4097),
    (17, 128, 1000),
    (2, 16, 32768),
    (1, 16, 32769),
    (2, 16, 50000),
    (33, 64, 64),
    (19, 256, 333),
    (1, 8, 127491),
    (40, 48, 2049),
]


def half_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, whose products are in the operands' dtype."""
    product_dtype = lambda hidden, weight: torch.promote_types(hidden.dtype, weight.dtype)  # noqa: E731
    monkeypatch.setattr(linear_cross_entropy, "_product_dtype", product_dtype)


@pytest.mark.parametrize(
    ("rows", "width", "classes"), [pytest.param(*s, marks=() if s in SHAPES[:4] else pytest.mark.slow) for s in SHAPES]
)
def test_hopper_code(monkeypatch, rows, width, classes):
    """Weights and z-loss on; with the rounding of bf16 logits and gradients, which PyTorch's path has as well, and nothing beyond it."""
    half_products(monkeypatch)
    *operands, targets = draw(rows, width, classes, HALF)
    arguments = {"row_weights": torch.linspace(0.5, 2, rows), "z_loss": 0.01}
    exact = run(reference, *operands, targets, DOUBLE, **arguments)
    plain = run(chunked, *operands, targets, HALF, **arguments)
    with launches(executed()):
        actual = run(fused, *operands, targets, HALF, **arguments)
    for name, expected in exact.items():
        allowed = ROUNDING * max(error(plain[name], expected), torch.finfo(SINGLE).eps)
        assert error(actual[name], expected) <= allowed, f"{name}: {error(actual[name], expected):.1e} of {allowed:.1e}"


def executed_once(rows: int, classes: int, gradient: bool = True, weighted: bool = False, dtype: torch.dtype = HALF) -> executed:
    z = torch.randn(rows, classes, generator=torch.Generator().manual_seed(0)).to(dtype)
    weights = torch.ones(rows) if weighted else None
    with launches(executed()) as run_:
        softmax(logits_of(z), torch.arange(rows), weights, IGNORED, 0.0, gradient)
    return run_


@pytest.mark.parametrize("gradient", [True, False])
def test_logits_are_read_once_and_written_once(gradient):
    """The least that there is for V = 32003: within 1.1 x of it, indices included that every thread of a row reads; whole vectors."""
    rows = 2
    (counts,) = executed_once(rows, 32003, gradient, weighted=True).counts
    least = rows * (2 * 32003 * (2 if gradient else 1) + 8 + 4 + 2 + 8)
    assert least <= counts.bytes() <= (1.1 if gradient else 1.15) * least
    assert counts.bytes(argument="logits") <= 1.02 * rows * 2 * 32003 * (2 if gradient else 1)
    whole = sum(size for (_, name, width), size in counts.requested.items() if name == "logits" and width == 16)
    assert whole >= rows * 2 * 32003 * (2 if gradient else 1)


def test_the_machine_code():
    """No spills, a row's loads and stores of 16 bytes."""
    for dtype in (HALF, SINGLE):
        with launches(recorded()) as record:
            softmax(room(torch.empty(0), 32003, 4, dtype), torch.zeros(4, dtype=torch.int64), None, IGNORED, 0.0, True)
        kernel = compile(record.launches[0])
        assert kernel.stack == 0
        assert "STL" not in kernel.sass
        whole = 32768 * dtype.itemsize // 16 // (32 * kernel.num_warps)
        assert (kernel.sass.count("LDG.E.128"), kernel.sass.count("STG.E.128")) == (whole, whole)


def test_offsets_are_of_64_bits():
    """Row 2^20 of 4096 columns is not there. An offset of 32 bits would come round to row 0, which is."""
    far, row = 2**20, torch.zeros(1, 4096, dtype=HALF)
    targets, out = torch.zeros(far + 1, dtype=torch.int64), torch.zeros(2, far + 1)
    settings_ = {"IGNORED": IGNORED, "Z_LOSS": 0.0, "GRADIENT": True, "V": 4096, "PITCH": 4096, "WIDE": ours.tl.float32}
    tiles = {"BLOCK": 4096, "num_warps": 4, "num_stages": 1}
    with launches(executed(lambda _: [(far, 0, 0)])), pytest.raises(OutOfBounds):
        ours._softmax[(far + 1,)](row, targets, None, *out.unbind(), **settings_, **tiles, enable_fp_fusion=True)


@pytest.mark.slow
def test_hopper_code_gives_the_same_bits_twice():
    *operands, targets = draw(7, 64, 97, HALF)
    with launches(executed()):
        first, second = (run(fused, *operands, targets, HALF) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_hopper_code_in_full_size(monkeypatch):
    """Rows of 2048 x 32003 logits, those of `chosen` CTAs: fp32's error in losses and lse, one rounding to bf16 in the gradient."""
    z = torch.randn(2048, 32003, generator=torch.Generator().manual_seed(0)).to(HALF)
    targets, logits, picked = torch.arange(2048) * 15, logits_of(z), chosen(4)
    with launches(executed(picked)) as run_:
        losses, lse = softmax(logits, targets, None, IGNORED, 0.0, True)
    rows = torch.tensor([x for x, _, _ in picked(run_.launches[0])])
    exact = z[rows].double()
    expected = exact.softmax(1) - torch.nn.functional.one_hot(targets[rows], 32003)
    assert error(lse[rows], exact.logsumexp(1)) <= 1e-6
    assert error(losses[rows], exact.logsumexp(1) - exact.gather(1, targets[rows, None])[:, 0]) <= 1e-6
    assert error(logits.T[rows], expected) <= torch.finfo(HALF).eps / 4


@pytest.mark.cuda
@pytest.mark.parametrize(("rows", "width", "classes"), [(7, 64, 97), (301, 1152, 32003), (2048, 4096, 32003), (4, 64, 127491)])
def test_on_a_card(rows, width, classes):
    *operands, targets = draw(rows, width, classes, HALF)
    moved = [x.cuda() for x in (*operands, targets)]
    exact = run(partial(reference, z_loss=0.01), *moved, DOUBLE)
    plain = run(partial(chunked, z_loss=0.01), *moved, HALF)
    actual, again = (run(partial(fused, z_loss=0.01), *moved, HALF) for _ in range(2))
    for name, expected in exact.items():
        assert torch.equal(actual[name], again[name])
        assert error(actual[name], expected) <= ROUNDING * max(error(plain[name], expected), torch.finfo(SINGLE).eps)
