"""Cost models against counts made by hand, and the costs that they may not give."""

from __future__ import annotations

import json
import math
import os
from typing import Any

import pytest
import torch
from torch import nn

from spartan import Group, Sparsifier, Spartan
from spartan.budgets import FLOPs, LatencyEntry, LatencyTable, Parameters, PricedWeight, price
from spartan_kernels import block_costs


def priced(model: nn.Module, block_size: tuple[int, int] = (1, 1)) -> list[PricedWeight]:
    """All weights of two or more dimensions."""
    return [
        PricedWeight(name, model.get_submodule(name.rpartition(".")[0]), weight, block_size, name.rpartition(".")[2])
        for name, weight in model.named_parameters()
        if weight.dim() >= 2
    ]


def flops(model: nn.Module, *args: Any, **kwargs: Any) -> list[Any]:
    return FLOPs(*args, **kwargs).block_costs(model, priced(model))


def test_flops_count_the_positions_of_a_convolution() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), nn.ReLU(), nn.Conv2d(6, 3, 1), nn.Flatten(), nn.Linear(48, 5)
    )
    # outputs of 4 x 4 positions, 3 images: two operations for each weight, image and position; then one for each image
    assert flops(model, torch.randn(3, 4, 8, 8)) == [2 * 3 * 16, 2 * 3 * 16, 2 * 3]


def test_flops_of_attention_are_those_of_its_projections() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 24, batch_first=True)
    for mode in (True, False):  # evaluation would take a fused operator that nobody counts
        model.train(mode)
        assert flops(model, torch.randn(5, 7, 8)) == [2 * 35] * 4
        assert model.training == mode
    assert torch.backends.mha.get_fastpath_enabled()


def test_flops_count_every_use_of_a_tied_weight_and_converted_copies() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 6, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.inner(self.inner(x)) @ self.inner.weight

    assert flops(Tied(), torch.randn(4, 6)) == [2 * 4 * 3]


def test_flops_leave_no_trace() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    model[1].eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    x, random = torch.randn(3, 4), torch.get_rng_state()
    model[0].register_forward_hook(lambda module, inputs, out: out + torch.randn(4))
    FLOPs(x).block_costs(model, priced(model))
    assert [module.training for module in model] == [True, False, True, True]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_flops_pass_keywords_and_name_what_is_never_used() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 3), nn.Embedding(5, 2)

        def forward(self, *, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    with pytest.raises(ValueError, match=r"no operation that FLOPs counts reads weight 'idle\.weight'"):
        flops(Two(), x=torch.randn(1, 4))


def test_blocks_at_ragged_edges_cost_what_they_hold() -> None:
    model = nn.Sequential(nn.Linear(10, 7))
    for costs in (Parameters(), FLOPs(torch.randn(6, 10))):
        (blocks,) = costs.block_costs(model, priced(model, (4, 4)))
        factor = 1.0 if isinstance(costs, Parameters) else 12.0
        torch.testing.assert_close(blocks, factor * block_costs((7, 10), (4, 4)))
        assert math.isclose(float(blocks.sum()), factor * 70)


def test_costs_are_scaled_to_the_number_of_weights() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    grid = torch.arange(1.0, 9.0).view(2, 4)

    def per_block(name: str, module: nn.Module, shape: tuple[int, ...]) -> float | torch.Tensor:
        assert isinstance(module, nn.Linear)
        return 5.0 if name == "0.weight" else grid

    (first, second), unit = price(per_block, model, priced(model))
    assert math.isclose(unit, (24 * 5 + 36) / 32)
    assert math.isclose(first.total + second.total, 32, rel_tol=1e-7)
    assert first.blocks == first.largest == pytest.approx(5.0 / unit, rel=1e-7)
    torch.testing.assert_close(second.blocks * unit, grid)
    assert math.isclose(second.largest, 8 / unit, rel_tol=1e-6)


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (0.0, ValueError, "costs must be positive and finite; for weight '0.weight' there is 0.0"),
        (math.nan, ValueError, "costs must be positive and finite; for weight '0.weight' there is nan"),
        (torch.tensor([[1.0, -2.0]]), ValueError, "for weight '0.weight' there is -2.0"),
        (torch.ones(2), ValueError, r"a tensor of shape \(1, 2\), one for each block; got shape \(2,\)"),
        ("3", TypeError, "costs must give numbers or tensors; for weight '0.weight' it gave '3'"),
        (True, TypeError, "costs must give numbers or tensors"),
    ],
)
def test_costs_that_cannot_be_are_refused_by_name(answer: Any, error: type[Exception], message: str) -> None:
    model = nn.Sequential(nn.Linear(2, 1))
    with pytest.raises(error, match=message):
        price(lambda name, module, grid: answer, model, priced(model))


def counting_timer(seconds: float, start: float) -> Any:
    """A clock that says start + seconds * blocks kept, read from the gate of the product that it times."""

    def timer(call: Any, device: torch.device) -> float:
        call()  # must work
        return start + seconds * float((call.args[2] != 0).sum())

    return timer


