"""What a kernel issues for each trip of its hot loop, from its machine code: a graph of blocks and its longest way.

No GPU is needed, and none is imitated: an instruction counts once each time that a warp issues it, and the pipes that
execute it are those of compute capability 9.0 in the throughput table of NVIDIA's programming guide.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

_LABEL = re.compile(r"^(\.L_[\w.]+|\$?[\w.$]+):\s*$")
_LINE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\d+|!?U?PT)\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")
_TARGET = re.compile(r"`\((\.L_[\w.]+)\)")

# Cycles for which one of the four schedulers of a processor keeps a pipe busy with an instruction of 32 threads.
_XU = re.compile(r"MUFU|F2F\.(?:F64\.F32|F32\.F64)|[FI]2[FI]\S*64|POPC|FLO|BREV|I2F\S*64")
_FP64 = re.compile(r"D(?:ADD|MUL|FMA|SETP|MNMX)")
_LSU = re.compile(r"LDG|STG|LDS|STS|LD\.|ST\.|LDL|STL|SHFL|ATOM|RED\b|RED\.|REDG|LDSM|STSM|LDGSTS")
_FMA = re.compile(r"FADD|FMUL|FFMA|HADD2|HMUL2|HFMA2")
_INTEGER_FMA = re.compile(r"IMAD")
_HOT = (r"[HQI]G?MMA", r"MUFU", r"LDG\S*\.128")
_LOOP = 1000  # how many rare blocks a way takes rather than to pass by a loop
_NONE = re.compile(
    r"U[A-Z]|R2UR|S2|CS2R|LDC|BRA|EXIT|BSYNC|BSSY|BAR|NOP|CALL|RET|WARPSYNC|DEPBAR|HGMMA|HMMA|WARPGROUP|SYNCS"
)


@dataclass(frozen=True)
class Instruction:
    """One line of the disassembly."""

    name: str  # with its modifiers
    operands: str
    guard: str  # the predicate that lets it run
    target: str  # the label it may go on at

    @property
    def stem(self) -> str:
        """The name without modifiers."""
        return self.name.partition(".")[0]


def pipes(instructions: Iterable[Instruction]) -> Counter[str]:
    """Cycles of a scheduler by pipe; `issue` is one for every instruction."""
    busy: Counter[str] = Counter()
    for one in instructions:
        busy["issue"] += 1
        if _NONE.match(one.name):
            continue
        if _XU.match(one.name):
            busy["special"] += 8
        elif _FP64.match(one.name):
            busy["float64"] += 2
        elif _LSU.match(one.name):
            busy["memory"] += 4
        elif _FMA.match(one.name):
            busy["float32"] += 1
        elif _INTEGER_FMA.match(one.name):
            busy["float32"] += 2
        else:
            busy["integer"] += 2
    return busy


@dataclass
class Block:
    """Instructions that run one after the other, and where it may go on."""

    label: str
    code: list[Instruction] = field(default_factory=list)
    after: list[int] = field(default_factory=list)

    def has(self, pattern: str) -> bool:
        """Whether an instruction's name matches."""
        return any(re.match(pattern, one.name) for one in self.code)

    @cached_property
    def by_entry(self) -> bool:
        """Whether entries are accessed one by one, as only a chunk that is not full is."""
        single = [
            c for c in self.code if c.stem in ("LDG", "STG") and c.guard and not re.search(r"\.(?:64|128)", c.name)
        ]
        return len(single) >= 4


@dataclass(frozen=True)
class Loop:
    """A loop by the block that it begins at, and all of its blocks."""

    head: int
    body: frozenset[int]


