"""The CPU that stands in for a GPU: its graphs follow their inputs, and refuse what a capture does not allow."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from spartan_kernels import BlockSparseWeight, block_scores, dispatch, probes
from spartan_kernels.devices import StandIn, device_of

pytestmark = pytest.mark.usefixtures("one_thread")
_X = torch.arange(12.0).view(3, 4)

_WAITING: dict[str, Callable[[], object]] = {
    "a choice by a mask": lambda: _X[_X > 3],
    "a choice by a mask beside a slice": lambda: _X[:, torch.tensor([True, False, True, False])],
    "a store by a mask of as many values": lambda: _X.clone().index_put_((_X > 3,), torch.ones(8)),
    "places of what is not zero": lambda: _X.nonzero(),
    "masked_select": lambda: _X.masked_select(_X > 3),
    "unique values": lambda: _X.unique(),
    "bincount": lambda: torch.bincount(torch.tensor([1, 2, 2])),
    "repeat_interleave without a size": lambda: _X[0].repeat_interleave(torch.tensor([1, 2, 3, 4])),
    "packing": lambda: BlockSparseWeight.from_dense(_X, (1, 2)),
}


@pytest.mark.parametrize("call", _WAITING.values(), ids=_WAITING)
def test_a_capture_refuses_what_waits_for_the_device(call: Callable[[], object]) -> None:
    with pytest.raises(RuntimeError, match="waits for the device"):
        StandIn().capture(call)
    call()  # and nothing of the refusal is left behind


def test_a_capture_refuses_what_waits_inside_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    from spartan_kernels.backends.reference import masked_weight

    right = masked_weight.block_scores
    monkeypatch.setattr(masked_weight, "block_scores", lambda o: right(o) + o.weight.nonzero().shape[0] * 0)
    dispatch.implementation.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=r"nonzero.* waits for the device"):
            StandIn().capture(lambda: block_scores(_X, (1, 2), backend="reference"))
    finally:
        dispatch.implementation.cache_clear()


def test_a_capture_lets_pass_what_runs_on_the_device_alone() -> None:
    def call() -> torch.Tensor:
        filled = _X.clone()
        filled[filled > 3] = 0.0
        rows = _X[0].repeat_interleave(torch.tensor([1, 2, 3, 4]), output_size=10)
        return filled.sum() + rows.sum() + _X[torch.tensor([0, 2])].sum()

    StandIn().capture(call)


def test_a_replay_follows_its_inputs() -> None:
    x, total = torch.ones(3), torch.zeros(())

    def call() -> list[torch.Tensor]:
        total.copy_(x.sum())
        return [x * 2, total]

    graph = StandIn().capture(call)
    doubled, summed = graph.result
    x.fill_(5)
    assert doubled.tolist() == [2, 2, 2]
    graph.replay()
    assert doubled.tolist() == [10, 10, 10] and float(summed) == 15


_ON_A_GPU = [probe for probe in probes.probes() if {"triton", "cuda"} & dispatch.SUPPORT[probe.operator].keys()]


@pytest.mark.parametrize("probe", _ON_A_GPU, ids=lambda probe: probe.operator)
def test_every_probe_can_be_captured(probe: probes.Probe) -> None:
    """The probe itself must not wait, whichever backend computes it; here the first that serves this machine."""
    serving = [n for n in dispatch.BACKENDS if not dispatch.refusal(probe.operator, n, "cpu", torch.float32)]
    name = serving[-1] if "conv2d" in probe.operator else serving[0]  # the native convolution looks at its index
    inputs = probes.make_inputs()
    moved = probes.inputs_on(inputs, "cpu")
    graph = StandIn().capture(lambda: probe.call(moved, name))
    graph.replay()
    assert probes.compare(graph.result, probe.call(inputs, "reference")) is None


def test_time_passes_on_the_stand_in() -> None:
    device = device_of("cpu")
    assert device.elapsed(lambda: torch.ones(10).sum()) > 0
    assert device.aside(lambda: 3) == 3
