"""PyTorch's default device and dtype are the caller's: results lie where the operands do, in their dtype."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

import spartan
from spartan import layers
from spartan_kernels import BlockSparseWeight, block_costs, dispatch
from spartan_kernels.testing import make_values

pytestmark = pytest.mark.usefixtures("one_thread")

# In a process of its own: a kernel that writes to memory of another device ends it.
_PROBES = """
import sys
import torch
from spartan_kernels import dispatch, probes

torch.set_num_threads(1)
inputs, name = probes.inputs_on(probes.make_inputs(), "cpu"), sys.argv[1]
for probe in probes.probes():
    if dispatch.refusal(probe.operator, name, "cpu", torch.float32):
        continue
    expected = probes._flat(probe.call(inputs, name))
    print(probe.operator, flush=True)
    with torch.device("meta"):
        found = probes._flat(probe.call(inputs, name))
    for ours, usual in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, usual, rtol=0, atol=0)
"""


@pytest.mark.parametrize("name", ["reference", "native"])
def test_every_probe_under_another_default_device(name: str) -> None:
    if problem := dispatch.unavailable(name):
        pytest.skip(problem)
    done = subprocess.run([sys.executable, "-c", _PROBES, name], capture_output=True, text=True, timeout=300)
    begun = done.stdout.split()
    assert done.returncode == 0, f"{begun[-1:]} ended with {done.returncode}: {done.stderr[-2000:]}"
    assert len(begun) >= len(dispatch.SUPPORT) - 1  # the CPU kernels take no float8


_LAYERS: dict[str, Callable[[], nn.Module]] = {
    "attention to the k largest": lambda: layers.TopKAttention(8, 2, 3, causal=True, beta=3.0, straight_through=True),
    "attention to blocks": lambda: layers.BlockGatedAttention(8, 2, 2, block=4),
    "attention of low rank": lambda: layers.ConnectivityAttention(8, 2, 12),
    "attention through gates": lambda: layers.GatedAttention(8, 2, places=12),
    "memory": lambda: layers.HierarchicalMemory(8, 6, 2, 2, gather=True),
    "experts": lambda: layers.ProductKeyExperts(8, 16, heads=2, k=3, key_dim=4),
    "experts of a sparse gradient": lambda: layers.ProductKeyExperts(8, 16, heads=2, k=3, key_dim=4, sparse=True),
    "autoencoder": lambda: layers.TopKAutoencoder(8, 32, 4, by="batch"),
}


def _same(call: Callable[[], list[torch.Tensor]]) -> None:
    usual = call()
    with torch.device("meta"):
        found = call()
    assert usual and len(found) == len(usual)
    for ours, theirs in zip(found, usual, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("make", _LAYERS.values(), ids=_LAYERS)
def test_layers(make: Callable[[], nn.Module]) -> None:
    layer, x = make(), make_values("normal", (2, 12, 8)).float()
    x = x.flatten(0, 1) if isinstance(layer, layers.TopKAutoencoder) else x

    def gradients() -> list[torch.Tensor]:
        own = copy.deepcopy(layer)
        torch.manual_seed(0)  # gates are drawn
        y = own(x)
        (y[0] if isinstance(y, tuple) else y).square().mean().backward()
        return [p.grad.to_dense() for p in own.parameters() if p.grad is not None]

    _same(gradients)


_METHODS: dict[str, Callable[[], spartan.methods.Method]] = {
    "single weights": lambda: spartan.methods.Spartan(sparsity=0.5),
    "blocks with ragged ones": lambda: spartan.methods.Spartan(sparsity=0.5, block_size=(8, 4)),
    "a draw of blocks": lambda: spartan.methods.StaticRandom(sparsity=0.5, block_size=4),
    "draws of candidates": lambda: spartan.methods.GSE(sparsity=0.5),
}


@pytest.mark.parametrize("method", _METHODS.values(), ids=_METHODS)
def test_training(method: Callable[[], spartan.methods.Method]) -> None:
    model, x = nn.Sequential(nn.Linear(18, 20), nn.ReLU(), nn.Linear(20, 6)), make_values("normal", (8, 18)).float()

    def trained() -> list[torch.Tensor]:
        own = copy.deepcopy(model)
        sparsifier = spartan.Sparsifier(own, method(), total_steps=3)
        optimizer = torch.optim.AdamW(own.parameters(), lr=0.01)
        sparsifier.attach(optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            own(x).square().mean().backward()
            optimizer.step()
        sparsifier.load_state_dict(sparsifier.state_dict())
        sparsifier.finalize()
        return [own(x), *own.parameters()]

    _same(trained)


def test_pruning_with_an_input_that_is_always_zero() -> None:
    model, x = nn.Sequential(nn.Linear(18, 20), nn.Linear(20, 6)), make_values("normal", (64, 18)).float()
    x[:, 3] = 0

    def pruned() -> list[torch.Tensor]:
        own = copy.deepcopy(model)
        spartan.prune(own, spartan.pruning.OBS(sparsity=0.5, block_size=4), [x])
        return [*own.parameters()]

    _same(pruned)


def test_costs_of_blocks_follow_the_default_device_or_the_one_that_is_named() -> None:
    with torch.device("meta"):
        free, named = block_costs((5, 4), (2, 2)), block_costs((5, 4), (2, 2), "cpu")
    assert isinstance(free, torch.Tensor) and isinstance(named, torch.Tensor)
    assert free.device.type == "meta" and named.tolist() == [[4, 4], [4, 4], [2, 2]]


def test_a_packed_weight_as_blocks_of_pytorch() -> None:
    packed = BlockSparseWeight.from_dense(make_values("normal", (8, 12)).float(), (4, 4))
    with torch.device("meta"):
        converted = packed.to_bsr()
    torch.testing.assert_close(converted.to_dense(), packed.to_dense(), rtol=0, atol=0)


@pytest.mark.skipif(dispatch.unavailable("native") is not None, reason="needs the native backend")
def test_a_convolution_under_another_default_dtype() -> None:
    weight, gate = make_values("normal", (16, 16, 1, 1)).float(), torch.eye(2).view(2, 2, 1, 1)
    image = make_values("normal", (2, 16, 9, 9)).float().to(memory_format=torch.channels_last)

    def gradients() -> list[torch.Tensor]:
        leaves = [image.clone().requires_grad_(), weight.clone().requires_grad_()]
        y = spartan.masked_conv2d(*leaves, gate, 8, backend="native")
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    usual = gradients()
    torch.set_default_dtype(torch.float64)
    try:
        found = gradients()
    finally:
        torch.set_default_dtype(torch.float32)
    for ours, theirs in zip(found, usual, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