class Graph:
    """The blocks of one kernel of a disassembly by `nvdisasm -c`.

    Args:
        rare: regular expression of instructions that ordinary entries do not come by, nor by the blocks right before.
    """

    def __init__(self, text: str, kernel: str, rare: str = "") -> None:
        self.blocks = _blocks(_section(text, kernel))
        self.rare = rare
        self._back: set[tuple[int, int]] = set()
        self.order = self._depth_first()

    def _depth_first(self) -> list[int]:
        """Blocks in an order in which all but the edges back come later; finds those edges."""
        done: list[int] = []
        state = {0: 1}
        stack = [(0, iter(self.blocks[0].after))]
        while stack:
            node, following = stack[-1]
            for after in following:
                if state.get(after) == 1:
                    self._back.add((node, after))
                elif after not in state:
                    state[after] = 1
                    stack.append((after, iter(self.blocks[after].after)))
                    break
            else:
                state[node] = 2
                done.append(node)
                stack.pop()
        return done[::-1]

    @cached_property
    def loops(self) -> list[Loop]:
        """All loops, those with the same head as one."""
        before: dict[int, set[int]] = defaultdict(set)
        for node in self.order:
            for after in self.blocks[node].after:
                before[after].add(node)
        bodies: dict[int, set[int]] = defaultdict(set)
        for tail, head in sorted(self._back):
            body, waiting = {head}, [tail]
            while waiting:
                node = waiting.pop()
                if node not in body:
                    body.add(node)
                    waiting += before[node]
            bodies[head] |= body
        return [Loop(head, frozenset(body)) for head, body in sorted(bodies.items())]

    def hot_loop(self) -> Loop | None:
        """The loop with most products of the tensor cores, else most special functions, else most loads of 16 bytes.

        Where there is none of these, the longest; among equals the innermost. None where there is no loop.
        """

        def score(loop: Loop) -> tuple[int, ...]:
            code = self.longest(loop.body, loop.head)
            kinds = [sum(bool(re.match(kind, one.name)) for one in code) for kind in _HOT]
            return (*kinds, 0 if any(kinds) else len(code), -len(loop.body))

        return max(self.loops, key=score, default=None)

    def longest(self, within: frozenset[int] | None = None, start: int = 0) -> list[Instruction]:
        """The code of the longest way through these blocks: by most loops, each once, and by least that is rare."""
        worth = {start: self._worth(start)}
        came: dict[int, int] = {}
        for node in self.order:
            for after in self.blocks[node].after if node in worth else ():
                if (node, after) in self._back or (within is not None and after not in within):
                    continue
                gained = self._worth(after)
                total = worth[node][0] + gained[0], worth[node][1] + gained[1]
                if after not in worth or total > worth[after]:
                    worth[after], came[after] = total, node
        tails = {tail for tail, head in self._back if head == start} if within is not None else self._ends()
        node = max((n for n in tails if n in worth), key=lambda n: worth[n])
        way = [node]
        while way[-1] != start:
            way.append(came[way[-1]])
        return [one for node in reversed(way) for one in self.blocks[node].code]

    def _worth(self, node: int) -> tuple[int, int]:
        """Loops and what is not rare, and how much is issued; a slow division and single entries are always rare.

        A loop that cannot be gone around without what is rare is nothing to go through, nor is one within it.
        """
        block = self.blocks[node]
        beside = block.by_entry or block.has("CALL")
        if self.rare and not beside:
            beside = block.has(self.rare) or any(self.blocks[after].has(self.rare) for after in block.after)
        return _LOOP * (node in self._ordinary) - beside, len(block.code)

    @cached_property
    def _ordinary(self) -> set[int]:
        """Heads of the loops that have a way around without what is rare, and lie in no loop that has none."""
        rare = [loop for loop in self.loops if not self._goes_around(loop)]
        return {loop.head for loop in self.loops if not any(loop.head in other.body for other in rare)}

    def _goes_around(self, loop: Loop) -> bool:
        seen: set[int] = set()
        waiting = [loop.head]
        while waiting:
            node = waiting.pop()
            if node in loop.body and node not in seen and not (self.rare and self.blocks[node].has(self.rare)):
                seen.add(node)
                waiting += self.blocks[node].after
        return any((node, loop.head) in self._back for node in seen)

    def _ends(self) -> set[int]:
        return {node for node in self.order if self.blocks[node].has("EXIT")}


def _section(text: str, kernel: str) -> list[str]:
    parts = re.split(r"^//-+ \.text\.(\S+)\s+-+.*$", text, flags=re.MULTILINE)
    for name, body in zip(parts[1::2], parts[2::2], strict=True):
        if name == kernel:
            return re.split(r"^//-", body, maxsplit=1, flags=re.MULTILINE)[0].splitlines()
    raise ValueError(f"the disassembly has no kernel {kernel}")


def _blocks(lines: list[str]) -> list[Block]:
    blocks = [Block("")]
    for line in lines:
        label = _LABEL.match(line)
        if label:
            blocks.append(Block(label[1]))
            continue
        match = _LINE.match(line)
        if not match:
            continue
        target = _TARGET.search(match[3])
        one = Instruction(match[2], match[3], match[1] or "", target[1] if target and match[2][:3] == "BRA" else "")
        blocks[-1].code.append(one)
        if one.stem in ("BRA", "EXIT", "RET"):
            blocks.append(Block(""))
    place = {block.label: index for index, block in enumerate(blocks) if block.label}
    for index, block in enumerate(blocks):
        last = block.code[-1] if block.code else None
        falls = last is None or last.stem not in ("BRA", "EXIT", "RET") or (last.guard not in ("", "PT"))
        if falls and index + 1 < len(blocks):
            block.after.append(index + 1)
        if last is not None and last.target:
            block.after.append(place[last.target])
    return blocks
