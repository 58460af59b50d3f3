"""Weights have the names of the plain model, whatever wraps the model or a module of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import spartan
from spartan import FLOPs, Group, History, Sparsifier, Spartan
from spartan.saving.export import describe_pretrained

if not dist.is_available():
    pytest.skip("PyTorch was built without torch.distributed", allow_module_level=True)

from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

STEPS = 10
NAMES = ["0.weight", "2.0.weight"]


@pytest.fixture(autouse=True)
def alone(one_thread: None) -> Iterator[None]:
    """A process group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Sequential(nn.Linear(16, 20), nn.Tanh()), nn.Linear(20, 4))


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def compiled_part(model: nn.Sequential) -> nn.Module:
    model[2][0] = compiled(model[2][0])  # type: ignore[index, operator]
    return model


def checkpointed_parts(model: nn.Sequential) -> nn.Module:
    model[0], model[2] = checkpoint_wrapper(model[0]), checkpoint_wrapper(model[2])
    return model


WRAPPINGS: list[Callable[[nn.Sequential], nn.Module]] = [
    DistributedDataParallel,
    nn.DataParallel,
    compiled,
    compiled_part,
    checkpointed_parts,
    lambda model: DistributedDataParallel(compiled(checkpointed_parts(model))),
]
IDS = ["ddp", "dp", "compiled", "compiled-part", "checkpointed", "all"]
each_wrapping = pytest.mark.parametrize("wrapped", WRAPPINGS, ids=IDS)


