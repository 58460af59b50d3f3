"""SLTrain: a low-rank product plus a sparse matrix, against the dense weight that it stands for."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import spartan
from spartan.sltrain import SLTrainLinear, _draw_support, merge_sltrain, to_sltrain

pytestmark = pytest.mark.usefixtures("one_thread")


def layer(bias: bool = True, **settings: Any) -> SLTrainLinear:
    """A layer whose low-rank part is not zero."""
    torch.manual_seed(0)
    made = SLTrainLinear(7, 5, 2, 0.3, 3.0, bias, dtype=torch.float64, **settings)
    nn.init.normal_(made.factor_b)
    return made


def test_by_hand() -> None:
    """W = 6/1 (1, 2)^T (3, 4) + S = ((18, 24), (36, 48)) + ((0, 5), (0, 0))."""
    made = SLTrainLinear(2, 2, 1, 0.25, 6.0, bias=False)
    with torch.no_grad():
        made.factor_b.copy_(torch.tensor([[1.0], [2.0]]))
        made.factor_a.copy_(torch.tensor([[3.0, 4.0]]))
        made.values.fill_(5.0)
        made.positions.fill_(1)
    y = made(torch.tensor([[1.0, 10.0]]))
    assert y.tolist() == [[18.0 + 290.0, 36.0 + 480.0]]
    y[0, 0].backward()  # G = ((1, 10), (0, 0))
    assert made.factor_b.grad.tolist() == [[6 * 43.0], [0.0]]
    assert made.factor_a.grad.tolist() == [[6.0, 60.0]]
    assert made.values.grad.tolist() == [10.0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (0, 7)])
def test_values_and_gradients_are_those_of_the_dense_weight(shape: tuple[int, ...], bias: bool) -> None:
    made = layer(bias)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    pull = torch.randn(*shape[:-1], 5, dtype=torch.float64)
    wanted = [x, *made.parameters()]
    ours = torch.autograd.grad((made(x) * pull).sum(), wanted)
    dense = functional.linear(x, made.weight, made.bias)
    torch.testing.assert_close(made(x), dense)
    for mine, exact in zip(ours, torch.autograd.grad((dense * pull).sum(), wanted), strict=True):
        torch.testing.assert_close(mine, exact)


def test_nothing_of_the_size_of_the_weight_is_kept_for_the_backward() -> None:
    made = SLTrainLinear(64, 48, 2, 0.05)
    kept = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = made(torch.randn(3, 64, requires_grad=True))
    y.sum().backward()
    assert kept and max(kept) < 64 * 48 / 10


def test_begins_as_published() -> None:
    made = SLTrainLinear(100, 50, 4, 0.03)
    assert len(made.values) == len(made.positions.unique()) == 150
    assert made.positions.dtype == torch.int32 and bool((made.positions.diff() > 0).all())
    assert not made.factor_b.any() and bool(made.factor_a.any())
    assert 0.09 < float(made.values.detach().abs().max()) <= 0.1
    assert int((made.weight != 0).sum()) == 150
    assert sum(p.numel() for p in made.parameters()) == 4 * 150 + 150 + 50


@pytest.mark.parametrize("count", [0, 1, 3, 4, 7, 8])
def test_every_support_is_as_likely(count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.zeros(8)
    for _ in range(1000):
        support = _draw_support(count, 8, generator)
        assert len(support.unique()) == count
        drawn[support.long()] += 1
    share = count / 8
    assert bool(((drawn / 1000 - share).abs() <= 5 * (share * (1 - share) / 1000) ** 0.5).all())


def test_the_support_has_a_seed_of_its_own() -> None:
    state = torch.get_rng_state()
    first = layer().positions
    torch.set_rng_state(state)
    torch.rand(3)
    assert torch.equal(first, layer().positions) and not torch.equal(first, layer(seed=1).positions)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_multiplies_in_half_precision(dtype: torch.dtype) -> None:
    made = layer().float()
    x = torch.randn(4, 7)
    with torch.autocast("cpu", dtype=dtype):
        y = made(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), made(x), rtol=0.05, atol=0.05)
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in made.parameters())


def test_compiles_in_one_graph() -> None:
    made = layer()
    x = torch.randn(4, 7, dtype=torch.float64)
    eager = torch.autograd.grad(made(x).square().sum(), list(made.parameters()))
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(
        torch.autograd.grad(compiled(x).square().sum(), list(made.parameters())), eager, strict=True
    ):
        torch.testing.assert_close(ours, theirs)


class Model(nn.Module):
    """Linear layers of every kind: called, read by attention, tied, the head."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.attention = nn.MultiheadAttention(16, 2)
        self.down = nn.Linear(16, 8, bias=False)
        self.tied = nn.Linear(8, 8)
        self.again = nn.Linear(8, 8)
        self.again.weight = self.tied.weight
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, 8] -> [n, 4]."""
        x = torch.relu(self.up(x))
        x = self.down(x + self.attention(x, x, x)[0])
        return self.head(self.again(torch.relu(self.tied(x))))


def test_replaces_the_linear_layers_that_can_be() -> None:
    model = Model().eval()
    bias = model.up.bias
    assert to_sltrain(model, 2, 0.1) is model
    assert isinstance(model.up, SLTrainLinear) and isinstance(model.down, SLTrainLinear)
    assert model.up.bias is bias and model.down.bias is None and not model.up.training
    assert all(type(m) is nn.Linear for m in (model.tied, model.again, model.head))
    assert not isinstance(model.attention.out_proj, SLTrainLinear)
    assert not torch.equal(model.up.positions, model.down.positions)  # of equal shape: each has a draw of its own
    assert model(torch.randn(3, 8)).shape == (3, 4)
    alone = to_sltrain(nn.Linear(8, 6), 2, include="weight")
    assert isinstance(alone, SLTrainLinear)


def test_trains_resumes_merges_and_is_saved_small(tmp_path: Path) -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 3))
        dense = sum(p.numel() for p in model.parameters())
        to_sltrain(model, 4, 0.05)
        assert sum(p.numel() for p in model.parameters()) < dense / 4
        return model, torch.optim.AdamW(model.parameters(), lr=0.01)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, begin: int, end: int) -> list[float]:
        losses = []
        for index in range(begin, end):
            x = torch.randn(32, 64, generator=torch.Generator().manual_seed(index))
            optimizer.zero_grad()
            loss = functional.mse_loss(model(x), x[:, :3])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    (first, optimizer), (second, again) = make(), make()
    losses = train(first, optimizer, 0, 30)
    file = io.BytesIO()
    torch.save([first.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    second[0].positions.zero_()  # the support comes with the checkpoint
    second.load_state_dict(state[0])
    again.load_state_dict(state[1])
    losses += train(first, optimizer, 30, 60)
    train(second, again, 30, 60)
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    for mine, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(mine, theirs)

    x = torch.randn(5, 64)
    expected = first(x)
    spartan.save_pretrained(first, tmp_path / "factors")
    fresh, _ = make()
    spartan.load_pretrained(fresh, tmp_path / "factors")
    assert torch.equal(fresh(x), expected)
    merge_sltrain(first)
    assert type(first[0]) is nn.Linear
    torch.testing.assert_close(first(x), expected)
    spartan.save_pretrained(first, tmp_path / "merged")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("factors", "merged")]
    assert sizes[0] < sizes[1] / 2


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SLTrainLinear(4, 4, 0), ValueError, "rank must be at least 1; got 0"),
        (lambda: SLTrainLinear(4, 3, 4), ValueError, "rank must be at most 3, the smaller side; got 4"),
        (lambda: SLTrainLinear(4, 4, 2.0), TypeError, "rank must be an int; got float"),  # type: ignore[arg-type]
        (lambda: SLTrainLinear(4, 4, 2, 1.5), ValueError, r"density must be in \[0, 1\]; got 1.5"),
        (lambda: SLTrainLinear(4, 4, 2, alpha=0), ValueError, "alpha must be above 0; got 0"),
        (lambda: to_sltrain(Model(), 2, include="tied.*"), ValueError, "include chooses 'tied.weight', which is not"),
        (lambda: to_sltrain(nn.Linear(4, 4), 2), ValueError, r"no linear layer to replace; its parameters are \['wei"),
        (lambda: to_sltrain(Model(), 9), ValueError, "rank must be at most 8"),
    ],
)
def test_bad_arguments_are_refused_by_name(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
