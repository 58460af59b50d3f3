"""What only a CUDA device can show: streams, graphs, a second device, compiled training, more than 2^31 elements.

With SPARTAN_REHEARSE=1 the CPU takes its place: smaller tests, over Triton's interpreter or the emulator.
"""

from __future__ import annotations

import os
from functools import partial

import pytest
import torch
from torch import nn

import spartan
import spartan_kernels
from spartan_kernels import dispatch, new_solver_state, probes, smoke, solve_masks_
from spartan_kernels.devices import device_of

_ON_GPU = torch.cuda.is_available()
_DEVICE = device_of("cuda" if _ON_GPU else "cpu")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not _ON_GPU and os.environ.get("SPARTAN_REHEARSE") != "1", reason="needs a CUDA device"),
]
own_process = pytest.mark.own_process

_BACKENDS = ("triton", "cuda")
_PROBES = {probe.operator: probe for probe in probes.probes()}


def _size(on_gpu: int, in_rehearsal: int) -> int:
    return on_gpu if _ON_GPU else in_rehearsal


def _serving(operator: str) -> list[str]:
    return [name for name in _BACKENDS if dispatch.refusal(operator, name, _DEVICE.name, torch.float32) is None]


@pytest.fixture(params=list(_PROBES))
def probe(request: pytest.FixtureRequest) -> probes.Probe:
    return _PROBES[request.param]


def test_on_a_stream_of_its_own(probe: probes.Probe) -> None:
    inputs = probes.make_inputs()
    expected, moved = probe.call(inputs, "reference"), probes.inputs_on(inputs, _DEVICE.name)
    for name in _serving(probe.operator):
        result = _DEVICE.aside(partial(probe.call, moved, name))
        assert probes.compare(result, expected) is None


@own_process
def test_captured_in_a_graph(probe: probes.Probe) -> None:
    inputs = probes.make_inputs()
    expected, moved = probe.call(inputs, "reference"), probes.inputs_on(inputs, _DEVICE.name)
    for name in _serving(probe.operator):
        assert probes.compare(smoke.captured(_DEVICE, probe.call, moved, name), expected) is None


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="needs a second CUDA device")
def test_on_the_second_device(probe: probes.Probe) -> None:
    inputs, second = probes.make_inputs(), "cuda:1" if _ON_GPU else "cpu"
    expected, moved = probe.call(inputs, "reference"), probes.inputs_on(inputs, second)
    for name in _serving(probe.operator):
        assert probes.compare(probe.call(moved, name), expected) is None


@own_process
@pytest.mark.parametrize("name", _BACKENDS)
def test_replay_follows_changed_beta_budget_and_weights(name: str) -> None:
    if name not in _serving("solve_masks_"):
        pytest.skip(f"{name} does not serve solve_masks_ here")
    n = _size(300_000, 3_000)
    weight = torch.randn(n, device=_DEVICE.name)
    budget, beta = (torch.tensor(v, dtype=torch.float64, device=_DEVICE.name) for v in (0.1 * n, 5.0))
    soft, hard, state = [weight.clone()], [weight > 0], new_solver_state(_DEVICE.name)
    call = partial(solve_masks_, [weight], budget, None, beta, soft, hard, state, absolute=True, backend=name)
    graph = _DEVICE.capture(call)
    for part, b in ((0.1, 5.0), (0.07, 9.0), (0.01, 40.0)):
        k = round(part * n)
        weight.add_(torch.randn_like(weight), alpha=0.01)
        budget.fill_(k)
        beta.fill_(b)
        graph.replay()
        assert abs(soft[0].double().sum().item() - k) <= 1e-6 * k
        assert int(hard[0].sum()) == k
        kept = weight.abs()[hard[0]].min()
        assert bool((weight.abs()[~hard[0]] <= kept).all())


@own_process
@pytest.mark.parametrize("shape", [(300, 4), (50, 4096), (7, 20_000)], ids=str)
@pytest.mark.parametrize("name", _BACKENDS)
def test_rows_replay_follows_changed_beta_budget_and_values(name: str, shape: tuple[int, int]) -> None:
    if name not in _serving("soft_topk_forward"):
        pytest.skip(f"{name} does not serve soft_topk_forward here")
    rows = _size(shape[0], 2)
    values = torch.randn(rows, shape[1], device=_DEVICE.name)
    budget, beta = (torch.full((n,), v, dtype=torch.float64, device=_DEVICE.name) for n, v in ((rows, 1.0), (1, 5.0)))

    def call() -> list[torch.Tensor]:
        return [
            spartan_kernels.soft_topk(values, budget, beta=beta[0], backend=name),
            spartan_kernels.hard_topk(values, budget, backend=name),
        ]

    graph = _DEVICE.capture(call)
    for k, b in ((0.5 * shape[1], 5.0), (1.0, 40.0), (0.25 * shape[1], 0.1)):
        values.normal_()
        budget.fill_(k)
        beta.fill_(b)
        graph.replay()
        soft, hard = graph.result
        torch.testing.assert_close(soft.double().sum(-1), budget, rtol=2e-6, atol=0)
        assert bool((hard.sum(-1) == int(k)).all())


