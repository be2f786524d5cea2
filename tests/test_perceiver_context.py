"""Keys and values of the perceiver's context: the op, and with its attention against transformers' layers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from idefics2_fast import ops
from idefics2_fast.benchmarks.perceiver import TOLERANCE, Pools
from idefics2_fast.config import PerceiverConfig
from idefics2_fast.kernels import linear, perceiver_context

FP32 = 2e-6  # relative: 2^-24 times the growth of a few hundred pairwise-summed terms
EPS = 1e-2  # of a size that shows where it is added


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item() if expected.numel() else 0.0


def test_the_reference_is_the_norm_and_then_the_product():
    x, norm, weight = draw(5, 24), draw(24, seed=1), draw(9, 24, seed=2)
    normed = torch.nn.functional.rms_norm(x, (24,), norm, EPS)
    torch.testing.assert_close(perceiver_context.reference(x, weight * norm, EPS), normed @ weight.T)


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(0, 70), width=st.sampled_from([8, 72, 264]), outs=st.sampled_from([8, 40]), grad=st.booleans())
def test_folded(rows, width, outs, grad):
    x, weight = draw(rows, width), draw(outs, width, seed=1)
    with torch.set_grad_enabled(grad):
        actual = perceiver_context.folded(x.float(), weight.float(), EPS)
    assert actual.shape == (rows, outs)
    assert error(actual, perceiver_context.reference(x, weight, EPS)) <= FP32


@pytest.mark.parametrize("implementation", [perceiver_context.reference, perceiver_context.folded])
def test_gradients(implementation):
    x, weight = draw(6, 10).requires_grad_(), draw(7, 10, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: implementation(x, w, EPS), (x, weight))
    ours, exact = (
        torch.autograd.grad(f(x, weight, EPS).square().sum(), (x, weight)) for f in (implementation, perceiver_context.reference)
    )
    torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad", [False, True])
def test_half_precision_scales_in_fp32(dtype, grad):
    """Rounded twice, the product and what is scaled: an ulp of the result, and no more for rows of any size."""
    x, weight = (draw(40, 96) * torch.logspace(-2, 2, 40)[:, None]).to(dtype), draw(24, 96, seed=1).to(dtype)
    with torch.set_grad_enabled(grad):
        actual = ops.perceiver_context(x, weight, 1e-6)
    expected = perceiver_context.reference(x.double(), weight.double(), 1e-6)
    assert actual.dtype == dtype
    allowed = expected.abs() * torch.finfo(dtype).eps * 1.01 + 96 * 2.0**-24 * expected.abs().max()
    assert ((actual.double() - expected).abs() <= allowed).all()


def test_the_rule_multiplies_as_linear_does(monkeypatch):
    assert ops.choose("perceiver_context", torch.zeros(3, 8)) == "folded"
    choose = ops._preferred.__wrapped__
    monkeypatch.setattr(ops, "_installed", lambda package: package == "triton")
    monkeypatch.setattr(ops, "_trusted", lambda op: True)
    assert choose("perceiver_context", "cuda", torch.bfloat16, 4096) == "triton"
    assert choose("perceiver_context", "cuda", torch.float32, 4096) == "folded"
    assert choose("perceiver_attention", "cuda", torch.bfloat16, 96) == "triton"
    assert choose("perceiver_attention", "cuda", torch.bfloat16, 100) == "sdpa"
    with ops.using(linear="reference"):
        monkeypatch.setitem(ops.IMPLEMENTATIONS["linear"], "reference", (lambda *_: True, lambda x, w, b=None: linear.reference(x, w) * 2))
        x, weight = draw(3, 8), draw(4, 8, seed=1)
        torch.testing.assert_close(ops.perceiver_context(x, weight, EPS), 2 * perceiver_context.reference(x, weight, EPS))


# --- transformers ---


def check_against_transformers(pools: Pools, patches: int, hidden: int) -> None:
    context, latents = (draw(n, hidden, seed=n).float().requires_grad_() for n in (patches, pools.ours.latents.shape[0]))
    theirs, ours = pools.hf(context, latents), pools.engine(context, latents)
    grad = draw(*theirs.shape, seed=7).float()
    of_theirs = torch.autograd.grad(theirs, [context, latents, *pools.hf_parameters()], grad)
    of_ours = torch.autograd.grad(ours, [context, latents, *pools.engine_parameters()], grad)
    expected = [theirs.detach(), *of_theirs[:2], *pools.alike(of_theirs[2:])]
    for actual, wanted in zip([ours.detach(), *of_ours], expected, strict=True):
        assert error(actual, wanted.double()) <= TOLERANCE


@pytest.mark.parametrize("patches", [1, 70, 301])
def test_three_layers_equal_transformers(patches):
    config = PerceiverConfig(n_latents=6, n_heads=4, head_dim=16, num_key_value_heads=2)
    check_against_transformers(Pools(config, 48, torch.device("cpu")), patches, 48)


@pytest.mark.slow
def test_three_layers_equal_transformers_in_full_size():
    check_against_transformers(Pools(PerceiverConfig(), 4096, torch.device("cpu")), 2000, 4096)
