"""Memories of two levels: against loops over tokens in float64, and behind the layers of frozen models."""

from __future__ import annotations

import copy
import json
import pickle
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spartan
from spartan.layers import (
    HierarchicalMemory,
    add_memory,
    load_memory_state_dict,
    memory_state_dict,
    remove_memory,
)

EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "layers"
pytestmark = pytest.mark.usefixtures("one_thread")


def filled(*sizes: int, gather: bool | None = None, seed: int = 0) -> HierarchicalMemory:
    """A memory whose cells are not zero."""
    torch.manual_seed(seed)
    memory = HierarchicalMemory(*sizes, gather=gather)
    nn.init.normal_(memory.cells)
    return memory


def by_loops(memory: HierarchicalMemory, hidden: Tensor) -> Tensor:
    """The equation, token by token and child by child."""
    rows = []
    for h in hidden.reshape(-1, memory.width):
        scores = memory.parent_keys @ h
        kept = scores.sort(descending=True).indices[: memory.kept]
        shares = scores[kept].exp() / scores[kept].exp().sum()
        read = torch.zeros_like(h)
        for share, parent in zip(shares, kept, strict=True):
            within = (memory.child_keys[parent] @ h).exp()
            for weight, cell in zip(within / within.sum(), memory.cells[parent], strict=True):
                read = read + share * weight * cell
        rows.append(h + read)
    return torch.stack(rows).view_as(hidden)


def gradients(y: Tensor, memory: HierarchicalMemory, hidden: Tensor, upstream: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y, [hidden, *memory.parameters()], upstream))


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize(
    ("shape", "sizes"),
    [((3, 5, 8), (8, 6, 3, 2)), ((7,), (7, 1, 1, 1)), ((4, 9), (9, 5, 1, 5))],
)
def test_equals_loops_with_gradients(gather: bool, shape: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    memory = filled(*sizes, gather=gather).double()
    hidden = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(hidden)
    y = memory(hidden)
    expected = by_loops(memory, hidden)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(
        gradients(y, memory, hidden, upstream), gradients(expected, memory, hidden, upstream), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("gather", [True, False])
def test_no_tokens_at_all(gather: bool) -> None:
    assert filled(6, 4, 2, 3, gather=gather)(torch.zeros(2, 0, 6)).shape == (2, 0, 6)


@pytest.mark.parametrize("gather", [True, False])
def test_float32_is_near_float64(gather: bool) -> None:
    memory = filled(48, 40, 3, 5, gather=gather)
    hidden = torch.randn(2, 33, 48)
    exact = by_loops(copy.deepcopy(memory).double(), hidden.double())
    assert (memory(hidden) - exact).abs().max() < 1e-5 * exact.abs().max()


def test_cells_start_at_zero_and_every_parameter_learns_afterwards() -> None:
    memory = HierarchicalMemory(8, 4, 2, 2)
    hidden = torch.randn(16, 8)
    assert torch.equal(memory(hidden), hidden)
    optimizer = torch.optim.SGD(memory.parameters(), lr=0.5)
    before = copy.deepcopy(memory.state_dict())
    for _ in range(2):
        optimizer.zero_grad()
        (memory(hidden) - hidden.roll(1, 0)).square().mean().backward()
        optimizer.step()
    assert all(not torch.equal(before[name], value) for name, value in memory.state_dict().items())


def test_products_are_counted() -> None:
    gathered, masked = (HierarchicalMemory(10, 8, 3, 2, gather=gather) for gather in (True, False))
    assert gathered.multiply_adds == 10 * (8 + 2 * 2 * 3) and masked.multiply_adds == 10 * (8 + 2 * 8 * 3)
    assert HierarchicalMemory(4, 64, 1, 2).gather and not HierarchicalMemory(4, 63, 1, 2).gather
    assert "kept=2, gather=False" in repr(masked)


@pytest.mark.parametrize("gather", [True, False])
def test_composes(gather: bool, tmp_path: Path) -> None:
    memory = filled(16, 8, 2, 3, gather=gather)
    hidden = torch.randn(2, 5, 16)
    y = memory(hidden)
    torch.testing.assert_close(
        torch.compile(memory, fullgraph=True, backend="aot_eager")(hidden), y, rtol=1e-5, atol=1e-5
    )
    assert torch.equal(copy.deepcopy(memory)(hidden), y)
    with torch.autocast("cpu", torch.bfloat16):
        low = memory(hidden)
        low.sum().backward()
    assert low.dtype == torch.float32 and memory.cells.grad is not None
    memory.zero_grad()
    spartan.save_pretrained(memory, tmp_path / "saved")
    again = spartan.load_pretrained(HierarchicalMemory(16, 8, 2, 3, gather=gather), tmp_path / "saved")
    assert torch.equal(again(hidden), y)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0,), "width must be at least 1; got 0"),
        ((4, 0), "parents must be at least 1; got 0"),
        ((4, 2, 0), "children must be at least 1; got 0"),
        ((4, 2, 1, 3), "kept must be from 1 to the 2 parents; got 3"),
        ((4, 2, 1, 0), "kept must be from 1 to the 2 parents; got 0"),
    ],
)
def test_wrong_sizes_are_refused(sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HierarchicalMemory(*sizes)


def test_hidden_states_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"hidden must be \[..., 4\]; got \(2, 3\)"):
        HierarchicalMemory(4, 2, 1, 1)(torch.zeros(2, 3))


