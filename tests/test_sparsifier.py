"""What is masked, how sparse it ends, how it is driven, and what it refuses."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from spartan.masks import MaskGroup
from spartan.methods import (
    DPF,
    GMP,
    GSE,
    IHT,
    SET,
    WGSEF,
    Dense,
    DualAveraging,
    Method,
    OneShot,
    RigL,
    Spartan,
    StaticRandom,
    TopKAST,
)
from spartan.sparsifier import Sparsifier
from spartan_kernels import expand_blocks

pytestmark = pytest.mark.usefixtures("one_thread")


def perceptron(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between, weights from seed 0."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def train(model: nn.Module, sparsifier: Sparsifier, steps: int, inputs: int, seed: int = 1) -> None:
    """Steps of SGD with the sparsifier attached."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    sparsifier.attach(optimizer)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(16, inputs, generator=generator)
        optimizer.zero_grad()
        functional.mse_loss(model(x), x[:, :3]).backward()
        optimizer.step()


def zeros_and_count(model: nn.Module, names: list[str]) -> tuple[int, int]:
    parameters = dict(model.named_parameters())
    zeros = sum(int((parameters[name] == 0).sum()) for name in names)
    return zeros, sum(parameter.numel() for parameter in parameters.values())


@pytest.mark.parametrize(
    "method",
    [
        Spartan(sparsity=0.8),
        OneShot(sparsity=0.8),
        GMP(sparsity=0.8, interval=3),
        StaticRandom(sparsity=0.8),
        TopKAST(sparsity=0.8, backward_sparsity=0.5, interval=3),
        DualAveraging(sparsity=0.8),
        DPF(sparsity=0.8, interval=3),
        IHT(sparsity=0.8),
        SET(sparsity=0.8, interval=3),
        RigL(sparsity=0.8, interval=3),
    ],
    ids=lambda m: m.name,
)
def test_trains_to_exact_sparsity_and_leaves_plain_modules(method: Method) -> None:
    model = perceptron(20, 30, 25, 3)
    parameters = dict(model.named_parameters())
    identities = {name: id(parameter) for name, parameter in parameters.items()}
    pristine = {name: set(vars(module)) for name, module in model.named_modules()}
    sparsifier = Sparsifier(model, method, total_steps=20)
    assert {name: id(p) for name, p in model.named_parameters()} == identities
    assert list(sparsifier.masks()) == ["0.weight", "2.weight"]
    train(model, sparsifier, 20, 20)
    x = torch.randn(8, 20)
    masked = model(x)
    dropped = sparsifier.sparsity
    sparsifier.finalize()
    assert [type(module) for module in model] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    assert {name: set(vars(module)) for name, module in model.named_modules()} == pristine
    assert not any(True for _ in model.buffers())
    assert {name: id(p) for name, p in model.named_parameters()} == identities
    assert torch.equal(model(x), masked)
    zeros, count = zeros_and_count(model, ["0.weight", "2.weight"])
    assert dropped == round(0.8 * count) / count
    # What SET and RigL grow starts at zero, and stays there behind a dead unit.
    assert zeros >= round(0.8 * count) if isinstance(method, (SET, RigL)) else zeros == round(0.8 * count)
    assert sparsifier.sparsity == zeros / count
    # A zero whose sign bit is set would cost its place in a saved file.
    assert not any(bool(torch.signbit(p[p == 0]).any()) for p in model.parameters())