def test_latency_is_the_slope_of_time_over_kept_blocks(tmp_path: Any) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(32, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    x = torch.randn(3, 4, 4, 4)
    calls: list[Any] = []
    exact = counting_timer(2e-6, 1e-3)
    table = LatencyTable.measure(
        model, x, block_size=(4, 2), timer=lambda call, device: calls.append(call) or exact(call, device)
    )
    assert len(calls) == 3 * 5  # what is the same is measured once
    assert [entry.shape for entry in table.entries] == [(8, 4, 3, 3), (16, 32), (16, 16), (16, 16)]
    assert [entry.inputs for entry in table.entries] == [((3, 4, 4, 4),), ((3, 32),), ((3, 16),), ((3, 16),)]
    table.save(tmp_path / "latency.json")
    loaded = LatencyTable.load(tmp_path / "latency.json")
    assert loaded.entries == table.entries
    assert loaded.block_costs(model, priced(model, (4, 2))) == pytest.approx([2e-6] * 4)


def seconds_by_tokens(call: Any, device: torch.device) -> float:
    """A clock by which each kept block takes 1e-6 s for each of its tokens (of a convolution: input positions)."""
    call()  # must work
    x, weight, gate = call.args[:3]
    return 1e-6 * float((gate != 0).sum()) * x.numel() / x.shape[1 if weight.dim() == 4 else -1]


class Block(nn.Module):
    """Self-attention, attention to another sequence in two ways, and layers of their projections' shape."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.own = nn.MultiheadAttention(16, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(16, 2)
        self.other = nn.MultiheadAttention(16, 2, kdim=8, vdim=8)
        self.last = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        x = self.first(x[:1])
        x, _ = self.own(x, x, x)
        tokens = memory[..., :16]
        x, _ = self.cross(x.transpose(0, 1), value=tokens, key=tokens)
        x, _ = self.other(query=x, key=memory[..., 16:], value=memory[..., 16:], need_weights=False)
        return self.last(x.sum(0))


def test_latency_of_attention_is_that_of_the_tokens_it_sees() -> None:
    model = Block().eval()
    table = LatencyTable.measure(
        model, torch.randn(3, 5, 16), torch.randn(7, 1, 24), block_size=4, timer=seconds_by_tokens
    )
    seconds = {entry.name: entry.seconds for entry in table.entries}
    assert seconds == pytest.approx(
        {
            "first.weight": 5e-6,
            "own.in_proj_weight": 5e-6,
            "own.out_proj.weight": 5e-6,
            "cross.in_proj_weight": (5e-6 + 7e-6 + 7e-6) / 3,
            "cross.out_proj.weight": 5e-6,
            "other.q_proj_weight": 5e-6,
            "other.k_proj_weight": 7e-6,
            "other.v_proj_weight": 7e-6,
            "other.out_proj.weight": 5e-6,
            "last.weight": 1e-6,  # no other layer of its shape lends it its entry
        }
    )
    assert table.block_costs(model, priced(model, (4, 4))) == pytest.approx(list(seconds.values()))
    method = Spartan(sparsity=0.5, block_size=4)
    sparsifier = Sparsifier(Block(), method, 10, costs=table)
    assert sparsifier.costs()["own.in_proj_weight"].dense == pytest.approx(48 * 5e-6)


class Conv1D(nn.Module):
    """As in Hugging Face's transformers: y = x w + b, w of shape [in, out]."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


def test_latency_of_a_transposed_weight_is_that_of_its_product() -> None:
    model = nn.Sequential(Conv1D(24, 8), nn.Linear(24, 8), nn.Linear(8, 3))
    shapes = []

    def timer(call: Any, device: torch.device) -> float:
        shapes.append(tuple(call.args[1].shape))
        return seconds_by_tokens(call, device)

    table = LatencyTable.measure(model, torch.randn(2, 5, 8), block_size=(8, 4), timer=timer)
    first = table.entries[0]
    assert shapes[0] == (24, 8)  # [out, in]
    assert (first.shape, first.block_size, first.inputs) == ((8, 24), (4, 8), ((2, 5, 8),))
    sparsifier = Sparsifier(model, Spartan(sparsity=0.5, block_size=(8, 4)), 10, costs=table)
    assert sparsifier.costs()["0.weight"].dense == pytest.approx(6 * 10e-6)


def test_latency_of_a_weight_in_several_products_is_their_sum() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.tied = nn.Linear(8, 8), nn.Linear(8, 8)
            self.tied.weight = self.inner.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.tied(self.inner(input=self.inner(x))[:2])

    table = LatencyTable.measure(Twice(), torch.randn(3, 8), block_size=4, timer=seconds_by_tokens)
    (entry,) = table.entries
    assert (entry.inputs, entry.seconds) == (((3, 8), (3, 8), (2, 8)), pytest.approx(8e-6))


def test_layers_that_differ_in_nothing_but_their_stride_are_measured_each() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2, padding=1))

    def timer(call: Any, device: torch.device) -> float:
        return 1e-6 * float((call.args[2] != 0).sum()) * call()[0, 0].numel()

    table = LatencyTable.measure(model, torch.randn(1, 4, 6, 6), block_size=4, timer=timer)
    assert [entry.seconds for entry in table.entries] == pytest.approx([36e-6, 9e-6])


