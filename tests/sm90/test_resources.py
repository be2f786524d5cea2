"""The machine code of the shipped kernels, and that a kernel with each fault is seen."""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from idefics2_fast.benchmarks.sm90 import resources
from idefics2_fast.benchmarks.sm90.launches import compile, launches, recorded
from idefics2_fast.benchmarks.sm90.resources import (
    CASES,
    DESIGNS,
    Resources,
    faults,
    hot_loop,
    launches_of,
    measure,
    product_columns,
    resident_ctas,
    shape_classes,
    table,
)
from idefics2_fast.kernels.tuned import CONFIGS

# The shape classes of idefics2-8b; the others take minutes to compile.
SHIPPED = {
    "dora_linear": ["half 64"],
    "segment_attention": ["half 72"],
    "perceiver_attention": ["half 96"],
    "perceiver_context": ["half 16384"],
    "embedding": ["half 65536"],
    "linear_cross_entropy": ["half 32768"],
}


def check(rows):
    version, before = resources.recorded_table()
    missing = rows.keys() - before.keys()
    assert not missing, f"not recorded (python -m idefics2_fast.benchmarks.sm90.resources --write): {missing}"
    same = version == triton.__version__
    assert not [fault for key, row in rows.items() for fault in faults(key, row, before[key] if same else None)]


@pytest.mark.slow
@pytest.mark.parametrize("op", CONFIGS)
def test_the_kernels_are_as_designed(op):
    check(table({op: SHIPPED[op]}))


@pytest.mark.slow
@pytest.mark.parametrize(("op", "shape_class"), [(op, name) for op in CONFIGS for name in shape_classes(op) if name not in SHIPPED[op]])
def test_the_kernels_of_other_shapes_are_as_designed(op, shape_class):
    check(table({op: [shape_class]}))


@pytest.mark.parametrize("op", CONFIGS)
def test_every_launch_says_whether_products_and_sums_fuse(op):
    every = [launch for case in CASES[op] for launch in launches_of(op, SHIPPED[op][0], case)]
    assert every
    assert all("enable_fp_fusion" in launch.options for launch in every), "Triton's default changes with 3.10"


def test_the_record_is_of_all_configs():
    _, before = resources.recorded_table()
    recorded_classes = {tuple(key.split("/")[:2]) for key in before}
    assert recorded_classes == {(op, name) for op in CONFIGS for name in shape_classes(op)}
    assert CASES.keys() == CONFIGS.keys()
    assert {f"{key.split('/')[0]}/{key.split('/')[3].split()[0]}" for key in before} == DESIGNS.keys()
    assert not [fault for key, row in before.items() for fault in faults(key, row)]


# --- planted ---


@triton.jit
def scaled_sum(X, Y, steps, WIDTH: tl.constexpr, N: tl.constexpr):
    """A loop over rows of WIDTH elements a thread apart."""
    at = tl.arange(0, N)
    total = tl.zeros([N], tl.float32)
    for step in range(steps):
        total = total * 0.5 + tl.load(X + step * N + at * WIDTH).to(tl.float32)
    tl.store(Y + at, total)