@settings(max_examples=30)
@given(
    widths=st.lists(st.integers(6, 40), min_size=2, max_size=4),
    block=st.sampled_from([1, 4, (2, 5)]),
    sparsity=st.floats(0.0, 0.9),
    distribution=st.sampled_from(["global", "uniform", "erk"]),
    kind=st.sampled_from([Spartan, GMP, OneShot, StaticRandom, TopKAST, DualAveraging, DPF, IHT, SET, RigL]),
    count=st.sampled_from(["model", "masked"]),
    steps=st.sampled_from([0, 3, 9]),
)
def test_sparsity_is_exact_to_one_block(
    widths: list[int], block: Any, sparsity: float, distribution: str, kind: Any, count: str, steps: int
) -> None:
    """For any shapes, also ragged ones, any target, budget and method, and wherever training stops."""
    model = perceptron(*widths, 3)
    names = [f"{2 * i}.weight" for i in range(len(widths) - 1)]
    own = {"backward_sparsity": sparsity / 2} if kind is TopKAST else {}
    method = kind(sparsity=sparsity, block_size=block, distribution=distribution, **own)
    try:
        sparsifier = Sparsifier(model, method, total_steps=10, count=count)
    except ValueError as error:
        assert "cannot be reached" in str(error)
        assume(False)
    shapes = {name: model.get_parameter(name).shape for name in names}

    def kept() -> dict[str, torch.Tensor]:
        masks = sparsifier.masks()
        return {name: expand_blocks(masks[name].hard, shape, method.block_size) for name, shape in shapes.items()}

    always = {name: mask.clone() for name, mask in kept().items()}

    def compare(*_: Any) -> None:
        for name, mask in kept().items():
            always[name] &= mask

    model.register_forward_pre_hook(compare)
    train(model, sparsifier, steps, widths[0])
    last = kept()
    sparsifier.finalize()
    zeros, parameters = zeros_and_count(model, names)
    sizes = dict(model.named_parameters())
    counted = parameters if count == "model" else sum(sizes[name].numel() for name in names)
    largest = 1 if block == 1 else 16 if block == 4 else 10
    # What SET and RigL grew begins at zero; it still is where training stopped then, or behind a dead unit.
    rewired = kind in (SET, RigL)
    grown = sum(int((last[n] & ~always[n] & (sizes[n] == 0)).sum()) for n in names) if rewired else 0
    # What IHT keeps may be zero itself: it was projected and has had no gradient since.
    assert 0 <= zeros - grown - round(sparsity * counted) < (counted if kind is IHT else largest)
    assert sparsifier.sparsity == zeros / counted


@pytest.mark.parametrize("kind", [Spartan, GMP, OneShot, StaticRandom, TopKAST, DPF, SET, RigL, GSE, WGSEF])
def test_blocks_are_counted_exactly_in_half_precision(kind: Any) -> None:
    """bfloat16 has no 289, the size of a block; at the edges of the first weight blocks are smaller."""
    model = perceptron(600, 612, 340, 3).to(torch.bfloat16)
    own = {"backward_sparsity": 0.3} if kind is TopKAST else {"interval": 1} if kind in (GSE, RigL, SET) else {}
    sparsifier = Sparsifier(model, kind(sparsity=0.5, block_size=17, **own), 4, count="masked")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(4, 600, dtype=torch.bfloat16)).square().sum().backward()
        sparsifier.correct_gradients()
        optimizer.step()
        sparsifier.step(optimizer)
        kept = sum(
            int(expand_blocks(mask.hard, model.get_parameter(name).shape, 17).sum())
            for name, mask in sparsifier.masks().items()
        )
        assert sparsifier.sparsity == pytest.approx(1 - kept / (600 * 612 + 612 * 340), abs=1e-12)
    sparsifier.finalize()
    kept = sum(cost.kept for cost in sparsifier.costs().values())
    assert 0 <= 0.5 * (600 * 612 + 612 * 340) - kept < 289


def test_sparsity_now_follows_the_schedule() -> None:
    model = perceptron(40, 50, 3)
    sparsifier = Sparsifier(model, Spartan(sparsity=0.75), total_steps=100)
    seen = []
    for _ in range(30):
        seen.append(sparsifier.sparsity)
        sparsifier.step()
    count = sum(parameter.numel() for parameter in model.parameters())
    for step, sparsity in enumerate(seen):
        assert abs(sparsity - 0.75 * min(step / 20, 1)) <= 1 / count
    assert sparsifier.beta == pytest.approx(1 + 3 * 30 / 80)
    fractions = sparsifier.kept_fractions()
    assert fractions["0.weight"] == pytest.approx(1 - 0.75 * count / 2000, abs=1e-3)


def test_hooks_and_hand_give_the_same_bits() -> None:
    states = []
    for by_hand in (False, True):
        model = perceptron(20, 30, 3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        sparsifier = Sparsifier(model, Spartan(sparsity=0.7), total_steps=20)
        if not by_hand:
            sparsifier.attach(optimizer)
        generator = torch.Generator().manual_seed(3)
        for _ in range(20):
            x = torch.randn(16, 20, generator=generator)
            optimizer.zero_grad()
            functional.mse_loss(model(x), x[:, :3]).backward()
            if by_hand:
                sparsifier.correct_gradients()
            optimizer.step()
            if by_hand:
                sparsifier.step()
        sparsifier.finalize()
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_skipped_optimizer_step_leaves_masks_and_clock() -> None:
    model = perceptron(20, 30, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(model, Spartan(sparsity=0.7), total_steps=20)
    sparsifier.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    steps = []
    for scale in (1.0, float("inf"), 1.0):
        before = {name: mask.soft.clone() for name, mask in sparsifier.masks().items()}
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(4, 20)).sum() * scale).backward()
        scaler.step(optimizer)
        scaler.update()
        steps.append(sparsifier.step_count)
        if scale != 1.0:
            assert all(torch.equal(before[n], m.soft) for n, m in sparsifier.masks().items())
    assert steps == [1, 1, 2]