class Tupled(nn.Module):
    """A layer that gives its states and something else."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return self.norm(self.linear(x)), "attention"


class Model(nn.Module):
    """A stack of layers that give tuples, and a head with a buffer."""

    def __init__(self, layer: type[nn.Module] = Tupled) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(layer() for _ in range(3))
        self.head = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)[0]
        return self.head(x)


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, nn.LayerNorm(8)), nn.Linear(8, 3))


def fill(parameters: list[nn.Parameter]) -> None:
    for seed, parameter in enumerate(parameters):
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(seed))


def test_a_model_gives_the_same_until_its_memories_are_trained() -> None:
    model, x = encoder(), torch.randn(2, 5, 8)
    y = model(x)
    parameters = add_memory(model, parents=4, children=2, kept=2)
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-6)  # frozen weights take other kernels
    fill(parameters)
    first, second = (layer.memory for layer in model[0].layers)
    x1 = by_loops(first, copy.deepcopy(encoder())[0].layers[0](x))
    expected = by_loops(second, encoder()[0].layers[1](x1))
    torch.testing.assert_close(model[0](x), model[0].norm(expected), rtol=1e-4, atol=1e-5)


def test_only_the_memories_and_the_named_head_are_trained() -> None:
    model = encoder()
    frozen = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = add_memory(model, train="1.*", parents=4, children=2, kept=2)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {id(p) for p in parameters} == {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {"1.weight", "1.bias"} | {
        f"0.layers.{i}.memory.{name}" for i in range(2) for name in ("parent_keys", "child_keys", "cells")
    }
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(2, 5, 8)).square().sum().backward()
        optimizer.step()
    state = model.state_dict()
    assert all(torch.equal(state[name], value) == (name not in trained) for name, value in frozen.items())


def test_tuples_buffers_saving_and_removal(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Model(), torch.randn(5, 6)
    model.blocks[1].requires_grad_(False)
    plain, before = copy.deepcopy(model).eval(), {n: p.requires_grad for n, p in model.named_parameters()}
    fill(add_memory(model, train=["head.0.*", "head.1.*"], parents=3, children=2, kept=2))
    model(x)  # changes the buffers
    torch.save(memory_state_dict(model), tmp_path / "memory.pt")
    state = torch.load(tmp_path / "memory.pt")
    assert {name for name in state if "memory" not in name} == {name for name in model.state_dict() if "head" in name}
    other = copy.deepcopy(plain)
    add_memory(other, train="head.*", parents=3, children=2, kept=2)
    load_memory_state_dict(other, state)
    assert torch.equal(other.eval()(x), model.eval()(x)) and not torch.allclose(model(x), plain(x))
    remove_memory(model)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model.eval()(x), plain(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_memories_of_its_own(copied: Any) -> None:
    model, x = encoder().eval(), torch.randn(2, 5, 8)
    y = model(x)
    fill(add_memory(model, parents=4, children=2, kept=2))
    other = copied(model)
    assert torch.equal(other(x), model(x))
    remove_memory(other)
    torch.testing.assert_close(other(x), y)
    assert not torch.allclose(model(x), y)


def test_inference_with_padding() -> None:
    """Without memories, PyTorch would pass nested tensors here."""
    model, x = encoder()[0].eval(), torch.randn(2, 5, 8)
    there = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    with torch.no_grad():
        y = model(x, src_key_padding_mask=~there)
        parameters = add_memory(model, parents=4, children=2, kept=2)
        torch.testing.assert_close(model(x, src_key_padding_mask=~there)[there], y[there], rtol=1e-5, atol=1e-5)
        fill(parameters)
        shorter = model(x[1:, :3])
        torch.testing.assert_close(model(x, src_key_padding_mask=~there)[1:, :3], shorter, rtol=1e-4, atol=1e-4)
        remove_memory(model)
        assert torch.equal(model(x, src_key_padding_mask=~there), y)


def test_a_model_composes(tmp_path: Path) -> None:
    model, x = encoder(), torch.randn(2, 5, 8)
    fill(add_memory(model, parents=4, children=2, kept=2))
    y = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), y, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        model(x).float().sum().backward()
    model.zero_grad()
    spartan.save_pretrained(model, tmp_path / "saved")
    again = encoder()
    add_memory(again, parents=4, children=2, kept=2)
    assert torch.equal(spartan.load_pretrained(again, tmp_path / "saved")(x), y)


def test_an_encoder_of_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason="the extra `integrations`")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=30, **sizes)).eval()
    tokens = torch.randint(30, (2, 7))
    y = model(tokens).last_hidden_state
    parameters = add_memory(model, parents=4, children=2, kept=2)
    assert torch.equal(model(tokens).last_hidden_state, y)
    assert {name.rpartition(".")[0] for name in memory_state_dict(model)} == {
        f"encoder.layer.{i}.memory" for i in range(2)
    }
    fill(parameters)
    assert not torch.allclose(model(tokens).last_hidden_state, y)


def test_memories_beside_half_precision_are_trained_in_float32() -> None:
    model = nn.Sequential(*(nn.LayerNorm(8) for _ in range(2))).to(torch.bfloat16)
    trained = add_memory(model, parents=2, children=1, kept=1)
    assert {p.dtype for p in trained} == {torch.float32}
    y = model(torch.randn(3, 8, dtype=torch.bfloat16))
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16 and all(p.grad is not None for p in trained)


def test_a_tied_parameter_is_found_by_either_name() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 8), "body": nn.Sequential(*(nn.LayerNorm(8) for _ in range(2)))})
    model["head"] = nn.Linear(8, 5)
    model["head"].weight = model["embed"].weight
    trained = add_memory(model, train="head.*", parents=2, children=1, kept=1)
    assert any(p is model["embed"].weight for p in trained) and any(p is model["head"].bias for p in trained)


def test_layers_are_named_by_patterns() -> None:
    model = Model()
    parameters = add_memory(model, layers=["blocks.0", "blocks.[2-9]*"], width=6, parents=3, children=1, kept=1)
    assert [hasattr(block, "memory") for block in model.blocks] == [True, False, True] and len(parameters) == 6


def test_memories_have_the_dtype_of_their_layer() -> None:
    model = encoder().double()
    assert {p.dtype for p in add_memory(model)} == {torch.float64}


class Named(nn.Module):
    """A layer with a child of the memory's name."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.memory = nn.LayerNorm(6), nn.Identity()


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (nn.Linear(2, 2), {}, "no stack of layers of one class"),
        (Model(), {"layers": "layer.*"}, r"layers pattern 'layer\.\*' matches nothing; the names are \['blocks'"),
        (Model(), {"train": "classifier.*"}, r"train pattern 'classifier\.\*' matches nothing"),
        (Model(), {"kept": 40}, "kept must be from 1 to the 32 parents; got 40"),
        (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), {}, "layer '0' has no norm that shows its width"),
        (Model(Named), {}, "layer 'blocks.0' has an attribute 'memory' already"),
    ],
)
def test_wrong_settings_are_refused_and_leave_the_model(
    model: nn.Module, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        add_memory(model, **settings)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="model must have memories"):
        memory_state_dict(model)


