"""What the headline times, the most wanted first: names, backends, and the work behind each."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from bench import cases, cases_global
from bench.case import Settings, Work
from bench.gpu import products, records, training

_BACKENDS = ("triton", "cuda")
_SOLVERS = {
    "triton": "spartan_kernels.backends.triton.global_solve",
    "cuda": "spartan_kernels.backends.cuda.lists",
}
_COUNTED = 10
_ROWS_PEERS = ("copy", "torch.topk (hard)")


@dataclass(frozen=True)
class Entry:
    """One case of the headline.

    Attributes:
        build: makes the work, from the settings.
        graph: whether the call is also captured and replayed.
        counted: whether it is a solve, of which the backend can tell what it had to do.
    """

    name: str
    backend: str
    build: Callable[[Settings], Work]
    dtype: torch.dtype = torch.float32
    graph: bool = True
    counted: bool = False

    def work(self) -> Work:
        """The problem on this machine's device, small in a rehearsal."""
        return self.build(Settings(records.device_name(), self.dtype, records.rehearsing(), self.backend))

    def counts(self, work: Work) -> dict[str, float]:
        """Of some solves: passes over the values in the mean and at most; masks written again, and trials, in all."""
        if not self.counted:
            return {}
        last = getattr(importlib.import_module(_SOLVERS[self.backend]), "last_solve", None)
        if last is None:
            return {}
        seen = []
        for _ in range(1 if records.rehearsing() else _COUNTED):
            work.prepare(*work.operands[0])  # type: ignore[misc]
            work.ours(*work.operands[0])
            seen.append(last())
        return {
            "solves": len(seen),
            "passes": sum(one.passes for one in seen) / len(seen),
            "most passes": max(one.passes for one in seen),
            "rewrites": sum(one.rewrites for one in seen),
            "trials": sum(one.trials for one in seen),
        }


def _solve(s: Settings, shapes: list[tuple[int, ...]], warm: bool) -> Work:
    if s.quick:
        shapes = [(500, 1)] if len(shapes) == 1 else [(16, 24), (7, 1), (9, 3)]
    return cases_global.training_step_masks(s, shapes, warm, peers=("copy",))


def _rows(s: Settings, rows: int, n: int, k: float) -> Work:
    if s.quick:
        rows, n = 4, min(n, 64)
        k = min(k, n / 2)
    return cases.soft_rows(s, rows, n, k, 10.0, peers=_ROWS_PEERS)


def _solves(backend: str) -> list[Entry]:
    networks = {"one tensor": [(25_600_000, 1)], "ResNet-50": cases_global.resnet50_shapes()}
    return [
        Entry(
            f"solve {name} {start} {backend}",
            backend,
            partial(_solve, shapes=shapes, warm=start == "warm"),
            counted=True,
        )
        for name, shapes in networks.items()
        for start in ("warm", "cold")
    ]


def _all_rows(backend: str) -> list[Entry]:
    shapes = ((8192, 4096, 409.0), (65536, 64, 8.0), (1_000_000, 4, 2.0))
    return [Entry(f"rows {rows}x{n} {backend}", backend, partial(_rows, rows=rows, n=n, k=k)) for rows, n, k in shapes]


def _products(backend: str, sparsity: float, blocks: tuple[int, ...] = products.BLOCKS) -> list[Entry]:
    return [
        Entry(
            f"{what} block {block} {sparsity:.0%} zeros {backend}",
            backend,
            partial(build, block=block, sparsity=sparsity),
            torch.bfloat16,
        )
        for block in blocks
        for what, build in products.DIRECTIONS.items()
    ]


def _few_tokens(backend: str) -> list[Entry]:
    return [
        Entry(
            f"{tokens} tokens block {block} 90% zeros {backend}",
            backend,
            partial(products.forward, block=block, sparsity=0.9, tokens=tokens),
            torch.bfloat16,
        )
        for tokens in (1, 16)
        for block in (32, 128)
    ]


def _single_weights(backend: str) -> list[Entry]:
    return [
        Entry(
            f"{tokens} tokens single weights {sparsity:.0%} zeros {backend}",
            backend,
            partial(products.single_weights, sparsity=sparsity, tokens=tokens),
            torch.bfloat16,
        )
        for tokens in (1, 4)
        for sparsity in (0.8, 0.9)
    ]


def _float8(backend: str, blocks: tuple[int, ...] = products.BLOCKS) -> list[Entry]:
    return [
        Entry(
            f"float8 block {block} 90% zeros {backend}",
            backend,
            partial(products.float8, block=block, sparsity=0.9),
            torch.bfloat16,
        )
        for block in blocks
    ]


def _training() -> list[Entry]:
    return [
        Entry(f"training step ViT-B/16 {name}", "triton", partial(training.step, method=method))
        for name, method in training.METHODS.items()
    ]


def entries() -> list[Entry]:
    """Both backends' solves and rows, the products of Triton at 90% zeros, whole steps, float8, then all the rest."""
    found = [entry for backend in _BACKENDS for entry in _solves(backend)]
    found += [entry for backend in _BACKENDS for entry in _all_rows(backend)]
    if records.rehearsing():  # each kind once: the code is the same
        few = (32,)
        return [
            *found,
            *_products("triton", 0.9, few),
            *(entry for entry in _training() if "128" not in entry.name),
            *_few_tokens("triton")[:1],
            *_single_weights("triton")[:1],
            *_float8("triton", few),
            *_products("cuda", 0.9, few),
        ]
    found += _products("triton", 0.9)
    found += _training()
    found += _float8("triton")
    found += [entry for backend in _BACKENDS for entry in _few_tokens(backend)] + _single_weights("triton")
    found += _products("cuda", 0.9) + _products("triton", 0.8) + _products("cuda", 0.8)
    return found
