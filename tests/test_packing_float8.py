"""Layers on packed blocks in 8 bits: made from models, moved and cast, saved and loaded, undone and reported."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import spartan
from spartan.nn import BlockSparseConv2d, BlockSparseLinear
from spartan_kernels import BlockSparseFilter, BlockSparseWeight, info

FLOAT8 = torch.float8_e4m3fn


def model_of(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Two layers with blocks of zeros, the first without a bias."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(50, 64, bias=False), nn.ReLU(), nn.Linear(64, 37)).to(dtype)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            keep = torch.rand(-(-layer.out_features // 16), -(-layer.in_features // 16)) < 0.5
            keep[0, 0], keep[-1, -1] = False, True
            wide = keep.repeat_interleave(16, 0).repeat_interleave(16, 1)
            layer.weight.mul_(wide[: layer.out_features, : layer.in_features])
    return model


def small_of(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    model: Any = spartan.to_block_sparse(model_of(seed, dtype), 16, float8=True)
    return model


def same_layers(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models hold the same numbers in the same dtypes; PyTorch compares none of 8 bits."""
    mine, other = a.state_dict(), b.state_dict()
    return mine.keys() == other.keys() and all(
        value.dtype == other[name].dtype and torch.equal(value.float(), other[name].float())
        for name, value in mine.items()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_layers_keep_their_blocks_in_8_bits(dtype: torch.dtype) -> None:
    plain, small = model_of(dtype=dtype), small_of(dtype=dtype)
    for index in (0, 2):
        layer, weight = small[index], plain[index].weight
        assert type(layer) is BlockSparseLinear and layer.values.dtype == FLOAT8 and not layer.values.requires_grad
        assert layer.scales is not None and layer.scales.dtype == torch.float32 and "float8" in str(layer)
        assert "scales" in dict(layer.named_buffers())
        assert layer.weight.dtype == dtype and torch.equal(layer.weight == 0, weight == 0)
        torch.testing.assert_close(
            layer.weight, weight, rtol=2**-4 + 2**-7, atol=float(weight.detach().abs().max()) * 2**-18
        )
    x = torch.randn(5, 3, 50, dtype=dtype)
    got, exact = small(x), plain(x)
    assert got.dtype == dtype and float(((got - exact).norm() / exact.norm()).detach()) < 0.1
    assert (
        sum(p.nbytes for p in small.parameters()) < sum(p.nbytes for p in plain.parameters()) / 2 / dtype.itemsize * 2
    )


def test_packed_layers_are_rounded_too_and_others_are_left() -> None:
    packed = spartan.to_block_sparse(model_of(), 16)
    assert same_layers(spartan.to_block_sparse(packed, float8=True), small_of())
    again = small_of()
    layers = list(again)
    assert list(spartan.to_block_sparse(again, float8=True)) == layers  # the same objects
    dense = nn.Sequential(nn.Linear(32, 32))
    assert type(spartan.to_block_sparse(dense, 16, float8=True)[0]) is nn.Linear


@pytest.mark.skipif(not info()["native"]["available"], reason="packs convolutions with the compiled kernels alone")
def test_convolutions_keep_their_dtype() -> None:
    convolution = nn.Conv2d(32, 32, 3)
    with torch.no_grad():
        convolution.weight[:16] = 0.0
    packed = spartan.to_block_sparse(convolution, 16, float8=True)
    assert type(packed) is BlockSparseConv2d and packed.values.dtype == torch.float32
    with pytest.raises(ValueError, match="convolutions have no product in 8 bits"):
        BlockSparseFilter(packed.matrix.to_float8(), 32, (3, 3))


def test_the_report_tells_what_is_in_8_bits() -> None:
    for report in (spartan.packing_report(model_of(), 16, float8=True), spartan.packing_report(small_of())):
        assert [(row.float8, row.speedup, row.block_size) for row in report.rows] == [(True, None, (16, 16))] * 2
        assert "16x16 float8" in str(report)
    packed = spartan.to_block_sparse(model_of(), 16)
    assert all(row.float8 for row in spartan.packing_report(packed, float8=True).rows)
    assert not any(row.float8 for row in spartan.packing_report(packed).rows)


def test_casts_leave_8_bits_and_scales_and_change_what_the_dense_weight_is() -> None:
    small = small_of()
    before = copy.deepcopy(small)
    small.bfloat16()
    for layer, was in ((small[0], before[0]), (small[2], before[2])):
        assert layer.values.dtype == FLOAT8 and layer.scales.dtype == torch.float32
        assert torch.equal(layer.scales, was.scales) and torch.equal(layer.values.float(), was.values.float())
        assert layer.weight.dtype == torch.bfloat16
    assert small[2].bias.dtype == torch.bfloat16
    assert small(torch.randn(4, 50).bfloat16()).dtype == torch.bfloat16
    plain = spartan.to_dense(small)
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    assert small_of().double().float()[0].weight.dtype == torch.float32
    assert next(small_of().to("meta").parameters()).is_meta


def test_to_dense_gives_plain_layers_with_the_rounded_weights() -> None:
    small = small_of()
    weights = [small[0].weight.clone(), small[2].weight.clone()]
    plain = spartan.to_dense(small)
    assert [type(plain[i]) for i in (0, 2)] == [nn.Linear] * 2
    assert all(
        torch.equal(plain[i].weight, w) and plain[i].weight.requires_grad for i, w in zip((0, 2), weights, strict=True)
    )


def test_state_copies_and_pickles_go_round() -> None:
    small, other = small_of(0), small_of(0)
    with torch.no_grad():
        other[0].scales.mul_(2)
        other[2].bias.zero_()
    other.load_state_dict(small.state_dict())
    assert same_layers(small, other)
    torch.save(small, file := io.BytesIO())  # plain pickle knows no tensors of 8 bits
    file.seek(0)
    for copied in (copy.deepcopy(small), torch.load(file, weights_only=False)):
        assert same_layers(copied, small) and copied[0].rounded_from == torch.float32
    with pytest.raises(RuntimeError, match="scales"):
        spartan.to_block_sparse(model_of(), 16).load_state_dict(small.state_dict())
    with pytest.raises(RuntimeError, match="scales"):
        small.load_state_dict(spartan.to_block_sparse(model_of(), 16).state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_layers_come_back_bit_for_bit_in_any_model(dtype: torch.dtype, tmp_path: Path) -> None:
    small = small_of(dtype=dtype)
    spartan.save_pretrained(small, tmp_path)
    entries = spartan.describe_pretrained(tmp_path)
    first = next(entry for entry in entries if entry.name == "0.weight")
    assert (first.encoding, first.dtype, first.block_size, first.packed) == (
        "float8", str(dtype).removeprefix("torch."), (16, 16), True
    )  # fmt: skip
    assert [entry.zeros for entry in entries if entry.name.endswith("weight")] == [
        int((small[i].weight == 0).sum()) for i in (0, 2)
    ]
    assert load_file(tmp_path / "model.safetensors")["0.weight:values"].dtype == FLOAT8
    assert "float8" in str(spartan.inspect_file(tmp_path))
    fresh = (
        model_of(3, dtype),
        spartan.to_block_sparse(model_of(3, dtype), 16),
        small_of(3, dtype),
        small_of(0, dtype),
    )
    for model in fresh:
        assert same_layers(spartan.load_pretrained(model, tmp_path), small)


def test_what_was_saved_otherwise_is_loaded_into_such_a_model(tmp_path: Path) -> None:
    spartan.save_pretrained(model_of(), tmp_path / "dense")
    assert same_layers(spartan.load_pretrained(small_of(5), tmp_path / "dense"), small_of())
    packed = spartan.to_block_sparse(model_of(), 16)
    spartan.save_pretrained(packed, tmp_path / "packed")
    loaded = spartan.load_pretrained(small_of(5), tmp_path / "packed")
    assert same_layers(loaded, packed) and loaded[0].values.requires_grad
    spartan.save_pretrained(small_of(), tmp_path / "plain", dense=True)
    plain = spartan.load_pretrained(model_of(5), tmp_path / "plain")
    assert torch.equal(plain[0].weight, small_of()[0].weight)


def test_layers_stored_by_inputs_are_saved_too(tmp_path: Path) -> None:
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D

    def model(seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        layer = Conv1D(64, 32)
        with torch.no_grad():
            layer.weight[:16] = 0.0
        return nn.Sequential(layer)

    small = spartan.to_block_sparse(model(0), 16, float8=True)
    assert small[0].scales.shape == (64, 1) and small[0].weight.shape == (32, 64)
    spartan.save_pretrained(small, tmp_path)
    for fresh in (model(1), spartan.to_block_sparse(model(1), 16, float8=True)):
        assert same_layers(spartan.load_pretrained(fresh, tmp_path), small)
    spartan.save_pretrained(model(0), tmp_path / "dense")
    anew = spartan.load_pretrained(spartan.to_block_sparse(model(1), 16, float8=True), tmp_path / "dense")
    assert same_layers(anew, small)


@pytest.mark.parametrize("fault", ["no scales", "scales of half", "values of float32", "not packed"])
def test_a_file_that_is_not_of_8_bits_is_refused(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its digests are right."""
    spartan.save_pretrained(small_of(), tmp_path)
    path, config = tmp_path / "model.safetensors", tmp_path / "spartan.json"
    parts, document = load_file(path), json.loads(config.read_text())
    if fault == "no scales":
        del parts["0.weight:scales"]
    elif fault == "scales of half":
        parts["0.weight:scales"] = parts["0.weight:scales"].half()
    elif fault == "values of float32":
        parts["0.weight:values"] = parts["0.weight:values"].float()
    else:
        document["tensors"]["0.weight"]["packed"] = False
    folder = spartan.saving.folder
    save_file(parts, path, metadata={"format": "pt", "tensors": folder._digest(document["tensors"])})
    config.write_text(json.dumps(document | {"sha256": folder._sha256(path)}))
    model = model_of(3)
    with pytest.raises(ValueError, match=r"spartan.json|model.safetensors"):
        spartan.load_pretrained(model, tmp_path)
    assert same_layers(model, model_of(3))


def test_a_compiled_layer_computes_the_same() -> None:
    small, x = small_of(), torch.randn(4, 50)
    compiled = torch.compile(small, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), small(x))


def test_a_matrix_of_other_bits_is_not_taken_over() -> None:
    layer = small_of()[0]
    with pytest.raises(ValueError, match=r"float8_e4m3fn.*float32"):
        layer.load_packed(BlockSparseWeight.from_dense(layer.weight, 16, layer.packed.layout.mask()))
