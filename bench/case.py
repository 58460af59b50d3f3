"""What a benchmark case is, and how one is registered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Peer = Callable[..., Any]


@dataclass(frozen=True)
class Settings:
    """What the command line asked for."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    quick: bool = False
    backend: str | None = None


@dataclass(frozen=True)
class Work:
    """One problem, ready to run.

    Attributes:
        ours: the timed call; takes one set of operands.
        operands: sets of operands, walked in turn so that small ones do not stay in the cache (`rotated`).
        check: raises AssertionError when the result of `ours` is wrong; takes the result and its operands.
        bytes: the least that any implementation must move, per call.
        flops: the least that any implementation must compute, per call; 0 where bytes are the limit.
        peers: other implementations by name, on the same operands; a string says why one cannot run here.
        prepare: runs untimed before every call of ours and of the peers, on the operands.
        breakdown: runs once and returns seconds by part.
        notes: numbers worth keeping with the result.
        seconds: the most that ours and each peer are timed for, where a table of many cases has to end in time.
    """

    ours: Peer
    operands: Sequence[tuple[Any, ...]]
    check: Callable[..., None]
    bytes: int
    flops: int = 0
    peers: dict[str, Peer | str] = field(default_factory=dict)
    prepare: Callable[..., None] | None = None
    breakdown: Callable[[], dict[str, float]] | None = None
    notes: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None


@dataclass(frozen=True)
class Case:
    """A registered case: `name` is unique, `op` is what the command line selects by.

    Attributes:
        quick: --quick runs it too.
        gpu: only a GPU is asked for it, unless it is named itself.
    """

    op: str
    name: str
    build: Callable[[Settings], Work]
    quick: bool = True
    gpu: bool = False


CASES: dict[str, Case] = {}


def case(
    op: str, name: str, *, quick: bool = True, gpu: bool = False
) -> Callable[[Callable[[Settings], Work]], Callable[[Settings], Work]]:
    """Register the builder of a case as `op/name`."""

    def register(build: Callable[[Settings], Work]) -> Callable[[Settings], Work]:
        key = f"{op}/{name}"
        if key in CASES:
            raise ValueError(f"case {key!r} is registered twice")
        CASES[key] = Case(op, key, build, quick, gpu)
        return build

    return register


def select(patterns: Sequence[str], quick: bool = False, device: str = "cpu") -> list[Case]:
    """Cases whose op or name is one of `patterns`; all of them for none.

    With `quick`, a case that is not a quick one has to be named itself; so has one for a GPU where `device` is none.

    Raises:
        ValueError: a pattern that matches nothing; the message lists the ops.
    """
    for pattern in patterns:
        if not any(pattern in (c.op, c.name) for c in CASES.values()):
            ops = ", ".join(sorted({c.op for c in CASES.values()}))
            raise ValueError(f"no benchmark is called {pattern!r}; allowed: {ops}, or a case from --list")

    def asked(c: Case) -> bool:
        return (c.quick or not quick) and (not c.gpu or torch.device(device).type == "cuda")

    by_op = [c for c in CASES.values() if not patterns or c.op in patterns]
    return [c for c in CASES.values() if c.name in patterns or (c in by_op and asked(c))]
