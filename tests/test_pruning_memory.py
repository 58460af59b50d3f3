"""Memory of pruning: what is alive above the model, as PyTorch's allocator reports it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import spartan
from spartan.nn.selection import find_weights
from spartan.pruning.hessian import factor
from spartan.pruning.layers import Layer
from spartan.pruning.statistics import Statistics
from tests.test_pruning import data

pytestmark = pytest.mark.usefixtures("one_thread")


def peak(work: Callable[[], Any], folder: Path) -> int:
    """The most bytes that were allocated at a time, above those at first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    profiled.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text("utf-8"))["traceEvents"]
    memory = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    now = most = 0
    for event in memory:
        now += event["args"]["Bytes"]
        most = max(most, now)
    return most


class Block(nn.Module):
    """A layer of a transformer, without its attention's softmax; its widest layer has four times its inputs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mix(self.norm(x))
        return x + self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize(
    ("method", "bytes_of_an_entry"),
    [
        (spartan.Wanda(sparsity=0.5), 4),
        (spartan.OBS(sparsity=0.5), 8),
        (spartan.OBS(sparsity=0.5, distribution="global"), 8),
        (spartan.OBS(sparsity=0.5, block_size=(4, 1)), 8),
    ],
    ids=["Wanda", "OBS", "OBS, one budget", "OBS, blocks"],
)
def test_pruning_takes_at_most_three_hessians(method: Any, bytes_of_an_entry: int, tmp_path: Path) -> None:
    """Of the widest layer, as the method sums it (float32) or factors it (float64)."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(256), Block(256))
    batches = [torch.randn(32, 256) for _ in range(2)]
    spartan.prune(copy.deepcopy(model), method, batches, include="*.weight")  # the kernels keep a workspace
    most = peak(lambda: spartan.prune(model, method, batches, include="*.weight"), tmp_path)
    assert most <= 3 * bytes_of_an_entry * 1024**2, f"{most / 2**20:.1f} MiB"


def test_patches_of_an_image_are_not_laid_out_all_at_once(tmp_path: Path) -> None:
    """All would be 40 MiB; the Hessian has 0.3."""
    torch.manual_seed(0)
    model, images = nn.Conv2d(32, 8, 3), [torch.randn(1, 32, 192, 192)]
    spartan.prune(copy.deepcopy(model), spartan.Wanda(sparsity=0.5), images, include="weight")
    most = peak(lambda: spartan.prune(model, spartan.Wanda(sparsity=0.5), images, include="weight"), tmp_path)
    assert most < 16 * 2**20, f"{most / 2**20:.1f} MiB"


@pytest.mark.parametrize("n", [1, 7, 128, 301])
@pytest.mark.parametrize("groups", [1, 3])
def test_the_factor_of_the_inverse_is_that_of_a_direct_solution(n: int, groups: int) -> None:
    """In place and by halves; no entry of the products changes."""
    seen = Statistics(products=True)
    inputs = torch.stack([data(2 * n + 3, n, seed) for seed in range(groups)])
    seen.add(inputs)
    assert seen.products is not None
    before = seen.products.clone()
    layer = Layer(find_weights(nn.Linear(2, 2))[0], (1, 1))
    upper = factor(layer, seen, 0.01).upper
    gram = inputs.mT @ inputs
    eye = torch.eye(n, dtype=torch.float64)
    gram = gram + 0.01 * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * eye
    torch.testing.assert_close(upper.mT @ upper @ gram, eye.expand_as(gram), rtol=0, atol=1e-7)
    assert torch.equal(upper, upper.triu()) and torch.equal(seen.products, before)
