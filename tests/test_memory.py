"""No leak: after ten thousand calls the process and the interpreter hold what they held before."""

from __future__ import annotations

import gc
import itertools
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import spartan.functional as F
from spartan_kernels import new_solver_state, ops

CALLS = 10_000
STATM = Path("/proc/self/statm")

pytestmark = pytest.mark.skipif(not STATM.exists(), reason="the size of the process is read from /proc")


def resident_bytes() -> int:
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def calls(backend: str) -> dict[str, Callable[[], Any]]:
    values = torch.randn(8, 64)
    leaf = values.clone().requires_grad_()
    weights = [torch.randn(300), torch.randn(5, 7)]
    soft, hard = [torch.empty_like(w) for w in weights], [torch.empty_like(w, dtype=torch.bool) for w in weights]
    state = new_solver_state()

    def gradient() -> None:
        F.soft_topk(leaf, 5.0, beta=3.0, backend=backend).sum().backward()
        leaf.grad = None

    return {
        "soft_topk": lambda: ops.soft_topk(values, 5.0, beta=3.0, backend=backend),
        "hard_topk": lambda: ops.hard_topk(values, 5.0, backend=backend),
        "soft_topk_global": lambda: ops.soft_topk_global(weights, 30.0, beta=3.0, backend=backend),
        "solve_masks": lambda: ops.solve_masks_(weights, 30.0, None, 3.0, soft, hard, state, backend=backend),
        "masked_weight": lambda: ops.masked_weight(weights[1], soft[1], hard[1], backend=backend),
        "gradient": gradient,
    }


@pytest.mark.operators("soft_topk_forward", "hard_topk_forward", "solve_masks_", "masked_weight_forward")
@pytest.mark.parametrize("name", sorted(calls("reference")))
def test_ten_thousand_calls_leak_nothing(target: Any, name: str, thread_count: None) -> None:
    if target.backend != "native":
        pytest.skip("the extension is what could leak; the others are PyTorch's own calls, and slow")
    torch.set_num_threads(1)
    call = calls(target.backend)[name]
    for _ in range(500):
        call()
    gc.collect()
    before = resident_bytes()
    for _ in range(CALLS - 500):
        call()
    # 64 bytes a call would be 600 KB
    assert resident_bytes() - before < 512 << 10

    tracemalloc.start()
    try:
        held = []
        for _ in range(5):
            for _ in range(500):
                call()
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0])
        # A leak shows in every round, the smallest object being 16 bytes; what is recycled comes to an end.
        assert min(after - before for before, after in itertools.pairwise(held)) < 500 * 16, held
    finally:
        tracemalloc.stop()