@own_process
@pytest.mark.parametrize("name", _BACKENDS)
def test_list_replay_and_a_second_call_give_the_same_bits(name: str) -> None:
    """A graph of the operator over a list follows its inputs, and finds what a call outside of it finds."""
    if name not in _serving("soft_topk_global_forward"):
        pytest.skip(f"{name} does not serve soft_topk_global_forward here")
    lengths = (_size(100_003, 1_003), 1, _size(70_000, 700))
    values, n = [torch.randn(length, device=_DEVICE.name) for length in lengths], sum(lengths)
    budget, beta = (torch.tensor(v, dtype=torch.float64, device=_DEVICE.name) for v in (0.03 * n, 5.0))
    call = partial(spartan_kernels.soft_topk_global, values, budget, beta=beta, backend=name)
    graph = _DEVICE.capture(call)
    for part, b in ((0.03, 5.0), (0.94, 1e3), (1e-4, 0.5)):
        for v in values:
            v.normal_()
        budget.fill_(part * n)
        beta.fill_(b)
        graph.replay()
        torch.testing.assert_close(torch.cat(graph.result).double().sum(), budget, rtol=1e-6, atol=0)
        assert all(torch.equal(m, again) for m, again in zip(graph.result, call(), strict=True))


@own_process
@pytest.mark.parametrize("block", [(16, 16), (32, 64), (128, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", _BACKENDS)
def test_replayed_products_follow_a_mask_that_moves(name: str, dtype: torch.dtype, block: tuple[int, int]) -> None:
    """Layout, forward and backward in one graph: the number of blocks and their places are read on the device."""
    if name not in _serving("masked_linear_backward"):
        pytest.skip(f"{name} does not serve masked_linear_backward here")
    out, in_, tokens = _size(384, 128), _size(256, 64), _size(200, 5)
    weight = torch.randn(out, in_, device=_DEVICE.name, dtype=dtype).mul_(in_**-0.5).requires_grad_()
    x = torch.randn(tokens, in_, device=_DEVICE.name, dtype=dtype, requires_grad=True)
    grad = torch.randn(tokens, out, device=_DEVICE.name, dtype=dtype)
    gate = torch.zeros(out // block[0], in_ // block[1], device=_DEVICE.name)

    def step(backend: str, wide: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.detach().to(wide).requires_grad_() for t in (x, weight)]
        y = spartan.masked_linear(
            leaves[0], leaves[1], gate, block, activation="silu", backward_mask=gate != 0, backend=backend
        )
        return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(wide))]

    graph = _DEVICE.capture(partial(step, name, dtype))
    for density in (0.0, 0.1, 0.7, 1.0):
        gate.copy_((torch.rand_like(gate) + 0.5) * (torch.rand_like(gate) < density))
        x.data.normal_()
        graph.replay()
        for ours, exact in zip(graph.result, step("reference", torch.float64), strict=True):
            error = (ours.double() - exact).abs().max()
            assert error <= 16 * torch.finfo(dtype).eps * max(1.0, float(exact.abs().max())), (density, float(error))


def test_compiled_training_step() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)).to(
        _DEVICE.name
    )
    sparsifier = spartan.Sparsifier(model, spartan.Spartan(sparsity=0.8), total_steps=40)
    optimizer = torch.optim.AdamW(model.parameters())
    sparsifier.attach(optimizer)
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if _ON_GPU else "aot_eager")
    x, y = torch.randn(128, 64, device=_DEVICE.name), torch.randint(0, 10, (128,), device=_DEVICE.name)
    losses = []
    for _ in range(40):
        optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(compiled(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    sparsifier.finalize()
    assert losses[-1] < losses[0]
    zeros = sum(int((p == 0).sum()) for p in model.parameters())
    assert abs(zeros / sum(p.numel() for p in model.parameters()) - 0.8) < 1e-4


def test_more_than_two_to_the_31_elements() -> None:
    n = _size(2**31, 2**12) + 77
    if _DEVICE.free_bytes() < 5 * n * 2:
        pytest.skip("needs 22 GB of free memory")
    for name in _serving("soft_topk_global_forward"):
        values = torch.empty(n, dtype=torch.bfloat16, device=_DEVICE.name).normal_()
        (mask,) = spartan.soft_topk_global([values], 0.01 * n, beta=8.0, backend=name)
        total = sum(part.double().sum().item() for part in mask.split(1 << 28))
        assert abs(total - 0.01 * n) <= 4e-3 * 0.01 * n  # the mask itself is rounded to bfloat16
