"""Saved models: bit-exact, smaller with sparsity, and refused when anything about them is wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from spartan.methods import StaticRandom
from spartan.saving.encodings import Packed, pack, unpack
from spartan.saving.export import (
    CONFIG_FILE,
    MODEL_FILE,
    describe_pretrained,
    load_pretrained,
    save_pretrained,
    sparsity_of,
)
from spartan.saving.inspection import inspect_file
from spartan.sparsifier import Sparsifier


def network(seed: int = 0) -> nn.Sequential:
    """Linear layers with batch normalisation, so that there are buffers of several dtypes."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 96), nn.BatchNorm1d(96), nn.ReLU(), nn.Linear(96, 80), nn.Linear(80, 10))


def sparse(sparsity: float, block_size: Any = 1) -> nn.Sequential:
    model = network()
    method = StaticRandom(sparsity=sparsity, block_size=block_size)
    Sparsifier(model, method, 10, count="masked").finalize()
    return model


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


@given(
    shape=st.lists(st.integers(0, 20), max_size=4).map(tuple),
    density=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    block=st.sampled_from([None, 1, 4, (2, 7)]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16]),
    special=st.sampled_from([0.0, -0.0, float("nan"), float("-inf")]),
)
def test_packing_keeps_every_bit(
    shape: tuple[int, ...], density: float, block: Any, dtype: torch.dtype, special: float
) -> None:
    tensor = torch.randn(shape).to(dtype)
    tensor = torch.where(torch.rand(shape) < density, tensor, torch.zeros((), dtype=dtype))
    if tensor.numel():
        tensor.view(-1)[-1] = special
    packed = pack(tensor, block)
    assert same_bits(unpack(packed, tensor.shape, dtype), tensor)
    assert packed.parts["values"].numel() <= tensor.numel() or packed.encoding == "dense"


@pytest.mark.parametrize(
    ("tensor", "encoding"),
    [
        (torch.ones(50, 40), "dense"),
        (torch.ones(50, 40).bernoulli_(0.3, generator=torch.Generator().manual_seed(0)), "bitmap"),
        (torch.eye(60), "index"),
        (torch.eye(4).repeat_interleave(16, 0).repeat_interleave(16, 1), "blocks"),
        (torch.zeros(50, dtype=torch.int64), "dense"),
    ],
)
def test_the_smallest_encoding_is_chosen(tensor: torch.Tensor, encoding: str) -> None:
    assert pack(tensor).encoding == encoding


def test_blocks_record_their_size() -> None:
    weight = torch.zeros(96, 64)
    weight[16:32, 48:64] = torch.randn(16, 16)
    assert pack(weight).block_size == (16, 16)
    weight = torch.zeros(96, 64)
    weight[:48, 8:16] = torch.randn(48, 8)
    assert pack(weight, (48, 8)).block_size == (48, 8)


@pytest.mark.parametrize("block_size", [1, 16])
def test_round_trip_is_exact_and_shrinks(tmp_path: Path, block_size: int) -> None:
    sizes = []
    for sparsity in (0.0, 0.5, 0.9):
        model, other = sparse(sparsity, block_size), network(seed=1)
        folder = tmp_path / str(sparsity)
        save_pretrained(model, folder)
        assert sorted(os.listdir(folder)) == [MODEL_FILE, CONFIG_FILE]
        load_pretrained(other, folder)
        for name, tensor in model.state_dict().items():
            assert same_bits(tensor, other.state_dict()[name]), name
        zeros = sum(int((p == 0).sum()) for p in model.parameters())
        count = sum(p.numel() for p in model.parameters())
        assert sparsity_of(folder) == zeros / count
        sizes.append((folder / MODEL_FILE).stat().st_size)
    dense = 4 * (64 * 96 + 96 * 80)
    saved_half, saved_most = sizes[0] - sizes[1], sizes[0] - sizes[2]
    assert saved_half > 0.4 * dense
    assert saved_most > 0.8 * dense


def test_a_masked_model_is_refused(tmp_path: Path) -> None:
    model = network()
    Sparsifier(model, StaticRandom(sparsity=0.5), 10)
    with pytest.raises(ValueError, match=r"still masked at '0': call Sparsifier.finalize"):
        save_pretrained(model, tmp_path)
    assert not os.listdir(tmp_path)


