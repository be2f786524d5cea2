"""The model's arithmetic. What it predicts decides no test."""

import pytest

from idefics2_fast.benchmarks.sm90.pipes import Use, cycles, segments, use
from idefics2_fast.benchmarks.sm90.resources import Instruction

LOOP = """
.L_x_0:
        /*0010*/                   LDGSTS.E.BYPASS.128 [R41], desc[UR30][R24.64], P4 ;
        /*0020*/                   WARPGROUP.ARRIVE ;
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0050*/                   MUFU.EX2 R9, R9 ;
        /*0060*/                   FFMA R9, R9, R9, R9 ;
        /*0070*/                   WARPGROUP.ARRIVE ;
        /*0080*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
        /*0090*/               @P0 BRA `(.L_x_0) ;
        /*00a0*/                   EXIT ;
.L_x_1:
        /*00b0*/                   BRA `(.L_x_0) ;
"""


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        ("HGMMA.64x256x16.F32.BF16", {"issue": 1, "tensor": 128}),
        ("MUFU.EX2", {"issue": 1, "special": 8}),
        ("FFMA", {"issue": 1, "fma": 1}),
        ("IMAD.WIDE", {"issue": 1, "other": 2}),
        ("UIADD3", {"issue": 1}),
        ("LDS.128", {"issue": 1, "memory": 16}),
        ("LDS", {"issue": 1, "memory": 4}),
        ("LDSM.16.MT88.4", {"issue": 1, "memory": 16}),
        ("SHFL.BFLY", {"issue": 1, "memory": 4}),
    ],
)
def test_what_an_instruction_keeps_busy(opcode, expected):
    assert use(Instruction(opcode, opcode)) == expected


def test_a_loop_is_cut_where_it_waits_and_where_products_begin():
    first, wait, third = segments(LOOP, num_warps=4)
    assert first == {"issue": 2, "tensor": 32}
    assert wait == {"issue": 3, "special": 8, "fma": 1}
    assert third == {"issue": 4, "tensor": 64, "memory": 16}, "the copy of the next turn overlaps the products of this one"
    assert segments(LOOP, num_warps=8)[0] == {"issue": 4, "tensor": 64}


def test_segments_add_and_ctas_overlap():
    parts = [Use(tensor=100, issue=20), Use(special=60, issue=50)]
    assert cycles(parts, 1, 1.0) == 160
    assert cycles(parts, 1, 0.5) == 260
    assert cycles(parts, 2, 1.0) == 100, "as fast as the tensor cores allow"
    assert cycles([Use(tensor=100), Use(special=90)], 3, 1.0) == 100
    assert cycles([Use(tensor=100), Use(special=190)], 1, 1.0) == 290
