"""Convolutions on packed blocks: which are, what they compute, what becomes of them elsewhere."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import spartan
from spartan.nn import BlockSparseConv2d
from spartan_kernels import BlockSparseFilter
from spartan_kernels.break_even import packed_convolution_time

PIXELS = 1 << 16
needs_native = pytest.mark.skipif(
    not spartan.info()["native"]["available"], reason="convolutions are packed for the compiled CPU kernels"
)
pytestmark = [pytest.mark.usefixtures("one_thread"), needs_native]


def convolution(out: int = 128, in_: int = 128, side: int = 16, kept: float = 0.1, **settings: Any) -> nn.Conv2d:
    torch.manual_seed(0)
    layer = nn.Conv2d(in_, out, settings.pop("kernel_size", 3), **settings)
    drop_blocks(layer.weight, side, kept)
    return layer


def drop_blocks(weight: Tensor, side: int, kept: float) -> None:
    grid = torch.rand(-(-weight.shape[0] // side), -(-weight.shape[1] // side), *weight.shape[2:]) < kept
    mask = grid.repeat_interleave(side, 0)[: weight.shape[0]].repeat_interleave(side, 1)[:, : weight.shape[1]]
    with torch.no_grad():
        weight.mul_(mask)


def reasons(model: nn.Module, block_size: Any = None, tokens: int = PIXELS) -> dict[str, str | None]:
    return {row.name: row.reason for row in spartan.packing_report(model, block_size, tokens=tokens).rows}


def small() -> nn.Sequential:
    """Channels that no block divides, with strides and padding."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(10, 21, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(21, 13, (3, 2), padding="same", dilation=(2, 1), bias=False),
        nn.Conv2d(13, 9, 1),
        nn.Flatten(),
    )
    for layer in model:
        if isinstance(layer, nn.Conv2d):
            drop_blocks(layer.weight, 8, 0.5)
            layer.weight.data[:8, :8] = 0
    return model


# --------------------------------------------------------------------------------------------- what is computed


@pytest.mark.parametrize(
    "settings",
    [
        {"padding": 1},
        {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2), "kernel_size": (3, 2)},
        {"padding": "same", "kernel_size": (4, 3), "dilation": (3, 2)},
        {"padding": "same", "kernel_size": 3, "bias": False},
        {"padding": "valid", "kernel_size": 5},
        {"kernel_size": 1},
        {"kernel_size": 1, "stride": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("batch", [0, 1, 3, None])
def test_a_packed_convolution_computes_and_is_trained_as_the_dense_one(settings: dict[str, Any], batch: Any) -> None:
    layer = convolution(21, 13, 8, 0.5, **settings)
    packed = spartan.to_block_sparse(copy.deepcopy(layer), 8)
    assert isinstance(packed, BlockSparseConv2d) and packed.block_size == (8, 8)
    shape = (13, 9, 8) if batch is None else (batch, 13, 9, 8)
    x = torch.randn(shape, requires_grad=True)
    exact = layer.double()
    y, wide = packed(x), x.detach().double().requires_grad_()
    expected = exact(wide)
    assert y.shape == expected.shape
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    expected.backward(upstream.double())
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-5, atol=1e-5)
    of_values = BlockSparseFilter.from_dense(exact.weight.grad, 8, packed.packed.mask()).values
    torch.testing.assert_close(packed.values.grad.double(), of_values, rtol=1e-4, atol=1e-4)
    if packed.bias is not None:
        torch.testing.assert_close(packed.bias.grad.double(), exact.bias.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_packed_and_a_packed_layer_is_moved_to_it(dtype: torch.dtype) -> None:
    layer = convolution(padding=1)
    x = torch.randn(2, 128, 6, 6)
    expected = layer(x)
    moved = spartan.to_block_sparse(copy.deepcopy(layer), 16).to(dtype)
    assert moved.values.dtype == dtype and moved.row_offsets.dtype == torch.int32
    packed = spartan.to_block_sparse(copy.deepcopy(layer).to(dtype), 16)
    for one in (moved, packed):
        y = one(x.to(dtype))
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)


def test_training_the_packed_values_keeps_dropped_blocks_zero() -> None:
    model = spartan.to_block_sparse(small(), 8)
    before = model[0].packed.mask()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.randn(2, 10, 8, 8)).pow(2).mean().backward()
    values = model[0].values.detach().clone()
    optimizer.step()
    assert not torch.equal(model[0].values, values)
    dense = spartan.to_dense(model)[0].weight
    assert torch.equal(BlockSparseFilter.from_dense(dense.detach(), 8).mask(), before)


