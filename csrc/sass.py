"""Instructions that one warp issues, counted from the disassembly of a kernel.

The disassembly becomes a graph of basic blocks. A loop is found by its back edge, an edge to a block that dominates its
source, and its instructions count as often as the loop turns; how often is told, loop by loop in the order of their first
addresses. Among the ways through the rest the longest one counts. Subroutines (the rare cases of division and square root)
are not followed. So the count is an upper bound of what a warp issues.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE)
_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")


@dataclass(frozen=True, slots=True)
class Instruction:
    address: int
    is_predicated: bool
    opcode: str
    operands: str

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        match = _TARGET.search(self.operands.strip())
        return int(match[1], 16) if match and self.opcode.split(".")[0] == "BRA" else None

    @property
    def may_fall_through(self) -> bool:
        if self.opcode.split(".")[0] in ("BRA", "EXIT", "RET"):
            # A branch's own condition may stand among its operands instead of before it.
            return self.is_predicated or bool(re.match(r"!?U?P\w+\s*,", self.operands.strip()))
        return True


@dataclass(slots=True)
class Block:
    """Instructions with one way in and one way out."""

    instructions: list[Instruction]
    successors: list[int] = field(default_factory=list)


def parse(code: str) -> list[Instruction]:
    """The instructions of one function as cuobjdump prints them."""
    return [Instruction(int(m[1], 16), m[2] is not None, m[3], m[4]) for m in _LINE.finditer(code)]


def blocks_of(instructions: list[Instruction]) -> dict[int, Block]:
    """Basic blocks by their first address."""
    following = {a.address: b.address for a, b in itertools.pairwise(instructions)}
    leaders = {instructions[0].address}
    for one in instructions:
        if one.target is not None:
            leaders.add(one.target)
        if (one.target is not None or not one.may_fall_through) and one.address in following:
            leaders.add(following[one.address])
    blocks: dict[int, Block] = {}
    for one in instructions:
        if one.address in leaders:
            current = blocks[one.address] = Block([])
        current.instructions.append(one)
    for block in blocks.values():
        last = block.instructions[-1]
        if last.target is not None:
            block.successors.append(last.target)
        if last.may_fall_through and last.address in following:
            block.successors.append(following[last.address])
    return blocks


def _reachable(blocks: dict[int, Block], entry: int, without: int | None = None) -> set[int]:
    found: set[int] = set()
    waiting = [] if entry == without else [entry]
    while waiting:
        address = waiting.pop()
        if address not in found:
            found.add(address)
            waiting += [other for other in blocks[address].successors if other != without]
    return found


def loops_of(blocks: dict[int, Block]) -> dict[int, set[int]]:
    """The blocks of every loop, by the address of its first block."""
    entry = min(blocks)
    reached = _reachable(blocks, entry)
    sources: dict[int, set[int]] = {address: set() for address in reached}
    for address in reached:
        for target in blocks[address].successors:
            sources[target].add(address)
    loops: dict[int, set[int]] = {}
    for address in reached:
        for head in blocks[address].successors:
            if address in _reachable(blocks, entry, without=head):
                continue  # there is a way to the source that does not pass the target: no back edge
            body, waiting = loops.setdefault(head, {head}), [address]
            while waiting:
                inside = waiting.pop()
                if inside not in body:
                    body.add(inside)
                    waiting += sources[inside]
    return dict(sorted(loops.items()))


def count(code: str, turns: Sequence[float], *, without: str | None = None) -> float:
    """Instructions that one warp issues, with the loops turning so often each.

    without is an opcode: blocks that hold it are not gone through. Raises ValueError on another number of loops.
    """
    blocks = blocks_of(parse(code))
    loops = loops_of(blocks)
    if len(loops) != len(turns):
        raise ValueError(f"{len(loops)} loops (at {', '.join(map(hex, loops))}), but turns for {len(turns)} are given")
    weights = {}
    for address, block in blocks.items():
        weight = float(len(block.instructions))
        for (_, body), times in zip(loops.items(), turns, strict=True):
            weight *= times if address in body else 1
        weights[address] = weight
    barred = {address for address, block in blocks.items() if any(one.opcode == without for one in block.instructions)}
    longest: dict[int, float] = {}

    def longest_from(address: int) -> float:
        if address not in longest:
            on = [
                other
                for other in blocks[address].successors
                if address not in loops.get(other, ()) and other not in barred
            ]
            longest[address] = weights[address] + max((longest_from(other) for other in on), default=0.0)
        return longest[address]

    return longest_from(min(blocks))
