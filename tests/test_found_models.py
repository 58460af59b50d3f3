"""Models as people have them: frozen, with adapters, pruned elsewhere, without a head, without values yet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune, spectral_norm, weight_norm

import spartan
from spartan import OneShot, Sparsifier, Spartan

pytestmark = pytest.mark.usefixtures("one_thread")


def masked_and_skipped(model: nn.Module, **arguments: object) -> tuple[list[str], dict[str, str]]:
    sparsifier = Sparsifier(model, OneShot(sparsity=0.1), 10, count="masked", **arguments)  # type: ignore[arg-type]
    return list(sparsifier.masks()), sparsifier.skipped


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


# ------------------------------------------------------------------------------------------- frozen, adapters


def test_frozen_layers_are_left_alone_unless_chosen() -> None:
    model = network()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    masked, skipped = masked_and_skipped(model)
    assert masked == ["2.weight"]
    assert skipped["0.weight"] == "frozen: its requires_grad is False"
    assert type(model[0]) is nn.Linear and torch.equal(model[0].weight, before)
    model = network()
    model[0].requires_grad_(False)
    assert masked_and_skipped(model, include=["0.*", "2.*"])[0] == ["0.weight", "2.weight"]


class Adapted(nn.Module):
    """Built as PEFT's LoRA layers are: the frozen Linear as `base_layer`, two small ones in dictionaries beside it."""

    adapter_layer_names = ("lora_A", "lora_B")

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer and its adapter."""
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class OtherNames(Adapted):
    """Adapters of a library that lists them under names of its own."""

    adapter_layer_names = ("down",)

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base)
        del self.lora_A, self.lora_B
        self.down = nn.ModuleDict({"default": nn.Linear(8, 2)})


def test_adapters_are_left_alone_and_base_weights_found() -> None:
    model = nn.Sequential(Adapted(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3), Adapted(nn.Linear(3, 2)))
    masked, skipped = masked_and_skipped(model)
    assert masked == ["0.base_layer.weight", "2.weight"]
    assert skipped["0.lora_A.default.weight"] == "adapter: lora_A"
    assert skipped["3.lora_B.default.weight"] == "adapter: lora_B"
    assert skipped["3.base_layer.weight"] == "head: the last Linear"  # not the adapter that comes after it
    model = nn.Sequential(OtherNames(nn.Linear(6, 8)), nn.Linear(8, 3))
    assert masked_and_skipped(model)[1]["0.down.default.weight"] == "adapter: down"


def test_base_weights_of_adapters_are_frozen_and_can_be_chosen() -> None:
    model = nn.Sequential(Adapted(nn.Linear(6, 8)), nn.Linear(8, 3))
    model[0].base_layer.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'0.base_layer.weight': 'frozen: its requires_grad is False'"):
        masked_and_skipped(model)
    assert masked_and_skipped(model, include="*.base_layer.weight")[0] == ["0.base_layer.weight"]


# ------------------------------------------------------------------------------------- pruned, made by a hook


def test_a_model_pruned_by_torch_is_skipped_with_the_way_out() -> None:
    model = network()
    prune.random_unstructured(model[0], "weight", 0.5)
    masked, skipped = masked_and_skipped(model)
    assert masked == ["2.weight"]
    assert skipped["0.weight_orig"] == (
        "pruned by torch.nn.utils.prune: prune.remove(module, 'weight') makes it plain, and keep_zeros=True keeps its"
        " zeros"
    )
    model = network()
    prune.random_unstructured(model[0], "weight", 0.5)
    prune.l1_unstructured(model[0], "weight", 3)  # twice: torch keeps a container of both
    assert masked_and_skipped(model)[1]["0.weight_orig"].startswith("pruned by torch.nn.utils.prune")


def test_the_way_out_keeps_the_zeros_of_a_model_pruned_by_torch() -> None:
    model = network()
    prune.random_unstructured(model[0], "weight", 0.5)
    prune.remove(model[0], "weight")
    zero = model[0].weight == 0
    sparsifier = Sparsifier(model, OneShot(sparsity=0.2), 10, count="masked", keep_zeros=True)
    assert list(sparsifier.masks()) == ["0.weight", "2.weight"]
    sparsifier.finalize()
    assert bool((model[0].weight[zero] == 0).all())


@pytest.mark.parametrize("made", [weight_norm, spectral_norm])
@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_a_weight_that_a_hook_makes_is_skipped_by_its_name(made: Callable[[nn.Module], nn.Module]) -> None:
    model = network()
    made(model[0])
    masked, skipped = masked_and_skipped(model)
    assert masked == ["2.weight"]
    source = "weight_v" if made is weight_norm else "weight_orig"
    kind = "WeightNorm" if made is weight_norm else "SpectralNorm"
    assert skipped[f"0.{source}"] == f"weight is made of it by {kind}"
    with pytest.raises(ValueError, match=f"only .*weight is made of it by {kind}"):
        masked_and_skipped(network()[:1].append(model[0]), include=f"1.{source}")


def test_quantised_weights_are_skipped_by_their_type() -> None:
    model = network()
    model[0].weight = nn.Parameter(model[0].weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    model[2].weight = nn.Parameter(model[2].weight.detach().to(torch.int8), requires_grad=False)
    skipped = masked_and_skipped(model.append(nn.Linear(3, 3)), include=nn.Linear)[1]
    assert skipped["0.weight"] == "quantised: float8_e4m3fn"
    assert skipped["2.weight"] == "not floating point"


# --------------------------------------------------------------------------------------------- without a head


def encoder(layers: int = 2) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


class Block(nn.Module):
    """A residual block; the first has a table that the others lack."""

    def __init__(self, table: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        if table:
            self.table = nn.Embedding(3, 8)


class Backbone(nn.Module):
    """Named as Hugging Face's models are: `base_model_prefix` is what those with a head call the one without."""

    base_model_prefix = "net"

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.pooler = nn.Linear(6, 8), nn.Linear(8, 5)


