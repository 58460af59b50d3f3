"""Saved models of every make: packed, tied, half precision, empty; killed saves; and what other tools read of them."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import spartan
from spartan.nn import BlockSparseLinear
from spartan.saving.export import CONFIG_FILE, MODEL_FILE, describe_pretrained
from spartan_kernels import BlockSparseWeight


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Also for dtypes that NumPy does not know, and NaN."""
    a, b = (t.detach().contiguous().view(-1).view(torch.uint8) for t in (a, b))
    return a.shape == b.shape and bool((a == b).all())


def states_equal(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(
        v.dtype == theirs[k].dtype and v.shape == theirs[k].shape and same_bits(v, theirs[k]) for k, v in ours.items()
    )


def pruned(seed: int, *widths: int, side: int = 16, density: float = 0.3, dtype: Any = torch.float32) -> nn.Sequential:
    """Linear layers with blocks of zeros, and a norm whose buffers are of several dtypes."""
    g = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for in_, out in itertools.pairwise(widths):
        layer = nn.Linear(in_, out)
        keep = torch.rand(math.ceil(out / side), math.ceil(in_ / side), generator=g) < density
        kept = keep.repeat_interleave(side, 0).repeat_interleave(side, 1)[:out, :in_]
        with torch.no_grad():
            layer.weight.copy_(torch.where(kept, torch.randn(out, in_, generator=g), 0.0))
            layer.bias.copy_(torch.randn(out, generator=g))
        layers += [layer, nn.BatchNorm1d(out)]
    return nn.Sequential(*layers).to(dtype)


class Tied(nn.Module):
    """An embedding whose weight is also the output layer's, and a layer under two names."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32, dtype=dtype)
        self.hidden = nn.Linear(32, 32, dtype=dtype)
        self.again = self.hidden
        self.head = nn.Linear(32, 50, bias=False, dtype=dtype)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor(2.0, dtype=dtype))

    def forward(self, token: Tensor) -> Tensor:
        return self.head(self.again(self.hidden(self.embedding(token)))) * self.scale


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    widths=st.lists(st.integers(0, 40), min_size=2, max_size=4),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    side=st.sampled_from([1, 4, 16]),
    density=st.sampled_from([0.0, 0.2, 1.0]),
    packed=st.booleans(),
    target_packed=st.booleans(),
    dense=st.booleans(),
)
def test_whatever_is_saved_comes_back(
    tmp_path: Path, widths: Any, dtype: Any, side: int, density: float, packed: bool, target_packed: bool, dense: bool
) -> None:
    model = pruned(0, *widths, side=side, density=density, dtype=dtype)
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if packed:
        spartan.to_block_sparse(model, side)
    spartan.save_pretrained(model, tmp_path, dense=dense)
    other = pruned(1, *widths, side=side, density=0.5, dtype=dtype)
    if target_packed:
        spartan.to_block_sparse(other, side)
    assert spartan.load_pretrained(other, tmp_path) is other
    for i, layer in enumerate(model):
        was_packed = isinstance(layer, BlockSparseLinear) and not dense
        assert isinstance(other[i], BlockSparseLinear) or not was_packed
        if isinstance(layer, (nn.Linear, BlockSparseLinear)):
            assert same_bits(other[i].weight, plain[f"{i}.weight"]), i
            assert same_bits(other[i].bias, plain[f"{i}.bias"]), i
        else:
            assert states_equal(layer, other[i])
    saved = {tensor.name: tensor for tensor in describe_pretrained(tmp_path)}
    assert saved.keys() == plain.keys()
    for name, tensor in plain.items():
        assert saved[name].zeros == int((tensor == 0).sum()) and saved[name].shape == tuple(tensor.shape)
        assert saved[name].stored_bytes <= tensor.nbytes or saved[name].packed
    if dense:
        assert all(same_bits(tensor, plain[name]) for name, tensor in load_file(tmp_path / MODEL_FILE).items())


def test_tied_tensors_are_saved_once_and_stay_tied(tmp_path: Path) -> None:
    model, other = Tied(), Tied()
    spartan.save_pretrained(model, tmp_path)
    saved = {tensor.name: tensor for tensor in describe_pretrained(tmp_path / CONFIG_FILE)}
    assert {name: t.tied_to for name, t in saved.items() if t.tied_to} == {
        "head.weight": "embedding.weight", "again.weight": "hidden.weight", "again.bias": "hidden.bias"
    }  # fmt: skip
    assert sum(t.stored_bytes for t in saved.values()) == 4 * (50 * 32 + 32 * 32 + 32 + 1)
    spartan.load_pretrained(other, tmp_path)
    assert states_equal(model, other) and other.head.weight is other.embedding.weight
    plain = Tied()
    plain.head.weight = nn.Parameter(torch.zeros(50, 32))
    spartan.load_pretrained(plain, tmp_path)
    assert same_bits(plain.head.weight, model.embedding.weight)


def test_packed_layers_keep_their_parts_and_parameters(tmp_path: Path) -> None:
    model = spartan.to_block_sparse(pruned(0, 64, 48, 32), 16)
    x = torch.randn(5, 64)
    model(x).sum().backward()
    spartan.save_pretrained(model, tmp_path)
    fresh = spartan.load_pretrained(pruned(1, 64, 48, 32), tmp_path)
    assert states_equal(model, fresh) and torch.equal(model.eval()(x), fresh.eval()(x))
    parameters = list(fresh.parameters())
    with torch.no_grad():
        for parameter in parameters:
            parameter.zero_()
    spartan.load_pretrained(fresh, tmp_path)
    assert states_equal(model, fresh) and all(a is b for a, b in zip(parameters, fresh.parameters(), strict=True))
    single = spartan.to_block_sparse(pruned(0, 64, 48)[0], 16)
    spartan.save_pretrained(single, tmp_path)
    target = nn.Linear(64, 48).requires_grad_(False).eval()
    loaded = spartan.load_pretrained(target, tmp_path)
    assert isinstance(loaded, BlockSparseLinear) and torch.equal(loaded(x), single(x))
    assert not any(p.requires_grad for p in loaded.parameters()) and not loaded.training


def test_packed_layers_of_another_shape_leave_the_parameter_alone() -> None:
    layer = spartan.to_block_sparse(pruned(0, 64, 48)[0], 16)
    assert isinstance(layer, BlockSparseLinear)
    with pytest.raises(ValueError, match=r"packed must be \(48, 64\) in blocks of shape .* got \(48, 32\)"):
        layer.load_packed(BlockSparseWeight.from_dense(torch.randn(48, 32), 16))


def test_a_packed_file_needs_layers_that_can_be_packed(tmp_path: Path) -> None:
    class Mine(nn.Linear):
        pass

    spartan.save_pretrained(spartan.to_block_sparse(pruned(0, 64, 48), 16), tmp_path)
    model = pruned(0, 64, 48)
    model[0] = Mine(64, 48)
    before = model[0].weight.clone()
    with pytest.raises(ValueError, match=r"another model: '0.weight' is packed, the model has no layer that can be"):
        spartan.load_pretrained(model, tmp_path)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("model", [Tied(torch.bfloat16), spartan.to_block_sparse(pruned(0, 64, 48, 10), 16)])
def test_other_tools_read_the_dense_file(tmp_path: Path, model: nn.Module) -> None:
    spartan.save_pretrained(model, tmp_path, dense=True)
    plain: Any = Tied(torch.bfloat16) if isinstance(model, Tied) else pruned(1, 64, 48, 10)
    plain.load_state_dict(load_file(tmp_path / MODEL_FILE))
    x = torch.arange(5) if isinstance(model, Tied) else torch.randn(5, 64)
    torch.testing.assert_close(plain.eval()(x), model.eval()(x), rtol=1e-5, atol=1e-5)
    again: Any = Tied(torch.bfloat16) if isinstance(model, Tied) else pruned(1, 64, 48, 10)
    assert states_equal(spartan.load_pretrained(again, tmp_path), plain)


class Stateful(nn.Module):
    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}

    def set_extra_state(self, state: Any) -> None:
        raise NotImplementedError


class Sharded(Tensor):
    """What a DTensor is to `save_pretrained`: a part of a tensor that can be asked for all of it."""

    def full_tensor(self) -> Tensor:
        raise NotImplementedError


def sharded() -> nn.Module:
    model = nn.Module()
    model.register_buffer("part", torch.zeros(2).as_subclass(Sharded))
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (sharded(), "tensor 'part' is sharded over processes"),
        (nn.Sequential(Stateful()), "state '0._extra_state' is a dict; only tensors can be saved"),
        (nn.Linear(2, 2, device="meta"), "tensor 'weight' is torch.strided on meta"),
    ],
)
def test_state_that_cannot_be_saved_is_refused_by_name(tmp_path: Path, model: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spartan.save_pretrained(model, tmp_path)


def test_shared_and_hooked_layers_stay_as_they_are() -> None:
    def block_sparse(in_: int, out: int) -> nn.Linear:
        layer = pruned(0, in_, out)[0]
        assert isinstance(layer, nn.Linear)
        return layer

    tied, hooked, twice = block_sparse(64, 64), block_sparse(64, 64), block_sparse(64, 64)
    other = nn.Linear(64, 64)
    other.weight = tied.weight
    hooked.register_forward_hook(lambda *_: None)
    model = nn.Sequential(tied, other, hooked, twice, nn.Sequential(twice), twice)
    spartan.to_block_sparse(model, 16)
    assert [type(layer) for layer in model[:3]] == [nn.Linear] * 3
    assert isinstance(model[3], BlockSparseLinear) and model[3] is model[4][0] is model[5]


def test_names_of_parts_do_not_collide(tmp_path: Path) -> None:
    model = nn.Module()
    model.register_parameter("w", nn.Parameter(torch.eye(64)))
    model.register_parameter("w:values", nn.Parameter(torch.ones(3)))
    with pytest.raises(ValueError, match=r"its part 'w:values' has the name of another tensor"):
        spartan.save_pretrained(model, tmp_path)


# ------------------------------------------------------------------------------------------- damage and interruption


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data())
def test_no_changed_byte_goes_unnoticed(tmp_path: Path, data: st.DataObject) -> None:
    model = spartan.to_block_sparse(pruned(0, 32, 16, 8), 8)
    folder = Path(tempfile.mkdtemp(dir=tmp_path))  # a save would go around what a changed byte has made foreign
    spartan.save_pretrained(model, folder)
    file = folder / data.draw(st.sampled_from([MODEL_FILE, CONFIG_FILE]))
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    file.write_bytes(content)
    target = pruned(1, 32, 16, 8)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    try:
        spartan.load_pretrained(target, folder)
    except ValueError as error:
        assert str(folder) in str(error)
        assert all(same_bits(tensor, before[name]) for name, tensor in target.state_dict().items())
    else:  # white space between the entries of the JSON says nothing
        assert file.name == CONFIG_FILE
        json.loads(content)
        assert states_equal(model, target)


_EXPORTER = """
import sys, torch, spartan
model = spartan.load_pretrained(torch.nn.Sequential(torch.nn.Linear(64, 48), torch.nn.Linear(48, 32)), sys.argv[1])
x = torch.load(sys.argv[2], weights_only=True)
tokens = {0: torch.export.Dim("tokens", min=2)}
torch.export.save(torch.export.export(model, (x[:3],), dynamic_shapes=(tokens,)), sys.argv[3])
"""
_RUNNER = """
import sys, torch, spartan
program = torch.export.load(sys.argv[1])
torch.save(program.module()(torch.load(sys.argv[2], weights_only=True)), sys.argv[3])
"""


def test_a_packed_model_travels_as_an_exported_program(tmp_path: Path) -> None:
    """Saved, loaded and exported in one process, run in another with a batch of another size."""
    model = nn.Sequential(*(pruned(i, *widths)[0] for i, widths in enumerate([(64, 48), (48, 32)])))
    x, (inputs, program, result) = torch.randn(7, 64), (str(tmp_path / name) for name in ("x", "p.pt2", "y"))
    torch.save(x, inputs)
    expected = spartan.to_block_sparse(model, 16)(x)
    spartan.save_pretrained(model, tmp_path / "model")
    for script, arguments in ((_EXPORTER, (tmp_path / "model", inputs, program)), (_RUNNER, (program, inputs, result))):
        subprocess.run([sys.executable, "-c", script, *map(str, arguments)], check=True, timeout=100)
    assert torch.equal(torch.load(result, weights_only=True), expected)


def _snapshots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: Callable[[], None], folder: Path) -> list[Path]:
    """Copies of `folder` as they would be left by a kill before each change of a name, and half-way through a file."""
    import spartan.saving.folder as module

    taken: list[Path] = []

    def take() -> None:
        taken.append(tmp_path / f"killed-{len(taken)}")
        shutil.copytree(folder, taken[-1])

    write, replace = module.save_file, module.os.replace

    def half(parts: Any, path: Path, **rest: Any) -> None:
        write(parts, path, **rest)
        whole = Path(path).read_bytes()
        Path(path).write_bytes(whole[: len(whole) // 2])
        take()
        Path(path).write_bytes(whole)

    def renamed(source: Any, target: Any) -> None:
        take()
        replace(source, target)
        take()

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", half)
        patch.setattr(module.os, "replace", renamed)
        save()
    return taken


def test_killed_at_any_point_the_old_model_or_the_new_one_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new, folder = pruned(0, 32, 16, 8), pruned(1, 32, 16, 8), tmp_path / "model"
    spartan.save_pretrained(old, folder)
    found = []
    taken = _snapshots(tmp_path, monkeypatch, lambda: spartan.save_pretrained(new, folder), folder)
    for left in taken:
        model = spartan.load_pretrained(pruned(2, 32, 16, 8), left)
        found.append("old" if states_equal(model, old) else "new" if states_equal(model, new) else "mixed")
        spartan.save_pretrained(old, left)
        assert states_equal(spartan.load_pretrained(pruned(2, 32, 16, 8), left), old)
    assert sorted(set(found)) == ["new", "old"] and found == sorted(found, reverse=True)


_SAVER = """
import sys, torch, spartan
from torch import nn
models = [nn.Linear(400, 400) for _ in range(2)]
for value, model in enumerate(models):
    for parameter in model.parameters():
        nn.init.constant_(parameter, float(value + 1))
print("ready", flush=True)
while True:
    for model in models:
        spartan.save_pretrained(model, sys.argv[1])
"""


def test_killed_by_the_system_one_model_is_there_whole(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", _SAVER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    deadline = time.monotonic() + 60
    while not (tmp_path / MODEL_FILE).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    process.stdout.close()
    model = spartan.load_pretrained(nn.Linear(400, 400), tmp_path)
    values = torch.cat([p.detach().flatten() for p in model.parameters()]).unique().tolist()
    assert values in ([1.0], [2.0])


def test_what_killed_saves_left_is_removed_after_a_while(tmp_path: Path) -> None:
    spartan.save_pretrained(nn.Linear(2, 2), tmp_path)
    left = [
        tmp_path / f".{MODEL_FILE}.123.tmp",
        tmp_path / f".{CONFIG_FILE}.123.tmp",
        tmp_path / f".{MODEL_FILE}.1.tmp",
    ]
    for file in left:
        file.write_bytes(b"half")
    for file in left[:2]:
        os.utime(file, (0, 0))
    spartan.save_pretrained(nn.Linear(2, 2), tmp_path)
    assert [file.exists() for file in left] == [False, False, True]