@triton.jit
def products(X, Y, Z, steps, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros([M, N], tl.float32)
    for step in range(steps):
        x = tl.load(X + m[:, None] * 4096 + step * K + k[None, :])
        y = tl.load(Y + (step * K + k)[:, None] * N + n[None, :])
        total = tl.dot(x, y, total)
    tl.store(Z + m[:, None] * N + n[None, :], total)


def launched(kernel, *arguments, **constants):
    with launches(recorded()) as record:
        kernel[(1,)](*arguments, **constants, enable_fp_fusion=True)
    (launch,) = record.launches
    return compile(launch), launch


def product_row(M, N, K, num_warps, num_stages=2):
    x, y, z = (torch.empty(rows, 4096, dtype=torch.bfloat16) for rows in (M, 64 * K, M))
    return measure(*launched(products, x, y, z, 64, M=M, N=N, K=K, num_warps=num_warps, num_stages=num_stages))


def sum_row(width):
    x, y = torch.empty(1 << 20), torch.empty(1024)
    return measure(*launched(scaled_sum, x, y, 64, WIDTH=width, N=1024, num_warps=4, num_stages=1))


@pytest.fixture
def designed(monkeypatch):
    monkeypatch.setitem(DESIGNS, "op/kernel", resources.Design(products=lambda config: {64}))
    return "op/half 64/case/kernel"


def test_a_kernel_as_designed_has_no_fault(designed):
    row = product_row(128, 64, 64, 4)
    assert row.hot == "products"
    assert row.products.keys() == {"64x64x16"}
    assert row.loads.keys() == {"16"}
    assert faults(designed, row, row) == []


def test_a_kernel_that_spills_is_seen(designed):
    row = product_row(128, 64, 16, 1, 1)
    assert any("instructions spill" in fault for fault in faults(designed, row)), row


def test_another_product_is_seen(designed):
    assert any("products of ['64x128x16'], designed ['64x64x16']" in fault for fault in faults(designed, product_row(64, 128, 64, 4)))
    assert any("products of []" in fault for fault in faults(designed, product_row(16, 64, 64, 4))), "16 rows take mma.sync"


def test_a_narrow_load_is_seen(monkeypatch):
    monkeypatch.setitem(DESIGNS, "op/kernel", resources.Design())
    wide, narrow = sum_row(1), sum_row(2)
    assert wide.hot == narrow.hot == "loop"
    assert wide.loads.keys() == {"16"}
    assert faults("op/float 64/case/kernel", wide) == []
    (fault,) = faults("op/float 64/case/kernel", narrow)
    assert f"{narrow.loads['4']} loads of less than 16 bytes" in fault


def test_more_instructions_than_before_are_seen():
    row = replace(sum_row(1), loads={})
    key = "perceiver_attention/float 256/1 image/_sum_splits"
    assert faults(key, replace(row, instructions=110), replace(row, instructions=100)) == []
    (fault,) = faults(key, replace(row, instructions=111), replace(row, instructions=100))
    assert "111 instructions in the hot loop, 100 before" in fault


def test_too_few_resident_ctas_are_seen():
    key = "perceiver_attention/float 256/1 image/_forward"
    row = Resources({"BN": 64, "D1": 64, "D2": 32, "num_warps": 4}, 168, 0, 0, 0, 2, {}, "products", 100, {"16": 8})
    assert faults(key, row) == []
    assert faults(key, replace(row, ctas=1, config={**row.config, "num_warps": 8})) == []
    (fault,) = faults(key, replace(row, ctas=1))
    assert "1 CTAs of 4 warps" in fault


# --- reading ---

SASS = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/               @P0 BRA `(.L_x_2) ;
.L_x_0:
        /*0020*/                   LDG.E.64 R2, desc[UR4][R2.64] ;
.L_x_1:
        /*0030*/              @!P1 LDGSTS.E.BYPASS.128 [R4], desc[UR4][R2.64] ;
        /*0040*/                   HGMMA.64x32x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0050*/               @P2 BRA `(.L_x_1) ;
        /*0060*/                   LDG.E.U16 R2, desc[UR4][R2.64] ;
        /*0070*/               @P1 BRA `(.L_x_0) ;
.L_x_2:
        /*0080*/                   EXIT ;
.L_x_3:
        /*0090*/                   BRA `(.L_x_3);
"""


def test_the_innermost_loop_with_products_is_the_hot_one():
    hot = hot_loop(SASS)
    assert [instruction.opcode for instruction in hot.instructions] == ["LDGSTS.E.BYPASS.128", "HGMMA.64x32x16.F32.BF16", "BRA"]
    assert hot.loads == {16: 1}
    without = hot_loop(SASS.replace("HGMMA", "FFMA").replace("BRA `(.L_x_1)", "EXIT"))
    assert (without.kind, without.loads) == ("loop", {8: 1, 16: 1, 2: 1})
    straight = SASS.replace("BRA `(.L_x_1)", "EXIT")
    assert hot_loop(straight).kind == "products", "of the outer loop"
    assert hot_loop(straight.replace("BRA `(.L_x_0)", "EXIT")).kind == "body"


@pytest.mark.parametrize(
    ("registers", "shared", "num_warps", "ctas"),
    [
        (168, 0, 4, 3),  # 5376 registers a warp: 12 warps
        (128, 0, 8, 2),
        (255, 0, 8, 1),
        (32, 0, 4, 16),  # 64 warps
        (16, 0, 1, 32),  # CTAs
        (32, 113 * 1024, 4, 2),
        (32, 113 * 1024 + 1, 4, 1),
        (32, 227 * 1024, 4, 1),
        (255, 0, 16, 0),
    ],
)
def test_resident_ctas(registers, shared, num_warps, ctas):
    assert resident_ctas(registers, shared, num_warps) == ctas


@pytest.mark.parametrize(
    ("rows", "columns", "num_warps", "n"),
    [(64, 64, 4, 64), (128, 64, 4, 64), (128, 64, 8, 64), (64, 64, 8, 32), (128, 256, 8, 256), (64, 512, 4, 256)],
)
def test_warps_beyond_the_rows_share_the_columns(rows, columns, num_warps, n):
    assert product_columns(rows, [columns], num_warps) == {n}
