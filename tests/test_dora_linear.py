"""DoRA as a linear layer: against the formula in fp64, without a matrix of the weight's size, and red for what is wrong without a sound."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from idefics2_fast import ops
from idefics2_fast.kernels import dora_linear
from idefics2_fast.kernels.dora_linear import combine, factored, reference, row_norm, row_square

SCALING = 0.35
RANKS = [8, 16, 64, 128]


def tensors(rank: int = 8, *, bias: bool = True, out: int = 44, width: int = 36, rows: tuple[int, ...] = (3, 7), dropout: float = 0.0):
    """Everything that the layer has, fp64, of trained size: g differs from 1 and B from 0."""
    draw = torch.Generator().manual_seed(rank)
    normal = lambda *shape: torch.randn(shape, generator=draw, dtype=torch.float64)  # noqa: E731
    made = {"x": normal(*rows, width), "weight": normal(out, width), "a": normal(rank, width), "b": normal(out, rank) / rank}
    made |= {"magnitude": normal(out).abs() + 4, "bias": normal(out) if bias else None}
    kept = torch.rand(made["x"].shape, generator=draw) >= dropout
    made["dropped"] = made["x"] * kept / (1 - dropout) if dropout else None
    return made


def results(function, given: dict[str, Tensor | None], dtype: torch.dtype = torch.float64, **settings) -> dict[str, Tensor]:
    """The output and the gradients of all tensors, by name."""
    leaves = {name: value.detach().to(dtype, copy=True).requires_grad_() for name, value in given.items() if value is not None}
    y = function(*(leaves.get(name) for name in ("x", "weight", "a", "b", "magnitude", "bias")), **settings, dropped=leaves.get("dropped"))
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    (y * weights).sum().backward()
    return {"y": y.detach()} | {f"grad {name}": value.grad for name, value in leaves.items()}


def error(actual: Tensor | None, expected: Tensor) -> float:
    """Relative to the size of what is expected; a gradient that is missing is wrong altogether."""
    return 1.0 if actual is None else ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    errors = {name: error(actual[name], value) for name, value in expected.items() if value is not None}
    assert max(errors.values()) <= tolerance, errors


# --- the formula ---


@pytest.mark.parametrize("base_sees_dropout", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rank", RANKS)
def test_output_and_gradients_are_the_references(rank, bias, base_sees_dropout):
    given = tensors(rank, bias=bias, dropout=0.3)
    settings = {"scaling": SCALING, "base_sees_dropout": base_sees_dropout}
    expected = results(reference, given, **settings)
    assert_same(results(factored, given, **settings), expected, 1e-13)
    assert_same(results(factored, given, torch.float32, **settings), expected, 3e-6)  # sums of up to 128 products of width 36


def test_gradients_are_those_of_finite_differences():
    given = tensors(3, out=5, width=4, rows=(2, 3))
    norm = row_norm(given["weight"], given["a"], given["b"], SCALING)
    leaves = [given[name].requires_grad_() for name in ("x", "weight", "a", "b", "magnitude", "bias")]
    assert torch.autograd.gradcheck(lambda *args: factored(*args, scaling=SCALING, norm=norm), leaves)


def test_without_a_magnitude_it_is_lora():
    given = tensors() | {"magnitude": None}
    expected = given["x"] @ (given["weight"] + SCALING * given["b"] @ given["a"]).T + given["bias"]
    torch.testing.assert_close(factored(*(given[n] for n in ("x", "weight", "a", "b", "magnitude", "bias")), scaling=SCALING), expected)
    assert_same(results(factored, given, scaling=SCALING), results(reference, given, scaling=SCALING), 1e-13)


def test_half_precision_errs_little_more_than_the_reference_does():
    given = tensors(16, out=96, width=128, rows=(40,))
    given = {name: value if value is None else value.bfloat16().double() for name, value in given.items()}
    expected = results(reference, given, scaling=SCALING)
    theirs = results(reference, given, torch.bfloat16, scaling=SCALING)
    ours = results(factored, given, torch.bfloat16, scaling=SCALING)
    errors = {name: (error(ours[name], value), error(theirs[name], value)) for name, value in expected.items()}
    assert all(our <= 2 * their for our, their in errors.values()), errors


def test_small_corrections_of_the_magnitude_survive_half_precision():
    """Trained g lie within 0.0015 of 1, where bf16 knows no number but 1."""
    base, gain = torch.ones(1, 64, dtype=torch.bfloat16), 1 + torch.linspace(-2e-3, 2e-3, 64)
    y = combine(base * 1.5, torch.zeros(1, 2).bfloat16(), torch.zeros(64, 2).bfloat16(), gain, torch.ones(64), scaling=1.0)
    torch.testing.assert_close(y, (1.5 * gain).bfloat16()[None], rtol=0, atol=0)
    grad = torch.full((1, 64), 1.5, dtype=torch.bfloat16)
    assert torch.equal(dora_linear._scale_and_dot(grad, gain, base, None)[0], (1.5 * gain).bfloat16()[None])


@pytest.mark.parametrize("bias", [False, True])
def test_a_fresh_adapter_leaves_the_layer_as_it_is(bias):
    given = {name: None if value is None else value.float() for name, value in tensors(bias=bias).items()}
    given["b"].zero_()
    given["magnitude"] = row_norm(given["weight"], given["a"], given["b"], SCALING)
    y = factored(*(given[name] for name in ("x", "weight", "a", "b", "magnitude", "bias")), scaling=SCALING)
    plain = F.linear(given["x"], given["weight"], given["bias"])
    if not bias:
        assert torch.equal(y, plain)
    ulp = torch.finfo(torch.float32).eps * torch.maximum(plain.abs(), (plain - given["bias"]).abs()) if bias else 0
    assert ((y - plain).abs() <= ulp).all()


# --- norms ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norms_are_those_of_the_matrix(dtype):
    given = {name: value.to(dtype) for name, value in tensors(16, out=dora_linear.BLOCK * 2 + 3).items() if value is not None}
    exact = [given[name].double() for name in ("weight", "a", "b")]
    expected = torch.linalg.vector_norm(exact[0] + SCALING * exact[2] @ exact[1], dim=1)
    norm = row_norm(given["weight"], given["a"], given["b"], SCALING)
    assert norm.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(norm.double(), expected, rtol=1e-13 if dtype == torch.float64 else 2e-6, atol=0)
    square = row_square(given["weight"])
    assert torch.equal(row_norm(given["weight"], given["a"], given["b"], SCALING, square), norm)


@pytest.mark.parametrize("residual", [1e-1, 1e-2, 1e-3, 1e-4, 0.0])
def test_rows_that_nearly_cancel_are_right(residual):
    given = {name: value.float() for name, value in tensors(8, out=dora_linear.BLOCK + 9).items() if value is not None}
    a, b = given["a"], given["b"]
    weight = given["weight"].clone()
    weight[3:] = -SCALING * b[3:] @ a + residual * weight[3:]
    expected = torch.linalg.vector_norm(weight.double() + SCALING * b.double() @ a.double(), dim=1)
    atol = 1e-6 * weight.norm(dim=1).max().item()  # fp32's own rounding of the two that cancel
    torch.testing.assert_close(row_norm(weight, a, b, SCALING).double(), expected, rtol=1e-3, atol=atol)


def test_a_row_of_zeros_and_a_scaling_of_zero():
    given = tensors()
    given["weight"][2] = 0
    expected = torch.linalg.vector_norm(given["weight"] + SCALING * given["b"] @ given["a"], dim=1)
    torch.testing.assert_close(row_norm(given["weight"], given["a"], given["b"], SCALING), expected)
    torch.testing.assert_close(row_norm(given["weight"], given["a"], given["b"], 0.0), given["weight"].norm(dim=1))


# --- memory ---


class Allocations(TorchDispatchMode):
    """The greatest number of values in memory that an operation returned and that none of the known tensors owns."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known, self.greatest = {tensor.untyped_storage().data_ptr() for tensor in known}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.greatest = max(self.greatest, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return out


