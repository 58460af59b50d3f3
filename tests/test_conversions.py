"""Models that are converted or moved after they were masked: masks and their bookkeeping follow as they must."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from spartan import RigL, Sparsifier, Spartan
from spartan.methods import Method

STEPS = 8
METHODS: list[Method] = [
    Spartan(sparsity=0.6, beta=4.0, beta_units="threshold", preserve_scale=True),
    Spartan(sparsity=0.6, block_size=(17, 17)),  # half precision has no 289
    RigL(sparsity=0.6, block_size=(17, 17), interval=2),
]
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name}-{m.block_size}")
COUNTED = {"mask_beta": torch.float64, "mask_costs": None, "mask_sizes": None}

pytestmark = pytest.mark.usefixtures("one_thread")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(36, 80), nn.Tanh(), nn.Conv1d(1, 34, 3, padding=1), nn.Flatten(), nn.Linear(2720, 3))


def trained(model: nn.Module, sparsifier: Sparsifier, steps: int = STEPS) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier.attach(optimizer)
    for step in range(steps):
        x = torch.randn(8, 1, 36, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        functional.cross_entropy(model(x).float(), x[:, 0, :3].argmax(1)).backward()
        optimizer.step()


@each_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("way", ["method", "to"])
def test_converted_after_masking_is_converted_before(method: Method, dtype: torch.dtype, way: str) -> None:
    """The same weights and masks, bit for bit, from the same start; counters keep types that hold them."""
    before, after = network(), network()
    before.to(dtype)
    wanted = Sparsifier(before, method, STEPS, count="masked")
    found = Sparsifier(after, method, STEPS, count="masked")
    kinds = {name: buffer.dtype for name, buffer in after.named_buffers()}
    if way == "to":
        after.to(dtype)
    else:
        {torch.bfloat16: after.bfloat16, torch.float16: after.half, torch.float64: after.double}[dtype]()
    counted = 0
    for name, buffer in after.named_buffers():
        if name.rpartition(".")[2] in COUNTED:
            assert buffer.dtype == torch.promote_types(kinds[name], buffer.dtype), name
            assert buffer.dtype in (torch.float32, torch.float64)
            counted += 1
    assert counted >= 6
    assert {name: b.dtype for name, b in after.named_buffers()} == {name: b.dtype for name, b in before.named_buffers()}
    trained(before, wanted)
    trained(after, found)
    for a, b in zip(before.parameters(), after.parameters(), strict=True):
        assert torch.equal(a, b)
    masks = found.masks()
    for name, mask in wanted.masks().items():
        assert mask.soft.dtype == masks[name].soft.dtype == dtype
        assert torch.equal(mask.soft, masks[name].soft) and torch.equal(mask.hard, masks[name].hard)
    state = copy.deepcopy(found.state_dict())
    found.load_state_dict(state)
    found.finalize()
    assert found.sparsity == pytest.approx(0.6, abs=0.1)


@each_method
def test_beta_is_not_rounded(method: Method) -> None:
    model = network()
    sparsifier = Sparsifier(model, method, STEPS, count="masked")
    trained(model, sparsifier, 2)
    betas = [tensor.carrier.mask_beta.clone() for tensor in sparsifier._masks.tensors]
    model.half()
    for tensor, beta in zip(sparsifier._masks.tensors, betas, strict=True):
        assert torch.equal(tensor.carrier.mask_beta, beta) and tensor.carrier.mask_beta.dtype is torch.float64


def test_masks_follow_a_model_that_moves() -> None:
    model: Any = network()
    sparsifier = Sparsifier(model, METHODS[0], STEPS, count="masked")
    assert sparsifier._masks.groups[0].device == torch.device("cpu")
    model.to("meta")
    assert sparsifier._masks.groups[0].device == torch.device("meta")
    assert all(tensor.seen.device.type == "meta" for tensor in sparsifier._masks.tensors)