def test_all_weights_without_a_latency_are_named_at_once() -> None:
    model = nn.Sequential(nn.Conv1d(8, 8, 3), nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    table = LatencyTable.measure(model, torch.randn(2, 8, 4), block_size=4, timer=seconds_by_tokens)
    expected = (
        r"no entry for '0.weight' of shape \(8, 8, 3\) in blocks of \(4, 4\), in a Conv1d;"
        r" '3.weight' of shape \(8, 8\) in blocks of \(2, 2\), in a Linear\. It has 3 entries, for blocks of"
        r" \[\(4, 4\)\].*exclude=.*FLOPs"
    )
    groups = [Group(include="3.weight", block_size=2)]
    with pytest.raises(ValueError, match=expected):
        Sparsifier(model, Spartan(sparsity=0.5, block_size=4), 10, costs=table, groups=groups)
    assert type(model[2]) is nn.Linear  # nothing is changed
    Sparsifier(model, Spartan(sparsity=0.5, block_size=4), 10, costs=table, exclude="0.weight")
    with pytest.raises(ValueError, match=r"no entry for '2.weight' of shape \(8, 12\)"):
        other = nn.Sequential(nn.ReLU(), nn.ReLU(), nn.Linear(12, 8), nn.Linear(8, 3))
        Sparsifier(other, Spartan(sparsity=0.5, block_size=4), 10, costs=table)


def test_one_slow_measurement_does_not_move_latency() -> None:
    model = nn.Sequential(nn.Linear(32, 16))
    exact = counting_timer(2e-6, 1e-3)
    slow = iter([1.0, 0.0, 0.0, 0.0, 0.0])
    table = LatencyTable.measure(
        model, torch.randn(2, 32), block_size=4, timer=lambda call, device: exact(call, device) + next(slow)
    )
    assert math.isclose(table.entries[0].seconds, 2e-6, rel_tol=1e-6)


def test_noise_does_not_make_latency_negative() -> None:
    model = nn.Sequential(nn.Linear(32, 16))
    table = LatencyTable.measure(model, torch.randn(2, 32), block_size=4, timer=counting_timer(-1e-6, 1e-3))
    assert math.isclose(table.entries[0].seconds, (1e-3 - 16e-6) / 16)


def test_measured_latency_is_positive_for_every_layer() -> None:
    model = nn.Sequential(nn.Linear(64, 48), nn.Unflatten(1, (4, 12, 1)), nn.Conv2d(4, 4, 1, groups=2))
    table = LatencyTable.measure(model, torch.randn(16, 64), block_size=16)
    assert [entry.shape for entry in table.entries] == [(48, 64)]
    assert table.entries[0].seconds > 0


def test_latency_tables_that_cannot_be_are_refused(tmp_path: Any) -> None:
    linear = nn.Linear(8, 8)
    with pytest.raises(ValueError, match="block_size must be larger than 1"):
        LatencyTable.measure(linear, torch.randn(2, 8), block_size=1)
    with pytest.raises(ValueError, match="model must have a weight of Linear"):
        LatencyTable.measure(nn.ReLU(), torch.randn(2, 8), block_size=4)
    entries = [LatencyEntry("a", (8, 8), (4, 4), (shape,), 1e-6) for shape in ((2, 8), (3, 8))]
    with pytest.raises(ValueError, match=r"one for each weight and block size; got .*\(2, 8\).* and .*\(3, 8\)"):
        LatencyTable(entries)
    with pytest.raises(ValueError, match="positive seconds"):
        LatencyTable([LatencyEntry("a", (8, 8), (4, 4), ((2, 8),), 0.0)])
    path = tmp_path / "latency.json"
    old = '{"format": "spartan-latency", "version": 1, "entries": []}'
    entry = {"name": "a", "shape": [8, 8], "block_size": [4, 4], "inputs": [[2, 8]], "seconds": 1e-6}
    table = {"format": "spartan-latency", "version": 2, "entries": [entry]}
    path.write_text(json.dumps(table))
    assert LatencyTable.load(path).entries[0].shape == (8, 8)
    wrong = (
        {"shape": [-1, 4]},
        {"shape": []},
        {"inputs": [["2", 8]]},
        {"name": 3},
        {"seconds": "nan"},
        {"shape": 1e999},
    )
    nonsense = [json.dumps(table | {"entries": [entry | change]}) for change in wrong]
    nonsense += ["", "{}", old, '{"format": "other", "version": 1, "entries": []}', '{"format": "spartan-latency"']
    for text in (*nonsense, "[" * 100_000, json.dumps(table).replace("1e-06", "1" + "0" * 400), b"\xff\xfe"):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ValueError, match=r"latency.json is no latency table"):
            LatencyTable.load(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"latency.json is no latency table: .* not a regular file"):
        LatencyTable.load(path)