OUT, WIDTH, ROWS = 2048, 160, 24  # OUT * WIDTH is many times ROWS * OUT, rank * OUT and dora_linear.BLOCK * WIDTH


def greatest_allocation(function, dtype: torch.dtype, **settings) -> int:
    given = {name: value.to(dtype) for name, value in tensors(8, out=OUT, width=WIDTH, rows=(ROWS,), dropout=0.1).items()}
    given |= {name: given[name].requires_grad_() for name in ("x", "a", "b", "magnitude", "bias", "dropped")}
    order = ("x", "weight", "a", "b", "magnitude", "bias")
    with Allocations(*given.values()) as seen:
        function(*(given[name] for name in order), scaling=SCALING, dropped=given["dropped"], **settings).sum().backward()
    assert all(value.grad is not None for name, value in given.items() if name != "weight")
    return seen.greatest


@pytest.mark.parametrize("settings", [{}, {"base_sees_dropout": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_the_weights_size_is_allocated(dtype, settings):
    """Forward, backward and the norm."""
    assert greatest_allocation(factored, dtype, **settings) <= OUT * WIDTH // 4
    assert greatest_allocation(reference, dtype, **settings) >= OUT * WIDTH


def test_what_is_kept_for_the_backward_pass():
    """x twice named is one tensor: h [N, r] and one tensor [N, out] come to it."""
    given = {name: value for name, value in tensors(8, out=96, width=80, rows=(50,)).items() if value is not None}
    leaves = {name: value.requires_grad_(name != "weight") for name, value in given.items()}
    kept: dict[int, int] = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.itemsize
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = factored(**leaves, scaling=SCALING)
    own = sum(size for pointer, size in kept.items() if pointer not in {leaf.untyped_storage().data_ptr() for leaf in leaves.values()})
    assert own == 50 * 96 + 50 * 8 + 96  # and n
    assert y.requires_grad


# --- how it is called ---


def test_rows_in_any_arrangement_and_none():
    given = tensors(rows=(2, 3, 4), bias=True)
    flat = given | {"x": given["x"].reshape(24, -1)}
    assert torch.equal(results(factored, given, scaling=SCALING)["y"].reshape(24, -1), results(factored, flat, scaling=SCALING)["y"])
    empty = results(factored, given | {"x": given["x"][:0]}, scaling=SCALING)
    assert empty["y"].shape == (0, 3, 4, 44)
    assert not empty["grad magnitude"].any()


def test_more_rows_than_a_block_and_a_gradient_with_strides():
    given = {name: value.requires_grad_() for name, value in tensors(rows=(2 * dora_linear.BLOCK + 5,)).items() if value is not None}
    ours, theirs = (function(**given, scaling=SCALING) for function in (factored, reference))
    grad = torch.randn(ours.T.shape, dtype=torch.float64).T
    for left, right in zip(*(torch.autograd.grad(y, list(given.values()), grad) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("wanted", [("x",), ("a",), ("b",), ("magnitude",), ("bias",), ("weight",)])
def test_gradients_are_computed_for_those_that_want_them(wanted):
    given = {name: value.requires_grad_(name in wanted) for name, value in tensors().items() if value is not None}
    (ours,), (theirs,) = (
        torch.autograd.grad(function(**given, scaling=SCALING).square().sum(), [given[name] for name in wanted])
        for function in (factored, reference)
    )
    torch.testing.assert_close(ours, theirs)


def test_without_gradients_it_is_the_same():
    given = {name: value.float().requires_grad_() for name, value in tensors().items() if value is not None}
    expected = factored(**given, scaling=SCALING)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(factored(**given, scaling=SCALING), expected.detach(), rtol=0, atol=0)


def test_what_it_returns_is_no_view():
    given = {name: value.requires_grad_() for name, value in tensors(bias=False).items() if value is not None}
    for magnitude in (given["magnitude"], None):
        assert not factored(**given | {"magnitude": magnitude}, scaling=SCALING)._is_view()
    with torch.no_grad():
        assert not factored(**given, scaling=SCALING)._is_view()


def test_a_second_derivative_is_refused():
    given = {name: value.requires_grad_() for name, value in tensors().items() if value is not None}
    (grad,) = torch.autograd.grad(factored(**given, scaling=SCALING).square().sum(), given["magnitude"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_autocast_multiplies_in_half_precision_but_takes_norms_in_fp32():
    given = {name: value.float().requires_grad_() for name, value in tensors(16, width=256).items() if value is not None}
    exact = results(reference, tensors(16, width=256), scaling=SCALING)
    with torch.autocast("cpu", torch.bfloat16):
        norm = row_norm(given["weight"], given["a"], given["b"], SCALING)
        y = factored(**given, scaling=SCALING)
    torch.testing.assert_close(norm, row_norm(given["weight"], given["a"], given["b"], SCALING), rtol=0, atol=0)
    assert y.dtype == torch.bfloat16
    assert error(y, exact["y"]) < 5e-3  # three roundings to 8 bits
    y.sum().backward()
    assert all(value.grad.dtype == torch.float32 for value in given.values())


@pytest.mark.parametrize("bias", [False, True])
def test_it_compiles_without_a_break(bias):
    given = {name: value.float() for name, value in tensors(bias=bias).items() if value is not None}
    given["weight"][5] = -SCALING * given["b"][5] @ given["a"]  # a row for which the number of operations depends on the data
    compiled = torch.compile(factored, backend="aot_eager", fullgraph=True)
    expected, actual = (results(function, given, torch.float32, scaling=SCALING) for function in (factored, compiled))
    assert_same(actual, expected, 1e-6)


def test_the_op_chooses_among_them():
    given = tensors()
    given = {name: value for name, value in given.items() if name != "dropped"}
    y = ops.dora_linear(**given, scaling=SCALING)
    assert ops.choose("dora_linear", given["x"]) == "factored"
    with ops.using(dora_linear="reference"):
        torch.testing.assert_close(ops.dora_linear(**given, scaling=SCALING), y)


# --- faults that make no sound ---


def faulty(fault: str, x, weight, a, b, magnitude, bias, *, scaling, dropped, base_sees_dropout=False):
    """The formula with one thing wrong."""
    norm = torch.linalg.vector_norm(weight + (1.0 if fault == "scaling left out of the norm" else scaling) * b @ a, dim=1)
    norm = norm if fault == "gradient through the norm" else norm.detach()
    gain = (magnitude.detach() if fault == "magnitude without gradient" else magnitude) / norm
    seen_by_base, seen_by_adapter = (dropped, x) if fault == "dropout on the wrong path" else (x, dropped)
    y = gain * (seen_by_base @ weight.T + scaling * seen_by_adapter @ a.T @ b.T)
    return gain * (y / gain + bias) if fault == "bias scaled" else y + bias


FAULTS = [
    "scaling left out of the norm",
    "gradient through the norm",
    "magnitude without gradient",
    "bias scaled",
    "dropout on the wrong path",
]


@pytest.mark.parametrize("fault", [*FAULTS, "none"])
def test_the_comparison_sees(fault):
    given = tensors(dropout=0.3)
    expected, actual = (
        results(function, given, scaling=SCALING) for function in (reference, lambda *args, **settings: faulty(fault, *args, **settings))
    )
    if fault == "none":
        assert_same(actual, expected, 1e-13)
        return
    with pytest.raises(AssertionError):
        assert_same(actual, expected, 1e-3)


@pytest.mark.parametrize("rows", [5, 600])
@pytest.mark.parametrize("small", [1.0, 0.0, 1e-6])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("projections", [1, 2])
def test_folded_gains_give_the_references_output_and_gradients(bias, small, rows, projections):
    """In fp64: the same formula, of each projection by itself, where a gain is too small to divide by, too."""
    draw = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
    own = [3, 4] if projections == 2 else [7]
    x, weight, a, b, m, offset, grad = (
        make(rows, 6),
        make(7, 6),
        make(3 * projections, 6),
        make(7, 3),
        make(7).abs() + 0.5,
        make(7),
        make(rows, 7),
    )
    m[2] *= small
    trained = [tensor.requires_grad_() for tensor in (x, a, b, m)]
    offsets = offset.split(own) if bias else [None] * projections
    parts = list(zip(weight.split(own), a.chunk(projections), b.split(own), strict=True))
    expected = torch.cat(
        [dora_linear.reference(x, *part, gain, c, scaling=0.7) for part, gain, c in zip(parts, m.split(own), offsets, strict=True)], 1
    )
    norm = torch.cat([dora_linear.row_norm(*part, 0.7) for part in parts])
    actual = dora_linear.folded(x, x @ a.T, weight, b, m, norm, offset if bias else None, scaling=0.7, rows=own)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    gradients = [torch.autograd.grad(output, trained, grad) for output in (actual, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("projections", [1, 2])
def test_folded_lora_is_lora(projections):
    """Without a magnitude nothing is multiplied into W; one of several projections sees its own h alone."""
    draw = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
    rows = [3, 4] if projections == 2 else [7]
    x, weight, a, b, grad = make(9, 6), make(7, 6), make(3 * projections, 6), make(7, 3), make(9, 7)
    trained = [tensor.requires_grad_() for tensor in (x, a, b)]
    parts = zip(weight.split(rows), a.chunk(projections), b.split(rows), strict=True)
    expected = torch.cat([dora_linear.reference(x, *part, scaling=0.7) for part in parts], 1)
    actual = dora_linear.folded(x, x @ a.T, weight, b, scaling=0.7, rows=rows)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    gradients = [torch.autograd.grad(output, trained, grad) for output in (actual, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("small", [0.0, 1e-6])
def test_a_magnitude_that_has_gone_to_zero_still_learns(small):
    """There the output says nothing of what it was made from."""
    given = tensors(8)
    given["magnitude"][:3] = small
    expected = results(reference, given, scaling=SCALING)
    actual = results(factored, given, torch.float32, scaling=SCALING)
    assert all(error(actual[name], value) <= 1e-5 for name, value in expected.items())
