"""What only a CUDA device can show: streams, graphs, a second device, compiled training, more than 2^31 elements."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

import spartan
import spartan_kernels
from spartan_kernels import dispatch, new_solver_state, smoke, solve_masks_

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

_BACKENDS = ("triton", "cuda")
_PROBES = {probe.operator: probe for probe in smoke.probes()}


def _serving(operator: str, device: str = "cuda") -> list[str]:
    return [name for name in _BACKENDS if dispatch.refusal(operator, name, device, torch.float32) is None]


@pytest.fixture(params=list(_PROBES))
def probe(request: pytest.FixtureRequest) -> smoke.Probe:
    return _PROBES[request.param]


def test_on_a_stream_of_its_own(probe: smoke.Probe) -> None:
    inputs = smoke.make_inputs()
    expected, moved = probe.call(inputs, "reference"), smoke.inputs_on(inputs, "cuda")
    for name in _serving(probe.operator):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = probe.call(moved, name)
        torch.cuda.current_stream().wait_stream(stream)
        assert smoke.compare(result, expected) is None


def test_captured_in_a_graph(probe: smoke.Probe) -> None:
    inputs = smoke.make_inputs()
    expected, moved = probe.call(inputs, "reference"), smoke.inputs_on(inputs, "cuda")
    for name in _serving(probe.operator):
        assert smoke.compare(smoke.captured(probe.call, moved, name), expected) is None


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
def test_on_the_second_device(probe: smoke.Probe) -> None:
    inputs = smoke.make_inputs()
    expected, moved = probe.call(inputs, "reference"), smoke.inputs_on(inputs, "cuda:1")
    for name in _serving(probe.operator):
        assert smoke.compare(probe.call(moved, name), expected) is None


@pytest.mark.parametrize("name", _BACKENDS)
def test_replay_follows_changed_beta_budget_and_weights(name: str) -> None:
    if name not in _serving("solve_masks_"):
        pytest.skip(f"{name} does not serve solve_masks_ here")
    weight = torch.randn(300_000, device="cuda")
    budget, beta = (torch.tensor(v, dtype=torch.float64, device="cuda") for v in (30_000.0, 5.0))
    soft, hard, state = [weight.clone()], [weight > 0], new_solver_state("cuda")
    call = partial(solve_masks_, [weight], budget, None, beta, soft, hard, state, absolute=True, backend=name)
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for k, b in ((30_000.0, 5.0), (20_000.0, 9.0), (3_000.0, 40.0)):
        weight.add_(torch.randn_like(weight), alpha=0.01)
        budget.fill_(k)
        beta.fill_(b)
        graph.replay()
        assert abs(soft[0].double().sum().item() - k) <= 1e-6 * k
        assert int(hard[0].sum()) == int(k)
        kept = weight.abs()[hard[0]].min()
        assert bool((weight.abs()[~hard[0]] <= kept).all())


@pytest.mark.parametrize("shape", [(300, 4), (50, 4096), (7, 20_000)], ids=str)
@pytest.mark.parametrize("name", _BACKENDS)
def test_rows_replay_follows_changed_beta_budget_and_values(name: str, shape: tuple[int, int]) -> None:
    if name not in _serving("soft_topk_forward"):
        pytest.skip(f"{name} does not serve soft_topk_forward here")
    values = torch.randn(shape, device="cuda")
    budget, beta = (torch.full((n,), v, dtype=torch.float64, device="cuda") for n, v in ((shape[0], 1.0), (1, 5.0)))
    masks = []

    def call() -> None:
        masks[:] = [
            spartan_kernels.soft_topk(values, budget, beta=beta[0], backend=name),
            spartan_kernels.hard_topk(values, budget, backend=name),
        ]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for k, b in ((0.5 * shape[1], 5.0), (1.0, 40.0), (0.25 * shape[1], 0.1)):
        values.normal_()
        budget.fill_(k)
        beta.fill_(b)
        graph.replay()
        torch.testing.assert_close(masks[0].double().sum(-1), budget, rtol=2e-6, atol=0)
        assert bool((masks[1].sum(-1) == int(k)).all())


@pytest.mark.parametrize("name", _BACKENDS)
def test_list_replay_and_a_second_call_give_the_same_bits(name: str) -> None:
    """A graph of the operator over a list follows its inputs, and finds what a call outside of it finds."""
    if name not in _serving("soft_topk_global_forward"):
        pytest.skip(f"{name} does not serve soft_topk_global_forward here")
    values = [torch.randn(n, device="cuda") for n in (100_003, 1, 70_000)]
    budget, beta = (torch.tensor(v, dtype=torch.float64, device="cuda") for v in (5000.0, 5.0))
    call = partial(spartan_kernels.soft_topk_global, values, budget, beta=beta, backend=name)
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        masks = call()
    for k, b in ((5000.0, 5.0), (160_000.0, 1e3), (17.0, 0.5)):
        for v in values:
            v.normal_()
        budget.fill_(k)
        beta.fill_(b)
        graph.replay()
        torch.testing.assert_close(torch.cat(masks).double().sum(), budget, rtol=1e-6, atol=0)
        assert all(torch.equal(m, again) for m, again in zip(masks, call(), strict=True))


@pytest.mark.parametrize("block", [(16, 16), (32, 64), (128, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", _BACKENDS)
def test_replayed_products_follow_a_mask_that_moves(name: str, dtype: torch.dtype, block: tuple[int, int]) -> None:
    """Layout, forward and backward in one graph: the number of blocks and their places are read on the device."""
    if name not in _serving("masked_linear_backward"):
        pytest.skip(f"{name} does not serve masked_linear_backward here")
    out, in_, tokens = 384, 256, 200
    weight = torch.randn(out, in_, device="cuda", dtype=dtype).mul_(in_**-0.5).requires_grad_()
    x = torch.randn(tokens, in_, device="cuda", dtype=dtype, requires_grad=True)
    grad = torch.randn(tokens, out, device="cuda", dtype=dtype)
    gate = torch.zeros(out // block[0], in_ // block[1], device="cuda")

    def step(backend: str, wide: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.detach().to(wide).requires_grad_() for t in (x, weight)]
        y = spartan.masked_linear(
            leaves[0], leaves[1], gate, block, activation="silu", backward_mask=gate != 0, backend=backend
        )
        return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(wide))]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(name, dtype)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(name, dtype)
    for density in (0.0, 0.1, 0.7, 1.0):
        gate.copy_((torch.rand_like(gate) + 0.5) * (torch.rand_like(gate) < density))
        x.data.normal_()
        graph.replay()
        for ours, exact in zip(results, step("reference", torch.float64), strict=True):
            error = (ours.double() - exact).abs().max()
            assert error <= 16 * torch.finfo(dtype).eps * max(1.0, float(exact.abs().max())), (density, float(error))


def test_compiled_training_step() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)).cuda()
    sparsifier = spartan.Sparsifier(model, spartan.Spartan(sparsity=0.8), total_steps=40)
    optimizer = torch.optim.AdamW(model.parameters())
    sparsifier.attach(optimizer)
    compiled = torch.compile(model, fullgraph=True)
    x, y = torch.randn(128, 64, device="cuda"), torch.randint(0, 10, (128,), device="cuda")
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
    n = 2**31 + 77
    if torch.cuda.mem_get_info()[0] < 5 * n * 2:
        pytest.skip("needs 22 GB of free GPU memory")
    for name in _serving("soft_topk_global_forward"):
        values = torch.empty(n, dtype=torch.bfloat16, device="cuda").normal_()
        (mask,) = spartan.soft_topk_global([values], 0.01 * n, beta=8.0, backend=name)
        total = sum(part.double().sum().item() for part in mask.split(1 << 28))
        assert abs(total - 0.01 * n) <= 4e-3 * 0.01 * n  # the mask itself is rounded to bfloat16
