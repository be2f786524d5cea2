"""What is promised in fp32 is made in fp32, whether or not the CPU has units for half precision; and the emulation of such units."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support import cpu_units
from torch import Tensor

from idefics2_fast import ops
from idefics2_fast.config import VisionConfig
from idefics2_fast.kernels import dora_linear, linear_cross_entropy, rms_norm
from idefics2_fast.kernels import linear as linear_kernel
from idefics2_fast.vision import PatchEmbedding

HALF = (torch.bfloat16, torch.float16)
ROUNDING = 2.0**-24  # of one fp32 operation
WIDTH, CLASSES, ROWS = 64, 97, 24
ROOT = Path(__file__).parent.parent
X86 = platform.machine().lower() in ("x86_64", "amd64")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype)


@pytest.fixture(params=["as the CPU has them", "units", "no units"])
def answered(request, monkeypatch) -> Iterator[None]:
    """The project's question, answered by the CPU, yes or no."""
    answers = {"units": True, "no units": False}
    if request.param in answers:
        monkeypatch.setattr(linear_kernel, "_cpu_multiplies", lambda dtype: answers[request.param])
    ops._preferred.cache_clear()
    yield
    ops._preferred.cache_clear()


Draw = Callable[..., Tensor]


def loss_and_gradients(draw_: Draw) -> list[Tensor]:
    """Of `chunked`: the sum, and its gradients before they are rounded to the operands' dtype; by autograd in fp64."""
    hidden, weight, targets = draw_(ROWS, WIDTH), draw_(CLASSES, WIDTH, seed=1), torch.arange(ROWS)
    if hidden.dtype == torch.float64:
        leaves = [hidden.requires_grad_(), weight.requires_grad_()]
        total = linear_cross_entropy.reference(*leaves, targets)[0]
        return [total, *torch.autograd.grad(total, leaves)]
    dtype = linear_cross_entropy._product_dtype(hidden, weight)
    return list(linear_cross_entropy._forward(hidden, weight, targets, None, -100, 0.0, dtype, True, True))


def loss_of_the_reference(draw_: Draw) -> list[Tensor]:
    return [linear_cross_entropy.reference(draw_(ROWS, WIDTH), draw_(CLASSES, WIDTH, seed=1), torch.arange(ROWS))[0]]


def norms(draw_: Draw) -> list[Tensor]:
    """DoRA's, of an adapter that is as large as its weight."""
    weight, a, b = draw_(CLASSES, WIDTH), draw_(8, WIDTH, seed=1), draw_(CLASSES, 8, seed=2)
    return [dora_linear.row_norm(weight, a, b, 0.5), dora_linear.row_square(weight)]


# Results in fp32 of operands in half precision.
PROMISED: dict[str, Callable[[Draw], list[Tensor]]] = {
    "linear_cross_entropy, chunked": loss_and_gradients,
    "linear_cross_entropy, reference": loss_of_the_reference,
    "dora_linear, norms": norms,
    "rms_norm, rstd": lambda draw_: [rms_norm.rstd(draw_(ROWS, WIDTH), 1e-5)],
}


@pytest.mark.usefixtures("answered")
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", PROMISED)
def test_fp32_results_of_half_precision(name, dtype):
    """The error is that of fp32 sums of at most WIDTH + CLASSES terms, the operands being exact."""
    results = PROMISED[name](partial(draw, dtype=dtype))
    exact = PROMISED[name](lambda *shape, seed=0: draw(*shape, seed=seed, dtype=dtype).double())
    for actual, expected in zip(results, exact, strict=True):
        assert actual.dtype == torch.float32
        error, scale = (actual.double() - expected).abs().max().item(), expected.abs().max().item()
        assert error <= (WIDTH + CLASSES) * ROUNDING * scale, f"{error:.1e} of {scale:.1e}"