def test_attached_and_by_hand_at_once_is_refused() -> None:
    model = perceptron(20, 30, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(model, Spartan(sparsity=0.7), total_steps=20)
    sparsifier.attach(optimizer)
    for call in (sparsifier.step, sparsifier.correct_gradients, lambda: sparsifier.attach(optimizer)):
        with pytest.raises(RuntimeError, match="an optimizer is attached"):
            call()
    sparsifier.finalize()
    optimizer.step()  # hooks are gone
    for call in (sparsifier.step, sparsifier.finalize, sparsifier.masks, sparsifier.state_dict):
        with pytest.raises(RuntimeError, match="finalized"):
            call()


def test_optimizer_of_another_model_is_refused() -> None:
    sparsifier = Sparsifier(perceptron(20, 30, 3), Spartan(sparsity=0.7), total_steps=20)
    with pytest.raises(ValueError, match="none of the masked weights"):
        sparsifier.attach(torch.optim.SGD(perceptron(20, 30, 3).parameters(), lr=0.1))
    with pytest.raises(TypeError, match="optimizer must be"):
        sparsifier.attach("sgd")  # type: ignore[arg-type]


class Mixed(nn.Module):
    """Every kind of module that selection must tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.conv = nn.Conv1d(6, 8, 3)
        self.norm = nn.LayerNorm(8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.tied_in = nn.Linear(8, 9)
        self.tied_out = nn.Linear(8, 9)
        self.tied_out.weight = self.tied_in.weight
        self.head = nn.Linear(9, 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of tokens [n, length]."""
        x = self.norm(self.conv(self.embedding(tokens).mT).mT)
        return self.head(self.tied_in(self.encoder(x)) + self.tied_out(x)).mean(1)


def test_transformer_layer_is_masked_in_its_inference_path_too() -> None:
    torch.manual_seed(0)
    model = Mixed()
    plain = {name: parameter for name, parameter in model.state_dict().items()}
    sparsifier = Sparsifier(model, StaticRandom(sparsity=0.3), 10)
    tokens = torch.randint(7, (2, 9))
    model.eval()
    with torch.no_grad():
        inference = model(tokens)
    torch.testing.assert_close(inference, model(tokens))
    sparsifier.finalize()
    assert set(model.state_dict()) == set(plain)
    torch.testing.assert_close(model(tokens), inference)


def test_a_model_with_nothing_to_sparsify_is_refused() -> None:
    for model in (nn.Sequential(nn.Linear(3, 4)), nn.Sequential(nn.LayerNorm(5)), nn.Module()):
        with pytest.raises(ValueError, match="no weight to sparsify"):
            Sparsifier(model, Spartan(sparsity=0.5), 10)


def test_unreachable_sparsity_leaves_the_model_alone() -> None:
    model = perceptron(20, 30, 3)
    with pytest.raises(ValueError, match=r"sparsity 0.9 cannot be reached: 600 of the 723 .* at most 0.8284"):
        Sparsifier(model, Spartan(sparsity=0.9), 10)
    assert type(model[0]) is nn.Linear
    Sparsifier(model, Spartan(sparsity=0.9), 10, count="masked")


def test_other_bad_arguments_are_refused_by_name() -> None:
    method = Spartan(sparsity=0.5)
    for arguments, error, message in [
        ((3, method, 10), TypeError, "model must be a torch.nn.Module; got int"),
        ((perceptron(9, 9, 3), "spartan", 10), TypeError, "method must be a spartan method"),
        ((perceptron(9, 9, 3), method, 0), ValueError, "total_steps must be an int of at least 1; got 0"),
        ((perceptron(9, 9, 3), method, 1.5), ValueError, "total_steps .* got 1.5"),
    ]:
        with pytest.raises(error, match=message):
            Sparsifier(*arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="count must be one of model, masked; got 'all'"):
        Sparsifier(perceptron(9, 9, 3), method, 10, count="all")
    mixed = perceptron(9, 9, 9, 3)
    mixed[0].double()
    with pytest.raises(ValueError, match="share a dtype and a device"):
        Sparsifier(mixed, method, 10)
    twice = perceptron(9, 9, 3)
    Sparsifier(twice, method, 10)
    with pytest.raises(ValueError, match="finalize it first"):
        Sparsifier(twice, method, 10)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("block", [1, 4])
def test_weights_that_are_not_finite_raise_by_name(value: float, block: int) -> None:
    model = perceptron(20, 30, 25, 3)
    sparsifier = Sparsifier(model, Spartan(sparsity=0.5, block_size=block), 10)
    with torch.no_grad():
        model[2].weight[3, 4] = value
    with pytest.raises(ValueError, match=r"weight '2.weight' must be finite; 1 of its entries"):
        sparsifier.step()


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("kind", [Spartan, GMP, DPF])
def test_a_step_that_raises_is_not_counted_and_can_be_made_again(kind: Any, attached: bool) -> None:
    runs = []
    for fails in (False, True):
        model = perceptron(20, 30, 25, 3)
        sparsifier = Sparsifier(model, kind(sparsity=0.5), 10)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        if attached:
            sparsifier.attach(optimizer)
        step = optimizer.step if attached else sparsifier.step
        step()
        if fails:
            weight = sparsifier.masked_weights()[1]
            kept = weight.detach().clone()
            with torch.no_grad():
                weight[3, 4] = float("nan")
            with pytest.raises(ValueError, match="must be finite"):
                step()
            assert sparsifier.step_count == 1
            with torch.no_grad():
                weight.copy_(kept)
        for _ in range(3):
            step()
        runs.append(sparsifier)
    well, failed = runs
    assert failed.step_count == well.step_count == 4
    assert failed.beta == well.beta
    for name, mask in well.masks().items():
        assert torch.equal(mask.hard, failed.masks()[name].hard), name


def test_dense_changes_nothing() -> None:
    model = perceptron(20, 30, 3)
    reference = copy.deepcopy(model)
    sparsifier = Sparsifier(model, Dense(), 10)
    assert (sparsifier.masks(), sparsifier.sparsity, sparsifier.beta) == ({}, 0.0, None)
    train(model, sparsifier, 5, 20)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        x = torch.randn(16, 20, generator=generator)
        optimizer.zero_grad()
        functional.mse_loss(reference(x), x[:, :3]).backward()
        optimizer.step()
    sparsifier.finalize()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))