# -------------------------------------------------------------------------------------- which, and why not


def test_each_convolution_that_stays_dense_says_why() -> None:
    class Subclass(nn.Conv2d):
        pass

    shared = convolution()
    model = nn.ModuleDict(
        {
            "packed": convolution(padding=1),
            "groups": nn.Conv2d(128, 128, 3, groups=2),
            "reflect": convolution(padding=1, padding_mode="reflect"),
            "own": Subclass(128, 128, 3),
            "line": nn.Conv1d(32, 32, 3),
            "turned": nn.ConvTranspose2d(32, 32, 3),
            "hooked": convolution(),
            "first": shared,
            "second": convolution(),
            "full": nn.Conv2d(128, 128, 3),
            "dense": convolution(side=8, kept=0.9),
            "stem": convolution(64, 3),
            "wide": convolution().double(),
        }
    )
    model["second"].weight = shared.weight
    model["hooked"].register_forward_hook(lambda *_: None)
    found = reasons(model)
    slower = {name: found.pop(name) for name in ("dense.weight", "stem.weight")}
    assert all("the dense product is faster" in str(reason) and "pixels" in str(reason) for reason in slower.values())
    assert found == {
        "packed.weight": None,
        "groups.weight": "its convolution has 2 groups",
        "reflect.weight": "its convolution pads by 'reflect', not by zeros",
        "own.weight": "it is of a Subclass, not of a Conv2d",
        "line.weight": "it is of a Conv1d, not of a Conv2d",
        "turned.weight": "it is of a ConvTranspose2d, not of a Conv2d",
        "hooked.weight": "its layer has hooks",
        "first.weight": "it is shared with second.weight",
        "full.weight": "no block of 8 x 8 is all zeros",
        "wide.weight": "only the compiled CPU kernels multiply blocks of a convolution, and the native backend has no"
        " block_sparse_conv2d_forward for torch.float64",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spartan.to_block_sparse(model, tokens=PIXELS)
    assert [name for name, layer in model.items() if isinstance(layer, BlockSparseConv2d)] == ["packed"]
    assert reasons(model)["packed.weight"] is None and "1 of 12 weights" in str(spartan.packing_report(model))


@pytest.mark.parametrize("side", [16, 32])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
def test_the_block_and_the_gain_are_those_of_the_model_of_times(side: int, layout: torch.memory_format) -> None:
    model = nn.Sequential(convolution(side=side, kept=0.2)).to(memory_format=layout)
    (row,) = spartan.packing_report(model, tokens=PIXELS).rows
    last = layout == torch.channels_last
    assert row.block_size == (side, side) and row.shape == (128, 128, 3, 3)
    assert row.speedup == 1 / packed_convolution_time(row.density, row.shape, side, last, PIXELS) > 1
    spartan.to_block_sparse(model, tokens=PIXELS)
    assert spartan.packing_report(model, tokens=PIXELS).rows == (row,)
    assert "density=" in repr(model) and "kernel_size=(3, 3)" in repr(model)


def test_a_small_image_is_not_worth_a_call() -> None:
    model = convolution(padding=1, kept=0.2)
    assert "the dense product is faster" in str(reasons(model, tokens=4)["weight"])
    assert "with 4 pixels" in str(reasons(model, tokens=4)["weight"])
    assert reasons(model, tokens=PIXELS)["weight"] is None
    last = convolution(64, 64, kept=0.2).to(memory_format=torch.channels_last)
    assert reasons(last)["weight"] is None  # it has no copies to pay for
    assert "faster" in str(reasons(convolution(64, 64, kept=0.2))["weight"])


# ------------------------------------------------------------------------------------------ state, files, tools


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
def test_packed_convolutions_become_the_dense_ones_that_they_were(layout: torch.memory_format) -> None:
    before = small().to(memory_format=layout).eval()
    before[0].bias.requires_grad_(False)
    undone = spartan.to_dense(spartan.to_block_sparse(copy.deepcopy(before), 8))
    assert str(undone) == str(before)
    for (name, value), other in zip(undone.named_parameters(), before.named_parameters(), strict=True):
        assert name == other[0] and torch.equal(value, other[1]) and value.requires_grad == other[1].requires_grad
        assert value.stride() == other[1].stride() or value.shape[2:] == (1, 1)
    x = torch.randn(2, 10, 8, 8)
    assert torch.equal(undone(x), before(x)) and not undone[0].training


def test_packed_convolutions_are_saved_and_loaded(tmp_path: Path) -> None:
    model = spartan.to_block_sparse(small(), 8)
    with torch.no_grad():
        model[0].values[0] = 0  # a stored block of zeros is still one
    x = torch.randn(2, 10, 8, 8)
    spartan.save_pretrained(model, tmp_path / "packed")
    spartan.save_pretrained(model, tmp_path / "dense", dense=True)
    for fresh in (nn.Sequential(*copy.deepcopy(small())), spartan.to_block_sparse(small(), 4), copy.deepcopy(model)):
        loaded = spartan.load_pretrained(fresh, tmp_path / "packed")
        assert [type(loaded[i]) for i in (0, 2, 3)] == [BlockSparseConv2d] * 3
        assert torch.equal(loaded(x), model(x))
        assert torch.equal(loaded[0].packed.mask(), model[0].packed.mask())
    entry = next(t for t in spartan.describe_pretrained(tmp_path / "packed") if t.name == "0.weight")
    assert (entry.packed, entry.block_size, entry.shape) == (True, (8, 8), (21, 10, 3, 3))
    assert load_file(tmp_path / "dense" / "model.safetensors")["0.weight"].shape == (21, 10, 3, 3)
    plain = spartan.load_pretrained(small(), tmp_path / "dense")
    assert type(plain[0]) is nn.Conv2d
    torch.testing.assert_close(plain(x), model(x), rtol=1e-5, atol=1e-5)
    anew = spartan.load_pretrained(spartan.to_block_sparse(small(), 4), tmp_path / "dense")
    assert anew[0].block_size == (4, 4)
    torch.testing.assert_close(anew(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_packed_file_is_not_loaded_into_a_convolution_that_cannot_be_packed(tmp_path: Path) -> None:
    spartan.save_pretrained(spartan.to_block_sparse(convolution(16, 16, 8, 0.5, padding=1), 8), tmp_path)
    other = nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular")
    with pytest.raises(ValueError, match="'weight' is packed, the model has no layer that can be"):
        spartan.load_pretrained(other, tmp_path)


@pytest.mark.parametrize("name", ["row_offsets", "column_indices", "column_offsets", "row_indices", "positions"])
def test_a_state_with_a_wrong_index_is_not_loaded(name: str) -> None:
    model = spartan.to_block_sparse(small(), 8)
    state = model.state_dict()
    model.load_state_dict({key: value.clone() for key, value in state.items()})
    state[f"2.{name}"] = state[f"2.{name}"] + 1
    with pytest.raises(RuntimeError, match=r"2\.: (row_offsets|column_indices|\w+ is not the index)"):
        model.load_state_dict(state)


@pytest.mark.parametrize("name", ["row_offsets", "column_indices", "positions", "row_indices", "column_offsets"])
@pytest.mark.parametrize("entry", [-(2**31), -1, 1000, 2**31 - 1])
def test_an_index_written_over_after_loading_leads_no_product_out_of_its_memory(name: str, entry: int) -> None:
    layer = spartan.to_block_sparse(convolution(16, 16, 8, 0.5), 8)
    x = torch.randn(1, 16, 5, 5, requires_grad=True)
    getattr(layer, name)[0] = entry
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        layer(x).sum().backward()


def test_it_is_exported_and_copied() -> None:
    model = spartan.to_block_sparse(small(), 8).eval()
    x = torch.randn(2, 10, 8, 8)
    exported = torch.export.export(model, (x,))
    assert [n for n in exported.graph.nodes if "block_sparse_conv2d" in str(n.target)]
    assert torch.equal(exported.module()(x), model(x))
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), model(x)) and copied[0].values is not model[0].values
    assert model.to("meta")(x.to("meta")).shape == copied(x).shape


def test_an_onnx_graph_is_made_of_plain_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    model = spartan.to_block_sparse(small(), 8).eval()
    x = torch.randn(2, 10, 8, 8)
    expected = model(x)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    graph = torch.export.export(model, (x,))
    assert not [node for node in graph.graph.nodes if "spartan" in str(node.target)]
    torch.testing.assert_close(graph.module()(x), expected, rtol=1e-4, atol=1e-5)


def test_a_finalized_model_is_packed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3))
    method = spartan.OneShot(sparsity=0.75, block_size=16, prune_at=0)
    sparsifier = spartan.Sparsifier(model, method, 4, count="masked", include="*")
    sparsifier.freeze()
    sparsifier.finalize()
    x = torch.randn(2, 64, 8, 8)
    expected = model(x)
    spartan.to_block_sparse(model, 16)
    assert isinstance(model[0], BlockSparseConv2d) and model[0].packed.density < 0.5
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