def train(model: nn.Module, sparsifier: Sparsifier, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    for step in range(steps):
        x = torch.randn(16, 12, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        functional.cross_entropy(model(x), x[:, :4].argmax(1)).backward()
        optimizer.step()


@each_wrapping
def test_states_go_between_wrapped_and_plain_models(wrapped: Callable[[nn.Sequential], nn.Module]) -> None:
    nets = network(), network()
    plain = copy.deepcopy(nets[1])
    models = wrapped(nets[0]), plain
    method = Spartan(sparsity=0.6, distribution={"0.weight": 0.3})
    first, second = (Sparsifier(model, method, STEPS, count="masked") for model in models)
    assert list(first.masks()) == list(second.masks()) == NAMES
    assert first.skipped == second.skipped
    assert [row.name for row in first.report().rows] == list(first.costs()) == list(first.kept_fractions()) == NAMES
    train(models[0], first, 6)
    state = first.state_dict()
    second.load_state_dict(state)
    again = Sparsifier(wrapped(nets[1]), method, STEPS, count="masked")
    again.load_state_dict(second.state_dict())
    for name, mask in first.masks().items():
        assert torch.equal(mask.soft, second.masks()[name].soft)
        assert torch.equal(mask.soft, again.masks()[name].soft)
    for sparsifier in (first, second, again):
        sparsifier.finalize()
    assert list(first.costs()) == NAMES


@each_wrapping
def test_patterns_groups_and_costs_are_of_plain_names(wrapped: Callable[[nn.Sequential], nn.Module]) -> None:
    asked = []

    def per_block(name: str, module: nn.Module, grid: tuple[int, ...]) -> float:
        asked.append((name, type(module)))
        return 1.0

    groups = [Group(include="2.*", sparsity=0.5)]
    sparsifier = Sparsifier(wrapped(network()), Spartan(sparsity=0.6), STEPS, include="0.*", groups=groups)
    assert list(sparsifier.masks()) == NAMES
    sparsifier = Sparsifier(wrapped(network()), Spartan(sparsity=0.6), STEPS, exclude="2.0.weight", costs=per_block)
    assert list(sparsifier.masks()) == ["0.weight"]
    assert asked == [("0.weight", nn.Linear)]
    assert sparsifier.skipped["2.0.weight"] == "excluded"
    flops = Sparsifier(wrapped(network()), Spartan(sparsity=0.6), STEPS, costs=FLOPs(torch.randn(1, 12)))
    assert {name: cost.dense for name, cost in flops.costs().items()} == pytest.approx(
        {"0.weight": 2 * 12 * 16, "2.0.weight": 2 * 16 * 20}
    )


@each_wrapping
def test_masks_go_to_a_copy_that_is_wrapped_otherwise(wrapped: Callable[[nn.Sequential], nn.Module]) -> None:
    net = network()
    sparsifier = Sparsifier(net, Spartan(sparsity=0.6), STEPS, include=["0.weight", "2.0.weight"])
    other = copy.deepcopy(net)
    train(net, sparsifier, 6)
    sparsifier.copy_masks(wrapped(other))
    for name, mask in sparsifier.masks().items():
        assert torch.equal(other.get_submodule(name.removesuffix(".weight")).mask_hard, mask.hard)


class Holder(nn.Module):
    """A model whose own names are those that wrappers use."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(8, 8)
        self.head = nn.Linear(8, 8)


def test_a_module_that_is_called_like_a_wrapped_one_keeps_its_name() -> None:
    assert list(Sparsifier(Holder(), Spartan(sparsity=0.3), STEPS).masks()) == ["module.weight"]
    assert list(Sparsifier(compiled(Holder()), Spartan(sparsity=0.3), STEPS).masks()) == ["module.weight"]


def test_a_masked_module_is_named_in_a_wrapped_model() -> None:
    model = DistributedDataParallel(network())
    Sparsifier(model, Spartan(sparsity=0.6), STEPS)
    with pytest.raises(ValueError, match="masked module already: '0'"):
        Sparsifier(model, Spartan(sparsity=0.6), STEPS)


def test_a_layer_that_something_reads_the_weight_of_gives_a_masked_one_though_it_is_wrapped() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    layer.linear1 = checkpoint_wrapper(layer.linear1)
    sparsifier = Sparsifier(layer, Spartan(sparsity=0.1), STEPS, include="linear1.weight")
    assert list(sparsifier.masks()) == ["linear1.weight"]
    sparsifier.masks()["linear1.weight"].hard.fill_(False)
    assert bool((layer.linear1.weight == 0).all())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_states_from_before_load_with_the_names_that_they_had(prefix: str) -> None:
    def run(net: nn.Module, names: str) -> tuple[Sparsifier, History]:
        own = Spartan(sparsity=0.6, distribution={f"{names}0.weight": 0.3})
        sparsifier = Sparsifier(net, own, STEPS, count="masked", costs=lambda name, module, grid: 2.0)
        return sparsifier, History(sparsifier)

    class Old(nn.Module):
        """Has the names that wrapped models had."""

        def __init__(self, net: nn.Sequential) -> None:
            super().__init__()
            inner = nn.Module()
            for name, child in net.named_children():
                inner.add_module(name, child)
            for part in reversed(prefix.removesuffix(".").split(".")[1:]):
                outer = nn.Module()
                outer.add_module(part, inner)
                inner = outer
            self.add_module(prefix.split(".")[0], inner)

    (old, past), (new, history) = run(Old(network()), prefix), run(network(), "")
    assert list(old.masks()) == [f"{prefix}{name}" for name in NAMES]
    past.record()
    past.record()
    new.load_state_dict(old.state_dict())
    history.load_state_dict(past.state_dict())
    assert [list(row["kept"]) for row in history.rows] == [NAMES, NAMES]
    history.record()
    assert history.rows[-1]["stability"] == dict.fromkeys(NAMES, 1.0)
    state = old.state_dict()
    del state["masks"][f"{prefix}0.weight"]
    with pytest.raises(ValueError, match="another"):
        new.load_state_dict(state)


@pytest.mark.parametrize("wrap", [compiled, DistributedDataParallel], ids=["compile", "ddp"])
def test_files_have_the_names_of_the_plain_model(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    model = network()
    spartan.save_pretrained(wrap(model), tmp_path)
    assert {tensor.name for tensor in describe_pretrained(tmp_path)} == set(model.state_dict())
    for other in (network(), wrap(network())):
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert spartan.load_pretrained(other, tmp_path) is other
        for found, expected in zip(other.parameters(), model.parameters(), strict=True):
            assert torch.equal(found, expected)
