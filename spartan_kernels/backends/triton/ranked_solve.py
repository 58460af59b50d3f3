"""One budget over the lists of several ranks: the launches of a solve, and what the ranks send each other in between.

facts      cost of this rank's entries, and a sample of them                     -> sent
start
rounds x   survey, message                                                       -> sent
           advance
ties                                                                             -> sent
settle, write

Everything is on the stream and the host looks at nothing. So the number of rounds is fixed, and where all is found
already a round sends what nobody needs. No second write stands behind a step that misses: each is checked by a survey.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch

from spartan_kernels.backends.triton import global_kernels as together
from spartan_kernels.backends.triton import global_ranks as kernels
from spartan_kernels.backends.triton import global_steps as steps
from spartan_kernels.backends.triton.configs import (
    SAMPLE,
    SAMPLE_WARPS,
    CompileCase,
    name_of,
    power_of_two,
    program_block,
)
from spartan_kernels.backends.triton.global_solve import GlobalSolve
from spartan_kernels.backends.triton.global_steps import FACTS, MESSAGE
from spartan_kernels.backends.triton.launches import Launch, Recording, When
from spartan_kernels.backends.triton.solve_launches import (
    HISTOGRAM_BINS,
    STEP_WARPS,
    TYPES,
    Found,
    SolveLaunches,
)
from spartan_kernels.backends.triton.tensor_list import ListShape, Table
from spartan_kernels.groups import gather_into
from spartan_kernels.torch_private import process_group

# Surveys: four find any cut. Two or three find and check most soft thresholds; the rest are found from the cut.
HARD_ROUNDS = 4
SOFT_ROUNDS = 10


class Messages(NamedTuple):
    """What this rank sends and what all have sent, in their order: 64-bit words, also as float64 and as float32."""

    sent: torch.Tensor
    sent_sums: torch.Tensor
    sent_sample: torch.Tensor
    received: torch.Tensor
    sums: torch.Tensor
    sample: torch.Tensor


class RankedSolve:
    """The launches of one rank of the process group `name`, over its list of this shape, which may be empty."""

    def __init__(
        self, shape: ListShape, absolute: bool, soft: bool, hard: bool, name: str, rank: int, ranks: int
    ) -> None:
        # the cut is searched for in any case: the soft threshold may need it
        self.solve, self.hard, self.name = GlobalSolve(shape, absolute, soft, True), hard, name
        self.rank, self.ranks = rank, ranks
        self.share = max(1, SAMPLE // power_of_two(self.ranks))
        self.facts = int(FACTS) + self.share
        self.rounds = SOFT_ROUNDS if soft else HARD_ROUNDS
        self._kept: dict[tuple[bool, bool], list[tuple[Recording, int]]] = {}

    def messages(self) -> Messages:
        """Memory for what the ranks send."""
        words = max(self.facts, int(MESSAGE) + HISTOGRAM_BINS)
        both = torch.empty((1 + self.ranks) * words, dtype=torch.int64, device=self.solve.shape.device)
        sent, received = both[:words], both[words:]
        f64, f32 = torch.float64, torch.float32
        return Messages(sent, sent.view(f64), sent.view(f32), received, received.view(f64), received.view(f32))

    def segments(self, made: SolveLaunches, m: Messages) -> Iterator[tuple[list[Launch], int]]:
        """Launches, and how many words the ranks send each other after them."""
        facts = Found(m.sums, m.sample, m.received, self.ranks, self.facts, self.share)
        yield [*made.total_cost(), self._facts(made, m)], self.facts
        search, step = replace(made, hard=True), made.start(facts)
        for number in range(self.rounds):
            if number == HARD_ROUNDS:
                search = replace(made, hard=False)
            words = self._words(search)
            when: When = "always" if number < 2 else "rare"
            yield [step, search.survey(when, advance=False), self._message(search, m)], words
            step = search.advance(Found(m.sums, m.sample, m.received, self.ranks, words, self.share), when)
        last = [self._settle(made, m), made.write()]
        if made.hard:
            yield [step, *made.ties(), self._tied(made, m)], 1
            yield last, 0
        else:
            yield [step, *last], 0

    @staticmethod
    def _words(search: SolveLaunches) -> int:
        """Length of a message."""
        return int(MESSAGE) + HISTOGRAM_BINS * search.hard

    def run(
        self, table: Table, budget: torch.Tensor, beta: torch.Tensor, state: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Launch everything; returns (c, d)."""
        workspace, messages = self.solve.workspace(), self.messages()
        threshold = torch.empty(2, dtype=torch.float64, device=self.solve.shape.device)
        pointers = [table.words, budget, beta, threshold, *messages]
        pointers += [] if state is None else [state]
        pointers += workspace[: 5 + bool(self.solve.shape.array_costs)]
        addresses = [pointer.data_ptr() for pointer in pointers]
        kind = (state is not None, table.aligned)
        kept = self._kept.get(kind, [])
        if kept and all(recording.knows(addresses) for recording, _ in kept):
            for recording, words in kept:
                recording.replay(addresses, self.solve.shape.device)
                self._exchange(messages, words)
            return threshold
        made = self.solve.launches(table, budget, beta, state, threshold, workspace)
        made = replace(made, hard=self.hard)
        self._kept[kind] = []
        for launches, words in self.segments(made, messages):
            recording = Recording()
            recording.record(launches, pointers)
            self._kept[kind].append((recording, words))
            self._exchange(messages, words)
        return threshold

    def _exchange(self, m: Messages, words: int) -> None:
        if words:
            gather_into(m.received[: self.ranks * words], m.sent[:words], self.name)

    def _facts(self, made: SolveLaunches, m: Messages) -> Launch:
        p = made.shape
        arguments = (
            made.table.words, made.memory.partial, m.sent_sums, m.sent_sample,
            made.table.tensors, p.length, p.programs,
        )  # fmt: skip
        options = {"DTYPE": TYPES[p.dtype], "HAS_COSTS": bool(p.array_costs), "ABSOLUTE": made.absolute}
        options |= {"SHARE": self.share, "BLOCK": program_block(p.device), "num_warps": SAMPLE_WARPS}
        return Launch(kernels._facts_kernel, 1, arguments, options)

    def _message(self, made: SolveLaunches, m: Messages) -> Launch:
        own = made.memory
        arguments = (own.partial, own.tally, own.select, m.sent_sums, m.sent, made.shape.programs)
        options = {"SOFT": made.soft, "HARD": made.hard, "BLOCK": program_block(made.shape.device)}
        return Launch(kernels._message_kernel, 1, arguments, options | {"num_warps": STEP_WARPS})

    def _tied(self, made: SolveLaunches, m: Messages) -> Launch:
        options = {"BLOCK": program_block(made.shape.device), "num_warps": STEP_WARPS}
        return Launch(kernels._ties_message_kernel, 1, (made.memory.tally, m.sent, made.shape.programs), options)

    def _settle(self, made: SolveLaunches, m: Messages) -> Launch:
        options = {"SOFT": made.soft, "HARD": made.hard, "RANKS": power_of_two(self.ranks), "num_warps": 1}
        arguments = (made.memory.control, made.memory.select, m.received, self.rank)
        return Launch(kernels._settle_kernel, 1, arguments, options)