def test_other_refusals() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module; got int"):
        add_memory(3)  # type: ignore[arg-type]
    model = Model()
    for needs_memories in (memory_state_dict, remove_memory, lambda model: load_memory_state_dict(model, {})):
        with pytest.raises(ValueError, match="model must have memories"):
            needs_memories(model)
    add_memory(model, parents=3, kept=2)
    with pytest.raises(ValueError, match="model has memories already"):
        add_memory(model)
    with pytest.raises(ValueError, match="model must have memories"):
        memory_state_dict(nn.Sequential(model))
    state = memory_state_dict(model)
    with pytest.raises(ValueError, match=r"it lacks \[\] and has besides \['head.0.weight'\]"):
        load_memory_state_dict(model, {**state, "head.0.weight": torch.zeros(4, 6)})
    name = "blocks.0.memory.cells"
    with pytest.raises(ValueError, match=rf"state\['{name}'\] must be \(3, 4, 6\); got \(3, 4, 5\)"):
        load_memory_state_dict(model, {**state, name: torch.zeros(3, 4, 5)})
    model.blocks[0].forward = lambda x: {"states": x}  # type: ignore[method-assign, assignment]
    with pytest.raises(TypeError, match="must give a tensor or a tuple that begins with one; got dict"):
        model(torch.zeros(2, 6))