@pytest.mark.usefixtures("answered")
@pytest.mark.parametrize("dtype", HALF)
def test_patches_of_bytes_are_rounded_once(dtype):
    config = VisionConfig(hidden_size=48, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    embedding = PatchEmbedding(config)
    weight, bias = draw(48, config.patch_dim, dtype=dtype) / 8, draw(48, seed=1, dtype=dtype)
    embedding.projection.weight, embedding.projection.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
    patches = torch.randint(0, 256, (40, config.patch_dim), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    expected = F.linear((patches.double() / 255 - 0.5) / 0.5, weight.double(), bias.double())
    shift = (bias.double() + weight.double().sum(1) / 255).abs()
    half_ulp = torch.finfo(dtype).eps / 2
    sums = config.patch_dim * ROUNDING * (weight.double().abs().sum(1) + shift)
    allowed = half_ulp * (expected.abs() + shift) * 1.01 + sums
    assert ((embedding._project(patches).double() - expected).abs() <= allowed).all()


@pytest.mark.usefixtures("answered")
@pytest.mark.parametrize("dtype", HALF)
def test_the_choice_compiles(dtype):
    """In one graph, without a warning of a cache that the compiler reads through: pyproject.toml makes it an error."""
    x, weight, scale = draw(ROWS, WIDTH, dtype=dtype), draw(CLASSES, WIDTH, seed=1, dtype=dtype), torch.ones(CLASSES, dtype=dtype)
    layer = lambda x: ops.rms_norm(ops.linear(x, weight), scale, 1e-5)  # noqa: E731
    actual = torch.compile(layer, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(actual, layer(x))


def test_the_choice_on_a_card_compiles():
    """What is installed is a constant to the compiler."""
    choose = ops._preferred.__wrapped__
    named = lambda x: x + len(choose("decode_attention", "cuda", torch.bfloat16, x.shape[-1]))  # noqa: E731
    expected = named(torch.zeros(2, WIDTH))
    assert torch.equal(torch.compile(named, backend="eager", fullgraph=True)(torch.zeros(2, WIDTH)), expected)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("product", ["mm", "addmm", "bmm", "linear"])
def test_torch_rounds_products_of_half_precision_once(product, dtype):
    """So that `cpu_units.emulate` gives what units give: an fp32 sum, rounded to the operands' dtype."""
    for rows, width, columns in ((7, 576, 33), (64, 2048, 48), (1, 300, 50)):
        a, b, bias = draw(rows, width, dtype=dtype), draw(columns, width, seed=1, dtype=dtype), draw(columns, seed=2, dtype=dtype)
        exact = a.double() @ b.double().T
        if product == "mm":
            actual = a @ b.T
        elif product == "bmm":
            actual = torch.bmm(a[None], b.T[None])[0]
        elif product == "linear":
            actual, exact = F.linear(a, b, bias), exact + bias.double()
        else:
            actual, exact = torch.addmm(bias, a, b.T, alpha=0.25), exact / 4 + bias.double()
        assert actual.dtype == dtype
        sums = width * ROUNDING * (a.double().abs() @ b.double().abs().T)
        assert ((actual.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * 1.01 * exact.abs() + sums).all()


# The tests' helpers, and the rule that rounded logits where the CPU has units.
PREPARED = f"""
import sys, types

sys.modules["support"] = types.ModuleType("support")
sys.modules["support"].__path__ = [{str(ROOT / "tests" / "support")!r}]

import torch
from idefics2_fast.kernels import linear, linear_cross_entropy
from support import cpu_units

def product_dtype(hidden, weight):
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    return torch.float32 if linear.needs_upcast("cpu", dtype) else dtype

def plant():
    linear_cross_entropy._product_dtype = product_dtype
"""


def run(code: str, **environment: str) -> str:
    """The last line that a process prints, on a CPU that is capped at AVX2."""
    environment = {**os.environ, **cpu_units.CAPS, **environment}
    done = subprocess.run([sys.executable, "-c", PREPARED + code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.skipif(not X86, reason="the caps are those of x86")
def test_caps_remove_the_units_and_the_emulation_shows_their_rounding():
    """The planted fault is seen where units are emulated, not where they are capped; without it nothing is seen."""
    code = """
import json

draw = torch.Generator().manual_seed(0)
hidden, weight = (torch.randn(*shape, generator=draw).bfloat16() for shape in ((16, 64), (97, 64)))
exact = linear_cross_entropy.reference(hidden.double(), weight.double(), torch.arange(16))[0]
def error():
    return abs(linear_cross_entropy.chunked(hidden, weight, torch.arange(16))[0].item() / exact.item() - 1)
result = {"capability": torch.backends.cpu.get_cpu_capability(), "units": cpu_units.units(), "whole": error()}
plant()
result["planted, capped"] = error()
cpu_units.emulate()
print(json.dumps(result | {"planted, emulated": error()}))
"""
    result = json.loads(run(code))
    assert result["units"] == []
    assert result["capability"] in ("AVX2", "DEFAULT")
    assert result["whole"] <= 1e-6
    assert result["planted, capped"] <= 1e-6
    assert result["planted, emulated"] > 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("planted", "status"), [(True, pytest.ExitCode.TESTS_FAILED), (False, pytest.ExitCode.OK)])
def test_an_emulated_run_is_red_where_logits_are_rounded(planted, status):
    """The very test that failed on CPUs with units, with units capped and emulated."""
    test = "tests/test_linear_cross_entropy.py::test_sum_count_and_gradients_equal_the_formula"
    code = f"""
import pytest

class Plant:
    def pytest_collection_finish(self):
        {"plant()" if planted else "pass"}

print(int(pytest.main(["-q", "-p", "no:cacheprovider", "--rootdir={ROOT}", "{ROOT / test}[chunked-dtype2]"], plugins=[Plant()])))
"""
    assert run(code, CPU_UNITS="emulated") == str(int(status))
