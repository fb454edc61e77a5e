"""What a compiled kernel does, read from its disassembly.

    issue slots of a warp = sum over instructions of the trip counts of the loops around it

Loops are the natural loops of the control-flow graph: an edge u -> v closes a loop where v dominates u. A launch
declares its trip counts by nesting depth, outermost first; a loop deeper than that is reported as undeclared and
counted once. What the compiler unrolled is straight-line code and counts as such, so a declared inner loop that is
gone costs nothing extra. The count is an upper bound: both sides of a branch count, predicated instructions count,
pipelined loops count their full trips beside their prologue. Not counted: the out-of-line slow paths of division and
square root (denormal operands) and the polls of a barrier that waits for a bulk copy.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")
_LABEL = re.compile(r"^(\.L_\w+|\$\S+|\.text\.\S+):")
_TARGET = re.compile(r"`\((\.L_\w+)\)")
_ACCESS_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
_GLOBAL = ("LDG", "LDGSTS", "STG")
_BULK = ("UTMALDG", "UTMASTG", "UTMAREDG", "UBLKCP")
_MATRIX = re.compile(r"^(?:HGMMA|QGMMA)\.64x(\d+)x(\d+)|^HMMA\.(16816|1688)")


@dataclass(frozen=True)
class Instruction:
    """predicated: runs only where its predicate holds. target: label of a branch."""

    opcode: str
    predicated: bool
    target: str | None

    @property
    def name(self) -> str:
        return self.opcode.split(".", 1)[0]


@dataclass
class Profile:
    """Executed instructions of one warp, weighted with trip counts, except `instructions`, the length of the code.

    access: bytes of global memory a full warp moves, by the width in bits of the access. matrix: multiply-adds of its
    matrix instructions, a fourth of a warpgroup's each. undeclared: loops without a trip count.
    """

    instructions: int = 0
    slots: int = 0
    wgmma: int = 0
    mma: int = 0
    special: int = 0
    local: int = 0
    bulk: int = 0
    atomic_adds: int = 0
    matrix: int = 0
    undeclared: int = 0
    access: dict[int, int] = field(default_factory=dict)

    def share_at_least(self, bits: int) -> float:
        """Share of the global bytes moved in accesses of at least this width; bulk copies are outside the count."""
        total = sum(self.access.values())
        return sum(n for width, n in self.access.items() if width >= bits) / total if total else 1.0


def parse(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions of the first function of an nvdisasm listing, and the index that each label stands before.

    Code after the first label that starts with $ belongs to out-of-line helpers and is left out.
    """
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            if label[1].startswith("$"):
                break
            labels[label[1]] = len(code)
        elif found := _INSTRUCTION.search(line):
            target = _TARGET.search(found[3])
            branches = found[2].split(".")[0] in ("BRA", "BRX", "JMP")
            code.append(Instruction(found[2], bool(found[1]), target[1] if target and branches else None))
    if not code:
        raise ValueError("no instruction found in the disassembly; is it the output of nvdisasm -c for a cubin?")
    return code, labels


def profile(text: str, trips: Sequence[int] = ()) -> Profile:
    """Read a listing of `nvdisasm -c`. trips: the launch's trip counts, outermost loop first."""
    code, labels = parse(text)
    weight, undeclared = _weights(code, labels, trips)
    out = Profile(instructions=len(code), undeclared=undeclared)
    for instruction, times in zip(code, weight, strict=True):
        if times == 0:
            continue
        parts, name = instruction.opcode.split("."), instruction.name
        out.slots += times
        out.special += times * (name == "MUFU")
        out.local += times * (name in ("LDL", "STL"))
        out.bulk += times * (name in _BULK)
        out.atomic_adds += times * (name in ("RED", "REDG", "ATOM", "ATOMG", "UTMAREDG") and "ADD" in parts)
        out.wgmma += times * (name in ("HGMMA", "QGMMA") or name.startswith("UTC"))
        out.mma += times * (name == "HMMA")
        out.matrix += times * _multiply_adds(instruction.opcode)
        if name in _GLOBAL:
            size = max((_ACCESS_BYTES[p] for p in parts if p in _ACCESS_BYTES), default=4)
            out.access[8 * size] = out.access.get(8 * size, 0) + times * 32 * size
    return out


