"""Answer-only linear cross-entropy against transformers' loss of full logits, and its formula in fp64."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from idefics2_fast import ops
from idefics2_fast.kernels import linear_cross_entropy
from idefics2_fast.kernels.linear_cross_entropy import answer_rows, chunked, reference

V = 97
# Relative, of sums of about 100 terms: the dtype's rounding times their growth. bf16 inputs are exact, and their products are in fp32.
LIMITS = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-6}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen rows at a time."""
    monkeypatch.setitem(linear_cross_entropy.LOGITS, "cpu", 16 * V)


def draw(rows: int, width: int = 24, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden rows, a head, targets of which every fifth does not count."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype)
    weight = (torch.randn(V, width, generator=generator, dtype=torch.float64) * 0.3).to(dtype)
    targets = torch.randint(0, V, (rows,), generator=generator)
    targets[4::5] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def close(actual: Tensor, expected: Tensor, relative: float) -> None:
    error = (actual.double() - expected.double()).abs().max().item() if expected.numel() else 0.0
    scale = expected.abs().max().item() if expected.numel() else 0.0
    assert error <= relative * scale, f"error {error:.2e} of {scale:.2e}, allowed {relative:.0e} relative"


def here(op: str) -> AbstractContextManager:
    """Lets an implementation run on a CPU: Triton's in its interpreter."""
    if op != "triton":
        return nullcontext()
    pytest.importorskip("triton", reason="Triton is not installed")
    from idefics2_fast.benchmarks.sm90.launches import interpreted, launches

    return launches(interpreted())


@pytest.mark.parametrize(
    ("op", "dtype"),
    [*(("chunked", dtype) for dtype in LIMITS), ("triton", torch.float64), pytest.param("triton", torch.float32, marks=pytest.mark.slow)],
)
@settings(max_examples=10, deadline=None)
@given(
    rows=st.integers(0, 60),
    weighted=st.booleans(),
    z_loss=st.sampled_from([0.0, 0.1]),
    upstream=st.sampled_from([1.0, 1 / 7, 1024.0]),
    trained=st.sampled_from([(True, True), (True, False), (False, True)]),
)
def test_sum_count_and_gradients_equal_the_formula(op, dtype, rows, weighted, z_loss, upstream, trained):
    hidden, weight, targets = draw(rows, dtype=dtype)
    arguments = {"row_weights": torch.linspace(0, 2, rows) if weighted else None, "z_loss": z_loss}
    exact = [tensor.detach().double().requires_grad_(on) for tensor, on in zip((hidden, weight), trained, strict=True)]
    given_ = [tensor.detach().requires_grad_(on) for tensor, on in zip((hidden, weight), trained, strict=True)]
    expected, count = reference(*exact, targets, **arguments)
    (expected * upstream).backward()
    with ops.using(linear_cross_entropy=op), here(op):
        actual, counted = ops.linear_cross_entropy(*given_, targets, **arguments)
    (actual * upstream).backward()
    assert counted.item() == count.item() == (targets != -100).sum()
    assert actual.dtype == torch.promote_types(dtype, torch.float32)
    close(actual, expected, LIMITS[dtype])
    for ours, theirs, on in zip(given_, exact, trained, strict=True):
        assert (ours.grad is None) == (not on)
        if on:
            assert ours.grad.dtype == dtype
            # Rounded once to the parameter's dtype, after the scaling.
            close(ours.grad, theirs.grad, max(LIMITS[dtype] * 2, torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0))


@pytest.mark.parametrize("op", ["triton", "chunked", "reference"])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("items", [None, 100])
def test_the_loss_is_transformers(op, shifted, items):
    """Padded batch, full logits, mean over the answers or sum over `num_items_in_batch`: loss and gradients."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 23, 24, generator=generator, requires_grad=True)
    weight = torch.randn(V, 24, generator=generator, requires_grad=True)
    labels = torch.randint(0, V, (2, 23), generator=generator)
    labels[:, :9] = labels[0, 15:] = -100
    arguments = {"shift_labels": labels} if shifted else {}
    expected = ForCausalLMLoss(F.linear(hidden, weight), labels, V, num_items_in_batch=items, **arguments)
    rows, targets = ops.answer_rows(hidden, labels, shifted=shifted)
    assert rows.shape[0] == (labels != -100).sum()
    with ops.using(linear_cross_entropy=op), here(op):
        total, count = ops.linear_cross_entropy(rows, weight, targets)
    actual = total / (count if items is None else items)
    close(actual, expected, 1e-6)
    for ours, theirs in zip(torch.autograd.grad(actual, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True):
        close(ours, theirs, 2e-6)


def test_the_first_token_is_not_predicted_by_the_row_before():
    labels = torch.tensor([[5, 6, -100], [7, -100, 8]])
    hidden = torch.arange(6.0).view(2, 3, 1)
    rows, targets = answer_rows(hidden, labels)
    assert (rows[:, 0].tolist(), targets.tolist()) == ([0.0, 4.0], [6, 8])
    rows, targets = answer_rows(hidden, labels, shifted=True, ignore_index=8)
    assert rows[:, 0].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_gradcheck():
    hidden, weight, targets = draw(19, width=5)
    weights = torch.linspace(0.5, 2, 19)
    assert torch.autograd.gradcheck(lambda h, w: chunked(h, w, targets, row_weights=weights, z_loss=0.1)[0], (hidden, weight))


def test_accumulated_steps_and_a_second_backward():
    """The same graph twice, and a sum over two batches, as gradient accumulation and retain_graph do."""
    hidden, weight, targets = draw(12)
    expected = torch.autograd.grad(reference(hidden, weight, targets)[0] / 5, (hidden, weight))
    parts = [chunked(hidden[part], weight, targets[part])[0] for part in (slice(0, 5), slice(5, 12))]
    loss = (parts[0] + parts[1]) / 5
    for _ in range(2):
        for ours, theirs in zip(torch.autograd.grad(loss, (hidden, weight), retain_graph=True), expected, strict=True):
            close(ours, theirs, 1e-13)


def test_a_gradient_of_the_gradient_is_refused():
    hidden, weight, targets = draw(5)
    (gradient,) = torch.autograd.grad(chunked(hidden, weight, targets)[0].square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_large_logits_and_rows_that_do_not_count():
    """Logits of a thousand stay finite; what stands in a row that does not count touches nothing."""
    hidden, weight, targets = draw(9)
    with torch.no_grad():
        hidden.mul_(1000)
    expected = reference(hidden, weight, targets)[0]
    (theirs,) = torch.autograd.grad(expected, hidden)
    with torch.no_grad():
        hidden[4] = torch.nan
    actual = chunked(hidden, weight, targets)[0]
    (ours,) = torch.autograd.grad(actual, hidden)
    assert expected.isfinite()
    close(actual, expected, 1e-13)
    close(ours[:4], theirs[:4], 1e-13)
    assert (ours[4] == 0).all()


def test_without_gradients_none_is_made(monkeypatch):
    made = []
    forward = linear_cross_entropy._forward
    monkeypatch.setattr(linear_cross_entropy, "_forward", lambda *given: made.append(given[-2:]) or forward(*given))
    hidden, weight, targets = draw(9)
    with torch.no_grad():
        chunked(hidden, weight, targets)
    chunked(hidden.detach(), weight.detach(), targets)
    assert chunked(hidden.detach(), weight, targets)[0].requires_grad
    assert made == [(False, False), (False, False), (False, True)]


def test_logits_exist_for_one_chunk_only():
    """The largest tensor made is a chunk's logits."""
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(tensor.numel() for tensor in torch.utils._pytree.tree_leaves(out) if isinstance(tensor, Tensor))
            return out

    hidden, weight, targets = draw(70, width=12)
    inside = linear_cross_entropy._forward._init_fn  # the op is opaque to modes
    with torch.no_grad(), Sizes():
        inside(hidden, weight, targets, None, -100, 0.0, torch.float64, True, True)
    assert max(sizes) == 16 * V


def test_autocast_multiplies_as_a_linear_layer_does():
    hidden, weight, targets = draw(16, dtype=torch.float32)
    expected = reference(hidden.double(), weight.double(), targets)[0]
    with torch.autocast("cpu", torch.bfloat16):
        actual = chunked(hidden, weight, targets)[0]
    actual.backward()
    assert actual.dtype == hidden.grad.dtype == torch.float32
    close(actual, expected, 1e-2)


def test_half_precision_units(monkeypatch):
    """Under autocast, where a device multiplies bf16 itself, products are bf16 and everything else fp32."""
    monkeypatch.setattr(linear_cross_entropy, "needs_upcast", lambda device, dtype: False)
    hidden, weight, targets = draw(16, dtype=torch.bfloat16)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    expected, _ = reference(*exact, targets)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_cross_entropy._product_dtype(hidden, weight) == torch.bfloat16
        actual, _ = chunked(hidden, weight, targets)
    expected.backward(), actual.backward()
    close(actual, expected, 2**-8)
    for ours, theirs in zip((hidden, weight), exact, strict=True):
        close(ours.grad, theirs.grad, 4 * 2**-8)


def test_the_op_is_well_formed_and_compiles():
    hidden, weight, targets = draw(10)
    torch.library.opcheck(linear_cross_entropy._forward, (hidden, weight, targets, None, -100, 0.0, torch.float64, True, True))
    compiled = torch.compile(lambda h, w: chunked(h, w, targets)[0] / 3, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(chunked(hidden, weight, targets)[0] / 3, (hidden, weight))
    for ours, theirs in zip(torch.autograd.grad(compiled(hidden, weight), (hidden, weight)), expected, strict=True):
        close(ours, theirs, 1e-13)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (([3, 4], [V, 5], [3], None), r"hidden \[3, 4\] and weight \[97, 5\], expected \[R, C\] and \[V, C\]"),
        (([1, 3, 4], [V, 4], [3], None), r"hidden \[1, 3, 4\]"),
        (([3, 4], [V, 4], [2], None), r"targets has shape \[2\], expected \[3\]"),
        (([3, 4], [V, 4], [3], [1]), r"row_weights has shape \[1\], expected \[3\]"),
    ],
)
@pytest.mark.parametrize("op", ["triton", "chunked", "reference"])
def test_shapes_that_do_not_belong_together_are_named(op, shapes, message):
    hidden, weight, targets, weights = (None if shape is None else torch.zeros(shape) for shape in shapes)
    with ops.using(linear_cross_entropy=op), here(op), pytest.raises(ValueError, match=message):
        ops.linear_cross_entropy(hidden, weight, targets.long(), row_weights=weights)