_ranked_solve = lru_cache(maxsize=256)(RankedSolve)


def ranked_solve(shape: ListShape, absolute: bool, soft: bool, hard: bool, name: str) -> RankedSolve:
    """The launches of this rank: made once for a shape and a group, whose name another group may have had before."""
    group = process_group(name)
    return _ranked_solve(shape, absolute, soft, hard, name, group.rank(), group.size())


def _compile_cases() -> list[CompileCase]:
    """For two ranks: `_start_kernel` and `_advance_kernel` as they are launched over ranks, and what these add."""
    share, message = SAMPLE // 2, int(MESSAGE) + HISTOGRAM_BINS
    flags = {
        "SOFT": True, "HARD": True, "ABSOLUTE": True, "HAS_STATE": True, "BINS": HISTOGRAM_BINS, "SAMPLE": SAMPLE,
        "SHARE": share, "STRIDE": message, "RANKS": 2, "BLOCK": 1024,
    }  # fmt: skip
    words = ("table_ptr", "select_ptr", "tally_ptr", "costs_ptr")
    types = dict.fromkeys(words, "*i64") | {"sample_ptr": "*fp32"}
    warps = {
        kernels._facts_kernel: SAMPLE_WARPS,
        kernels._message_kernel: STEP_WARPS,
        kernels._ties_message_kernel: STEP_WARPS,
        kernels._settle_kernel: 1,
        steps._start_kernel: SAMPLE_WARPS,
        together._advance_kernel: STEP_WARPS,
    }
    cases = []
    for kernel, threads in warps.items():
        for dtype, costs in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False)):
            if "HAS_COSTS" not in kernel.arg_names and (costs or dtype != torch.float32):
                continue  # the same kernel again
            constants = flags | {"DTYPE": TYPES[dtype], "HAS_COSTS": costs}
            constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
            signature = {
                name: types.get(name) or ("*fp64" if name.endswith("_ptr") else "i32")
                for name in kernel.arg_names
                if name not in constants
            }
            label = f"over ranks, {'costs, ' if costs else ''}{name_of(dtype)}"
            cases.append(CompileCase(kernel, signature, constants, threads, label, bounded=("n_tensors", "n_programs")))
    return cases


COMPILE_CASES = _compile_cases()