def _multiply_adds(opcode: str) -> int:
    found = _MATRIX.match(opcode)
    if not found:
        return 0
    if found[3]:
        return 16 * 8 * int(found[3][3:])
    return 64 * int(found[1]) * int(found[2]) // 4


def _weights(code: list[Instruction], labels: dict[str, int], trips: Sequence[int]) -> tuple[list[int], int]:
    """How often one warp runs each instruction (0 where it cannot come), and the number of undeclared loops."""
    blocks = _blocks(code, labels)
    reached, dominators = _dominators([b[2] for b in blocks])
    loops: dict[int, set[int]] = {}
    for u in reached:
        for v in blocks[u][2]:
            if v in dominators[u]:
                loops.setdefault(v, {v}).update(_body(u, v, blocks, reached))
    loops = {head: body for head, body in loops.items() if not _polls(body, blocks, code)}
    weight, undeclared = [0] * len(code), set()
    for b in reached:
        around = [head for head, body in loops.items() if b in body]
        times = 1
        for depth in range(len(around)):
            times *= trips[depth] if depth < len(trips) else 1
        if len(around) > len(trips):
            undeclared.update(head for head in around if sum(head in body for body in loops.values()) > len(trips))
        for i in range(blocks[b][0], blocks[b][1]):
            weight[i] = times
    return weight, len(undeclared)


def _polls(body: set[int], blocks: list[tuple[int, int, list[int]]], code: list[Instruction]) -> bool:
    inside = [code[i] for b in body for i in range(blocks[b][0], blocks[b][1])]
    return len(inside) <= 8 and any("TRYWAIT" in i.opcode for i in inside)


def _blocks(code: list[Instruction], labels: dict[str, int]) -> list[tuple[int, int, list[int]]]:
    """Basic blocks (first instruction, one past the last, successors)."""
    ends = {i + 1 for i, x in enumerate(code) if x.target or x.name in ("EXIT", "RET", "BRX", "JMX")}
    starts = sorted(s for s in {0} | set(labels.values()) | ends if s < len(code))
    number = {start: n for n, start in enumerate(starts)}
    blocks = []
    for n, start in enumerate(starts):
        end = starts[n + 1] if n + 1 < len(starts) else len(code)
        last, after = code[end - 1], []
        if last.target:
            after.append(number[labels[last.target]])
        stops = (last.target or last.name in ("EXIT", "RET")) and not last.predicated and not _conditional(last)
        if not stops and end < len(code):
            after.append(n + 1)
        blocks.append((start, end, after))
    return blocks


def _conditional(instruction: Instruction) -> bool:
    """BRA.DIV and BRA.CONV fall through although they carry no predicate in front."""
    return any(part in instruction.opcode.split(".") for part in ("DIV", "CONV"))


def _dominators(successors: list[list[int]]) -> tuple[list[int], dict[int, set[int]]]:
    """Blocks that can be reached, in order, and for each the blocks that every path to it passes."""
    seen, stack = {0}, [0]
    while stack:
        for v in successors[stack.pop()]:
            if v not in seen:
                seen.add(v)
                stack.append(v)
    reached = sorted(seen)
    before = {v: [u for u in reached if v in successors[u]] for v in reached}
    dominators = {v: {0} if v == 0 else set(reached) for v in reached}
    changed = True
    while changed:
        changed = False
        for v in reached[1:]:
            new = {v} | set.intersection(*(dominators[u] for u in before[v]))
            if new != dominators[v]:
                dominators[v], changed = new, True
    return reached, dominators


def _body(tail: int, head: int, blocks: list[tuple[int, int, list[int]]], reached: list[int]) -> set[int]:
    """Blocks of the loop that the edge tail -> head closes: those that reach tail without passing head."""
    body, stack = {head, tail}, [tail] if tail != head else []
    while stack:
        block = stack.pop()
        for u in reached:
            if block in blocks[u][2] and u not in body:
                body.add(u)
                stack.append(u)
    return body