def test_a_failed_save_leaves_the_previous_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pretrained(sparse(0.5), tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}

    def fail(parts: Any, path: Path, **rest: Any) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr("spartan.saving.folder.save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        save_pretrained(sparse(0.9), tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


def refused(folder: Path, message: str) -> None:
    """Check that the files are refused with `message` and the model stays as it was."""
    model = network(seed=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_pretrained(model, folder)
    assert all(same_bits(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match=message):
        describe_pretrained(folder)


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_truncated_files_are_refused_by_name(tmp_path: Path, length: int) -> None:
    for name in (MODEL_FILE, CONFIG_FILE):
        save_pretrained(sparse(0.5), tmp_path)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:length] if length >= 0 else content[: len(content) // 2])
        refused(tmp_path, name)
        (tmp_path / name).unlink()
        refused(tmp_path, name)


def test_damaged_weights_are_refused_by_name(tmp_path: Path) -> None:
    save_pretrained(sparse(0.5), tmp_path)
    content = bytearray((tmp_path / MODEL_FILE).read_bytes())
    content[-7] ^= 1
    (tmp_path / MODEL_FILE).write_bytes(content)
    refused(tmp_path, f"{MODEL_FILE} is damaged")


def edit(entry: str, key: str, value: Any) -> Any:
    def apply(config: dict[str, Any]) -> None:
        config["tensors"][entry][key] = value

    return apply


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (lambda c: c.update(format="other"), "is not a spartan-pretrained file"),
        (lambda c: c.update(version=3), "has version 3; this package reads version 2"),
        (lambda c: c.update(version=True), "has version True"),
        (lambda c: c.update(sha256="../../elsewhere"), "has no SHA-256"),
        (lambda c: c.update(extra=1), "has unknown or missing entries"),
        (lambda c: c.pop("sha256"), "has unknown or missing entries"),
        (lambda c: c["tensors"].pop("0.weight"), "is not what was saved"),
        (edit("0.weight", "encoding", "zip"), "the entry of '0.weight' is not valid"),
        (edit("0.weight", "shape", [96, -64]), "the entry of '0.weight' is not valid"),
        (edit("0.weight", "dtype", "float8"), "the entry of '0.weight' is not valid"),
        (edit("0.weight", "encoding", "tied"), "the entry of '0.weight' is not valid"),
        (edit("0.weight", "tied_to", "0.bias"), "the entry of '0.weight' is not valid"),
        (edit("0.weight", "packed", True), "the entry of '0.weight' is not valid"),
        (edit("0.weight", "block_size", [4, 4]), "the entry of '0.weight' is not valid"),
        (edit("0.weight", "more", 1), "the entry of '0.weight' is not valid"),
        (edit("0.weight", "shape", [64, 96]), "is not what was saved"),
        (edit("0.bias", "parameter", False), "is not what was saved"),
    ],
)
def test_tampered_metadata_is_refused_by_name(tmp_path: Path, tamper: Any, message: str) -> None:
    save_pretrained(sparse(0.5), tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    tamper(config)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    refused(tmp_path, f"{CONFIG_FILE}.*{message}")


def test_files_of_another_model_are_refused_by_name(tmp_path: Path) -> None:
    save_pretrained(sparse(0.5), tmp_path)
    with pytest.raises(ValueError, match=rf"{MODEL_FILE} is of another model: it lacks .*'5.weight'"):
        load_pretrained(nn.Sequential(*network(), nn.Linear(10, 2)), tmp_path)
    wider = network()
    wider[4] = nn.Linear(80, 11)
    with pytest.raises(ValueError, match=r"another model: '4.weight' is torch.float32 of shape \(10, 80\)"):
        load_pretrained(wider, tmp_path)
    with pytest.raises(ValueError, match=r"another model: '0.weight' .* the model's is torch.float64"):
        load_pretrained(network().double(), tmp_path)


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (Packed("index", {"index": torch.tensor([3, 2]), "values": torch.ones(2)}), "not increasing"),
        (Packed("index", {"index": torch.tensor([0, 12]), "values": torch.ones(2)}), "not increasing in"),
        (Packed("index", {"index": torch.tensor([0, 1]), "values": torch.ones(3)}), "values have shape"),
        (Packed("bitmap", {"bitmap": torch.zeros(1, dtype=torch.uint8), "values": torch.ones(0)}), "bitmap is"),
        (Packed("bitmap", {"bitmap": torch.tensor([0, 1], dtype=torch.uint8), "values": torch.ones(0)}), "past its"),
        (Packed("dense", {"values": torch.ones(4, 3)}), "values have shape"),
        (Packed("dense", {"values": torch.ones(3, 4, dtype=torch.float64)}), "values are torch.float64"),
    ],
)
def test_parts_that_do_not_fit_are_refused(packed: Packed, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unpack(packed, torch.Size((3, 4)), torch.float32)


def test_a_dtype_that_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"tensor 'weight' has dtype torch.complex64"):
        save_pretrained(model, tmp_path)


def test_a_model_folder_with_a_named_pipe_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(8, 8)
    for pipe in (MODEL_FILE, CONFIG_FILE):
        folder = tmp_path / pipe.split(".")[0]
        save_pretrained(model, folder)
        (folder / pipe).unlink()
        os.mkfifo(folder / pipe)
        with pytest.raises(ValueError, match="is not a regular file"):
            load_pretrained(nn.Linear(8, 8), folder)
    with pytest.raises(ValueError, match="is not a regular file"):
        inspect_file(tmp_path / MODEL_FILE.split(".")[0])
