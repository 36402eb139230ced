"""Instructions counted from disassembly: loops, ways, and what is above its budget. `make cuda-check` counts the real kernels."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "csrc"))

import budgets
import sass

# An outer loop of two blocks (4 + 3 instructions) around an inner one of 3, a branch of 2 or 5, a rare case at the end that
# jumps back, and a subroutine that is only called.
CODE = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   ISETP.GE.AND P0, PT, R1, R2, PT ;
        /*0020*/               @P0 EXIT ;
        /*0030*/                   IADD3 R3, R3, 0x1, RZ ;
        /*0040*/                   ISETP.NE.AND P1, PT, R3, RZ, PT ;
        /*0050*/               @P1 BRA 0x150 ;
        /*0060*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0070*/                   FMUL R4, R4, R4 ;
        /*0080*/                   FADD R5, R4, R5 ;
        /*0090*/                   ISETP.LT.AND P2, PT, R5, R6, PT ;
        /*00a0*/               @P2 BRA 0x70 ;
        /*00b0*/              @!P3 BRA 0x100 ;
        /*00c0*/                   MUFU.RSQ R7, R5 ;
        /*00d0*/                   FMUL R7, R7, R7 ;
        /*00e0*/                   FMUL R7, R7, R8 ;
        /*00f0*/                   BRA 0x110 ;
        /*0100*/                   FADD R7, R5, R8 ;
        /*0110*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0120*/                   ISETP.LT.AND P4, PT, R9, R10, PT ;
        /*0130*/               @P4 BRA 0x30 ;
        /*0140*/                   EXIT ;
        /*0150*/                   CALL.REL.NOINC 0x180 ;
        /*0160*/                   BRA 0x60 ;
        /*0170*/                   BRA 0x170 ;
        /*0180*/                   FADD R1, R1, R1 ;
        /*0190*/                   RET.REL.NODEC R2 ;
"""


def test_loops_are_back_edges_to_what_dominates() -> None:
    loops = sass.loops_of(sass.blocks_of(sass.parse(CODE)))
    # The rare case jumps back to 0x60 and the dead branch to itself: neither is a loop of the way through.
    assert list(loops) == [0x30, 0x70]
    assert loops[0x70] == {0x70}
    assert loops[0x30] == {0x30, 0x60, 0x70, 0xB0, 0xC0, 0x100, 0x110, 0x150}


@pytest.mark.parametrize(
    ("turns", "without", "expected"),
    [
        ((1, 1), None, 3 + (3 + 2) + 1 + 4 + 1 + 4 + 3 + 1),  # by the rare case and the longer branch
        ((10, 1), None, 3 + 10 * (3 + 2 + 1 + 4 + 1 + 4 + 3) + 1),
        ((10, 4), None, 3 + 10 * (3 + 2 + 1 + 4 * 4 + 1 + 4 + 3) + 1),
        ((1, 1), "MUFU.RSQ", 3 + (3 + 2) + 1 + 4 + 1 + 1 + 3 + 1),
        ((1, 1), "CALL.REL.NOINC", 3 + 3 + 1 + 4 + 1 + 4 + 3 + 1),
    ],
)
def test_the_longest_way_counts_each_turn(turns, without, expected: int) -> None:
    assert sass.count(CODE, turns, without=without) == expected


def test_another_number_of_loops_is_refused() -> None:
    with pytest.raises(ValueError, match="2 loops"):
        sass.count(CODE, (1,))


def test_what_is_above_its_budget_is_named(monkeypatch) -> None:
    case = budgets.Case("some norm", "some_kernelIfE", 4, (1, 1), 4 * 512, 21)
    monkeypatch.setattr(budgets, "CASES", [case])
    functions = {"_Z11some_kernelIfEvv": CODE}
    lines, above = budgets.report(functions, {"_Z11some_kernelIfEvv": 64})
    assert lines[-1] == "| some norm | 22 | 21 | 64 | 50 % |"
    assert above == ["some norm: 22.0 warp instructions per 512 bytes, at most 21"]
    assert budgets.report({}, {})[1] == ["some norm: 0 kernels are named some_kernelIfE: mend the list of cases"]


def test_registers_and_occupancy() -> None:
    printed = """ptxas info    : Function properties for kernel_a
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 72 registers, used 1 barriers, 48 bytes smem"""
    assert budgets.registers_of(printed) == {"kernel_a": 72}
    assert budgets.occupancy(32, 8) == 1.0
    assert budgets.occupancy(72, 4) == 28 / 64
    assert budgets.occupancy(255, 8) == 8 / 64


def test_every_kernel_of_the_review_has_a_budget() -> None:
    labels = " ".join(case.label for case in budgets.CASES)
    for name in ("residual_gate_norm", "qk_rmsnorm_rope", "rmsnorm_rows", "channel_norm_silu", "bias_residual"):
        assert name in labels
    limits = {case.label: case.budget for case in budgets.CASES}
    assert limits["channel_norm_silu bf16 96"] == 80
    assert limits["quantize_rows bf16, GELU"] == 80
    assert limits["qk_rmsnorm_rope bf16"] == 60
    assert (
        limits["residual_gate_norm bf16"]
        == limits["channel_norm_silu fp32 96"]
        == limits["bias_residual bf16 96"]
        == 40
    )