class BackboneForScores(nn.Module):
    """One of those with a head."""

    base_model_prefix = "net"

    def __init__(self) -> None:
        super().__init__()
        self.net, self.score = Backbone(), nn.Linear(5, 3)


NO_HEAD = {
    "encoder of PyTorch": (encoder, "layers.1.linear2, the last Linear, is in a layer of a Transformer"),
    "a single layer": (lambda: encoder(1), "layers.0.linear2, the last Linear, is in a layer of a Transformer"),
    "repeated blocks": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.ModuleList([Block(True), Block(False)])),
        "1.1.down, the last Linear, is in a layer that repeats",
    ),
    "base model": (Backbone, "pooler, the last Linear, is of Backbone, which has no head"),
}


@pytest.mark.parametrize("name", NO_HEAD)
def test_the_last_layer_of_a_model_without_a_head_is_masked_like_the_others(name: str) -> None:
    make, reason = NO_HEAD[name]
    model = make()
    sparsifier = Sparsifier(model, OneShot(sparsity=0.1), 10, count="masked")
    last = reason.split(",")[0] + ".weight"
    assert list(sparsifier.masks())[-1] == last
    assert not [name for name, why in sparsifier.skipped.items() if why.startswith("head")]
    report = sparsifier.report()
    assert report.no_head == reason and f"no head: {reason}" in str(report)


def test_a_head_is_still_found_where_there_is_one() -> None:
    heads = {
        "1.weight": nn.Sequential(encoder(), nn.Linear(8, 3)),
        "score.weight": BackboneForScores(),
        "1.0.weight": nn.Sequential(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Sequential(nn.Linear(8, 3))),
        "4.weight": network(),
    }
    for name, model in heads.items():
        sparsifier = Sparsifier(model, OneShot(sparsity=0.1), 10, count="masked")
        assert [key for key, why in sparsifier.skipped.items() if "head" in why] == [name]
        assert sparsifier.report().no_head is None and "no head" not in str(sparsifier.report())


# ------------------------------------------------------------------------------------------------ without values


def test_a_model_on_the_meta_device_is_refused_until_it_has_values() -> None:
    with torch.device("meta"):
        model = network()
    with pytest.raises(ValueError, match=r"its parameter '0.weight' is on the meta device: call model.to_empty"):
        Sparsifier(model, Spartan(sparsity=0.5), 10)
    model[0], model[2] = nn.Linear(6, 8), nn.Linear(8, 8)
    with pytest.raises(ValueError, match=r"its parameter '4.weight' is on the meta device"):  # a dense one
        Sparsifier(model, Spartan(sparsity=0.5), 10)
    model.to_empty(device="cpu")
    for module in model:
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    sparsifier = Sparsifier(model, Spartan(sparsity=0.5), 10)
    assert bool(sparsifier.masks()["0.weight"].hard.all())


# ----------------------------------------------------------------------------------------- kinds of layers together


class Vision(nn.Module):
    """Grouped and depthwise convolutions, a recurrent layer, normalised weights and one layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.LazyConv2d(16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 32, 3, padding=1, groups=4)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.lstm = nn.LSTM(32, 24, batch_first=True)
        self.normalised = nn.utils.parametrizations.weight_norm(nn.Linear(24, 24))
        self.shared = nn.Linear(24, 24)
        self.again = self.shared
        self.head = nn.Linear(24, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scores of images [n, 3, h, w]."""
        y = self.depthwise(torch.relu(self.grouped(torch.relu(self.stem(x)))))
        y, _ = self.lstm(y.flatten(2).mT)
        return self.head(self.again(torch.relu(self.shared(self.normalised(y[:, -1])))))


@pytest.mark.parametrize("block", [1, (4, 4)])
def test_layers_of_every_kind_together(block: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Vision()
    with pytest.raises(ValueError, match=r"'stem\.weight' is not initialised yet"):
        Sparsifier(model, Spartan(sparsity=0.5), 8)
    x = torch.randn(6, 3, 6, 6)
    model(x)
    include = ["stem.weight", "grouped.weight", "depthwise.weight", "lstm.weight*", "shared.weight"]
    sparsifier = Sparsifier(model, Spartan(sparsity=0.5, block_size=block), 8, include=include, count="masked")
    assert len(sparsifier.masks()) == 6
    assert sparsifier.skipped["normalised.parametrizations.weight.original1"] == "parametrized already"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsifier.attach(optimizer)
    names = list(model.state_dict())
    for _ in range(8):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.arange(6) % 3).backward()
        optimizer.step()
    masked = list(sparsifier.masks())
    sparsifier.finalize()
    assert list(model.state_dict()) == names and model.again is model.shared
    zeros = sum(int((model.get_parameter(key) == 0).sum()) for key in masked)
    total = sum(model.get_parameter(key).numel() for key in masked)
    assert abs(zeros - 0.5 * total) <= 16
    expected = model(x)
    fresh = Vision()
    fresh(x)
    spartan.save_pretrained(model, tmp_path)
    assert torch.equal(spartan.load_pretrained(fresh, tmp_path)(x), expected)
    spartan.to_block_sparse(model, 4)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert model.again is model.shared