def test_nothing_in_a_model_state_dict_comes_from_masks() -> None:
    model = perceptron(20, 30, 3)
    names = set(model.state_dict())
    Sparsifier(model, Spartan(sparsity=0.5), 10)
    assert set(model.state_dict()) == names


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", [StaticRandom, GMP, OneShot, Spartan, SET])
def test_weights_that_are_not_finite_once_masks_are_fixed_are_not_finalized(kind: Any, value: float) -> None:
    model = perceptron(8, 12, 6, 3)
    own = {"fraction": 0.0} if kind is SET else {}  # grown weights would stay zero without a learning rate
    sparsifier = Sparsifier(model, kind(sparsity=0.5, **own), 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(5):
        sparsifier.step(optimizer)
    assert sparsifier.frozen
    with torch.no_grad():
        before = model[2].weight[1, 2].item()
        model[2].weight[1, 2] = value
    with pytest.raises(ValueError, match=r"weight '2.weight' must be finite; 1 of its entries"):
        sparsifier.finalize()
    with torch.no_grad():
        model[2].weight[1, 2] = before
    sparsifier.finalize()
    assert sparsifier.sparsity == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(("distribution", "followed"), [("global", 0), ("uniform", 1)])
def test_what_a_budget_takes_is_asked_only_for_one_that_follows(
    distribution: str, followed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the host waits for the answer."""
    asked: list[MaskGroup] = []
    kept_cost = MaskGroup.kept_cost
    monkeypatch.setattr(MaskGroup, "kept_cost", lambda group: asked.append(group) or kept_cost(group))
    model = perceptron(9, 8, 12, 3)
    method = GMP(sparsity=0.4, block_size=4, interval=2, distribution=distribution)
    sparsifier = Sparsifier(model, method, total_steps=8)
    train(model, sparsifier, 8, 9)
    assert bool(asked) == bool(followed) and len(asked) % max(followed, 1) == 0
    sparsifier.finalize()
    assert sparsifier.sparsity == pytest.approx(0.4, abs=0.1)
