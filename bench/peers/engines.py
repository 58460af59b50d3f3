"""Inference engines as peers: each in a process of its own, perhaps in another environment, asked call by call."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.case import Peer
from bench.peers.engine_worker import ENGINES

PYTHON = "SPARTAN_BENCH_ENGINES"  # the Python that has onnx, onnxruntime, deepsparse; without it, this one
_AGREEMENT = 1e-4  # of the largest entry: all engines compute in float32
_WORKER = Path(__file__).with_name("engine_worker.py")


class Engine:
    """One engine with the stack loaded.

    Args:
        name: of the engine.
        folder: what the worker reads.

    Raises:
        RuntimeError: it does not load, with its reason.
    """

    def __init__(self, name: str, folder: tempfile.TemporaryDirectory[str]) -> None:
        command = [
            os.environ.get(PYTHON, sys.executable),
            str(_WORKER),
            name,
            folder.name,
            str(torch.get_num_threads()),
        ]
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        self.folder = folder  # lives as long as the engine
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        weakref.finalize(self, self.process.kill)
        if (said := self._read()) != "ready":
            raise RuntimeError(said or "its process ended without a word")

    def _read(self) -> str:
        assert self.process.stdout is not None  # a pipe
        return self.process.stdout.readline().strip()

    def __call__(self, x: Tensor, ask: str = "run") -> None:
        """Run once on the input that is there; `x` is not read."""
        assert self.process.stdin is not None  # a pipe
        self.process.stdin.write(f"{ask}\n")
        self.process.stdin.flush()
        if (said := self._read()) != "done":
            raise RuntimeError(said or "its process ended")

    def result(self, x: Tensor) -> Tensor:
        """The result of one call."""
        self(x, "save")
        return torch.from_numpy(np.load(Path(self.folder.name) / "y.npy"))


def peers(weights: Sequence[Tensor], x: Tensor, expected: Tensor) -> dict[str, Peer | str]:
    """Every engine with ReLU layers of `weights` [out, in], or why it is missing.

    Args:
        weights: float32, in order.
        x: [tokens, in], the input of every call.
        expected: the result, which each engine is compared with.
    """
    found: dict[str, Peer | str] = {}
    for name in ENGINES:
        folder = tempfile.TemporaryDirectory()
        np.save(Path(folder.name) / "x.npy", x.numpy())
        np.savez(Path(folder.name) / "layers.npz", **{str(i): weight.numpy() for i, weight in enumerate(weights)})
        try:
            engine = Engine(name, folder)
            error = float((engine.result(x) - expected).abs().max() / expected.abs().max())
        except RuntimeError as reason:
            found[name] = str(reason)
            continue
        found[name] = engine if error <= _AGREEMENT else f"its result is wrong by {error:.0%} of the largest entry"
    return found