def test_labels_of_another_shape_are_named():
    with pytest.raises(ValueError, match=r"labels have shape \[2, 3\], expected \[2, 4\]"):
        answer_rows(torch.zeros(2, 4, 5), torch.zeros(2, 3, dtype=torch.int64))


def test_same_bits_twice():
    hidden, weight, targets = draw(64, dtype=torch.float32)
    bits = [torch.autograd.grad(chunked(hidden, weight, targets)[0], (hidden, weight)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*bits, strict=True))


def test_in_a_module_under_checkpointing():
    """Recomputed in the backward pass: the same gradients."""
    hidden, weight, targets = draw(12)
    norm = nn.LayerNorm(24, dtype=torch.float64)
    loss = lambda h, w: chunked(norm(h), w, targets)[0]  # noqa: E731
    expected = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    for reentrant in (True, False):
        again = torch.utils.checkpoint.checkpoint(loss, hidden, weight, use_reentrant=reentrant)
        hidden.grad = weight.grad = None
        again.backward()
        close(hidden.grad, expected[0], 1e-13)
        close(weight.grad, expected[1], 1e-13)


def test_two_or_three_rows_are_as_exact_as_many():
    """A product of few rows sums in another order, whose error is ten times as large."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(3, 64, generator=draw), torch.randn(32003, 64, generator=draw) / 8
    targets = torch.randint(0, 32003, (3,), generator=draw)
    gradients = []
    for dtype in (torch.float64, torch.float32):
        h = hidden.to(dtype).requires_grad_()
        linear_cross_entropy.chunked(h, weight.to(dtype), targets)[0].backward()
        gradients.append(h.grad.double())
    exact, ours = gradients
    assert (ours - exact).abs().max() <= 2e-6 * exact.abs().max()
