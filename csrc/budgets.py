"""What the hot kernels may issue: warp instructions per 512 bytes of memory traffic at the real widths, on sm_90.

An H200 moves 4.3 TB/s; its 528 schedulers at 1.7 GHz and 75 % issue start about 80 warp instructions in the time that
512 bytes take. Above 80 a kernel is bound by instructions, at half of that comfortably by memory.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import sass

WIDTH, FEED_FORWARD, HEADS, ROWS = 5120, 13824, 40, 11040
# Registers and warps of one multiprocessor of sm_90.
REGISTERS, WARPS, BLOCKS = 65536, 64, 32
DTYPES = {"bf16": "13__nv_bfloat16", "fp16": "6__half", "fp32": "f"}


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel at one size.

    turns: how often each loop turns, in the order of the loops' first instructions. traffic: bytes that the blocks move
    meanwhile, caches not counted. ways: for each of these blocks an opcode that its way through the code does not come
    across, or None.
    """

    label: str
    kernel: str
    warps: int
    turns: tuple[float, ...]
    traffic: float
    budget: float
    ways: tuple[str | None, ...] = (None,)


def row_cases() -> list[Case]:
    """Kernels that take a block per row."""
    cases = []
    for name, mangled in DTYPES.items():
        size = 4 if name == "fp32" else 2
        row = WIDTH * size
        once = (1, 1)
        norm = f"residual_gate_norm_registersI{mangled}Lb"
        # The factor of amplified keys is the only load of four bytes; v knows no root.
        plain, value = "LDG.E", "MUFU.RSQ"
        rope = f"qk_rmsnorm_rope_registersI{mangled}Lb"
        cases += [
            Case(f"residual_gate_norm {name}", f"{norm}0", 4, once, 4 * row, 40),
            # Rounds twice and finds the largest: of 22 instructions an element the sum and norm alone are 16.
            Case(f"residual_gate_norm {name} to e4m3", f"{norm}1", 4, once, 3 * row + WIDTH, 40 if size == 4 else 50),
            Case(f"rmsnorm_rows {name}", f"rmsnorm_rows_registersI{mangled}", 4, once, 2 * row, 40),
            Case(f"qk_rmsnorm_rope {name}", f"{rope}0", 4, once, 4 * row, 60, (plain, plain)),
            Case(f"qk_rmsnorm_rope {name}, amplified keys", f"{rope}0", 4, once, 4 * row, 60, (plain, None)),
            Case(f"qk_rmsnorm_rope_pack {name}", f"{rope}1", 4, once, 6 * row, 60, (plain, plain, value)),
            Case(f"quantize_rows {name}", f"quantize_registersI{mangled}Lb0ELi4E", 4, once, row + WIDTH, 40),
            Case(
                f"quantize_rows {name}, GELU",
                f"quantize_registersI{mangled}Lb1ELi9E",
                9,
                once,
                FEED_FORWARD * (size + 1),
                80,
            ),
        ]
    cases += [
        Case("unpack_heads bf16", "unpackI5uint4Li16E", 4, (1, 1, 1), 2 * WIDTH * 2, 40),
        Case("merge_partials bf16", "merge_rowsI13__nv_bfloat16Li16E", 4, (1,), 8 * 128 * 10, 40),
    ]
    # Each warp takes five of the heads; a head's row is half a vector access of the warp, unrolled four times.
    share = math.ceil(ROWS / 128)
    inner = share * 16 / 32 / 4
    moved = HEADS * share * 128
    mangled = DTYPES["bf16"]
    cases += [
        Case("quantize_heads bf16, search", f"tops_of_partsI{mangled}Li8ELi128E", 8, (5, 1, inner), 2 * moved, 40),
        Case("quantize_heads bf16", f"quantize_partsI{mangled}Li8ELi128E", 8, (0, 5, 1, inner), 3 * moved, 40),
    ]
    return cases


def picture_cases() -> list[Case]:
    """Kernels that take a block per line of pixels."""
    cases = []
    for name, mangled in DTYPES.items():
        size = 4 if name == "fp32" else 2
        vector = 16 // size
        for channels, columns in ((96, 640), (192, 320), (384, 160)):
            lanes = channels // 3 // vector
            turns = (1, 1, math.ceil(columns / (8 * (32 // lanes))))
            line = columns * channels * size
            budget = 40 if name == "fp32" else 80
            for adding, (what, passes) in enumerate((("", 2), (" + bias", 2), (" + bias + residual", 4))):
                kernel = f"norm_linesI{mangled}Li{lanes}ELNS0_6AddingE{adding}E"
                label = f"channel_norm_silu {name} {channels}{what}"
                cases.append(Case(label, kernel, 8, turns, passes * line, budget))
        for channels, columns in ((96, 640), (384, 160)):
            pixels = 256 // (channels // vector)
            line, turns = columns * channels * size, (1, 1, math.ceil(columns / pixels))
            cases.append(Case(f"bias_residual {name} {channels}", f"add_linesI{mangled}E", 8, turns, 3 * line, 40))
            cases.append(
                Case(f"upsample_nearest {name} {channels}", f"upsample_linesI{mangled}Lb0E", 8, turns, 5 * line, 40)
            )
            label = f"upsample_nearest {name} {channels} + bias + residual"
            cases.append(Case(label, f"upsample_linesI{mangled}Lb1E", 8, turns, 6 * line, 40))
    return cases


CASES = row_cases() + picture_cases()


def occupancy(registers: int, warps: int) -> float:
    """Share of a multiprocessor's warps that fit at once; registers are given out by 256 to a warp."""
    by_registers = REGISTERS // (math.ceil(registers * 32 / 256) * 256) // warps
    return min(by_registers, BLOCKS, WARPS // warps) * warps / WARPS


def report(functions: dict[str, str], registers: dict[str, int]) -> tuple[list[str], list[str]]:
    """(lines of a Markdown table, what is above its budget) of kernels by their mangled names."""
    lines = ["| kernel | instructions per 512 bytes | budget | registers | occupancy |", "|---|---|---|---|---|"]
    above = []
    for case in CASES:
        names = [name for name in functions if case.kernel in name]
        if len(names) != 1:
            above.append(f"{case.label}: {len(names)} kernels are named {case.kernel}: mend the list of cases")
            continue
        try:
            count = sum(sass.count(functions[names[0]], case.turns, without=way) for way in case.ways)
        except ValueError as error:
            above.append(f"{case.label}: {error}: mend the list of cases")
            continue
        density = count * case.warps / (case.traffic / 512)
        held = registers.get(names[0], 0)
        lines.append(
            f"| {case.label} | {density:.0f} | {case.budget:g} | {held} | {100 * occupancy(held, case.warps):.0f} % |"
        )
        if density > case.budget:
            above.append(f"{case.label}: {density:.1f} warp instructions per 512 bytes, at most {case.budget:g}")
    return lines, above


def registers_of(printed: str) -> dict[str, int]:
    """Registers a thread of each kernel, from what ptxas -v prints."""
    found, name = {}, ""
    for line in printed.splitlines():
        if match := re.search(r"Function properties for (\S+)", line):
            name = match[1]
        elif match := re.search(r"Used (\d+) registers", line):
            found[name] = int(match[1])
    return found