def spelled(number: int) -> str:
    """A word for a number."""
    return "".join(chr(97 + int(digit)) for digit in str(number))


def write_wordnet(folder: Path) -> None:
    """A few hundred made-up synsets in WordNet's files."""
    folder.mkdir()
    for part, kind, first in (("noun", "n", 3), ("verb", "v", 29), ("adj", "s", 0), ("adv", "r", 2)):
        lines = ["  1 This is the licence."]
        for i in range(60):
            above = f"001 @ {(i - 1) // 3:08d} {kind} 0000" if i and kind in "nv" else "000"
            frame = " 01 + 02 00" if kind == "v" else ""
            words = f"02 {part}_{spelled(i)} 0 x{spelled(i % 7)}(p) 1"
            gloss = f'{part} called {spelled(i + 100)} of group {spelled(i % 5)}; "an example | of it"'
            lines.append(f"{i:08d} {first + i % 3:02d} {kind} {words} {above}{frame} | {gloss}  ")
        (folder / f"data.{part}").write_text("\n".join(lines) + "\n")


def test_wordnet_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    import wordnet

    write_wordnet(tmp_path / "wordnet")
    found = {synset.key: synset for synset in wordnet.read(tmp_path / "wordnet")}
    assert len(found) == 240
    synset = wordnet.Synset("v00000004", 30, ("verb e", "xe"), "verb called bae of group e", ("v00000001",))
    assert found["v00000004"] == synset and found["a00000000"].above == ()
    with pytest.raises(SystemExit, match="install the Debian package wordnet-base"):
        wordnet.read(tmp_path)


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("transformers", "peft", "matplotlib", "rich"):
        pytest.importorskip(package)
    write_wordnet(tmp_path / "wordnet")
    monkeypatch.syspath_prepend(EXAMPLES)
    script = EXAMPLES / "hierarchical_memory.py"
    arguments = ["--quick", "--model", "tiny", "--data", str(tmp_path / "wordnet"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    runpy.run_path(str(script), run_name="__main__")
    results = json.loads((tmp_path / "out" / "hierarchical_memory.json").read_text())["results"]
    assert [row["method"] for row in results] == ["linear probe", *["memory"] * 2, "LoRA", "fine-tuning"]
    assert (
        len({row["trained"] for row in results[1:3]}) == 1 and (tmp_path / "out" / "hierarchical_memory.png").exists()
    )
