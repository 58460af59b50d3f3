"""What a sanitizer must report: `overflow` reads past an allocation, `race` writes from two threads."""

from __future__ import annotations

import ctypes
import sys
import threading

import torch

import tests.sanitizers.plugin  # noqa: F401  the instrumented extension
from spartan_kernels import ops

COUNT = 1000


def overflow() -> None:
    """Give the solver one value more than was allocated."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    address = libc.malloc(4 * COUNT)
    ctypes.memset(address, 0, 4 * COUNT)
    values = torch.frombuffer((ctypes.c_float * (COUNT + 1)).from_address(address), dtype=torch.float32)
    ops.soft_topk_global([values], 1.0, backend="native")


def race() -> None:
    """Let two threads write the same masks."""
    values = torch.randn(1 << 20)
    soft, hard = torch.empty_like(values), torch.empty_like(values, dtype=torch.bool)

    def solve() -> None:
        for _ in range(5):
            ops.solve_masks_([values], 1e4, None, 1.0, [soft], [hard], ops.new_solver_state(), backend="native")

    threads = [threading.Thread(target=solve) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    {"overflow": overflow, "race": race}[sys.argv[1]]()
