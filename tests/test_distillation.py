"""After pruning: statistics of batch normalisation measured again, and losses against the dense model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import spartan
from tests.test_pruning import bert, mlp

pytestmark = pytest.mark.usefixtures("one_thread")


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8, momentum=0.3),
        nn.Flatten(),
    ).double()


# --- recalibrate -----------------------------------------------------------------------------------------------------


def test_statistics_are_means_over_the_batches() -> None:
    model = convolutions().eval()
    batches = [torch.randn(4, 3, 8, 8, dtype=torch.float64) * (index + 1) for index in range(3)]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert spartan.recalibrate(model, batches) == ["1", "4"]
    seen = [model[0](x).detach() for x in batches]
    torch.testing.assert_close(model[1].running_mean, torch.stack([y.mean((0, 2, 3)) for y in seen]).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack([y.var((0, 2, 3)) for y in seen]).mean(0))
    normed = [functional.batch_norm(y, None, None, model[1].weight, model[1].bias, training=True) for y in seen]
    seen = [model[3](torch.relu(y)).detach() for y in normed]
    torch.testing.assert_close(model[4].running_mean, torch.stack([y.mean((0, 2, 3)) for y in seen]).mean(0))
    assert (model[1].momentum, model[4].momentum) == (0.1, 0.3)
    assert not any(module.training for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]) != ("running" in name or "tracked" in name), name


def test_a_pruned_network_is_nearer_to_the_dense_one_after_it() -> None:
    model = convolutions()
    batches = [torch.randn(16, 3, 8, 8, dtype=torch.float64) for _ in range(4)]
    spartan.recalibrate(model.eval(), batches)
    with torch.no_grad():
        wanted = model(batches[0])
        spartan.prune(model, spartan.Magnitude(sparsity=0.7))
        before = float((model(batches[0]) - wanted).square().mean())
        spartan.recalibrate(model, batches)
        after = float((model(batches[0]) - wanted).square().mean())
    assert after < before


def test_statistics_stay_where_it_cannot_be_done() -> None:
    model, x = convolutions().eval(), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    state = {name: value.clone() for name, value in model.state_dict().items()}

    def broken(model: nn.Module, batch: torch.Tensor) -> None:
        model(batch)
        raise RuntimeError("odd")

    bad = x.clone()
    bad[0, 0, 0, 0] = float("inf")
    cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        ([], {}, ValueError, "at least one batch"),
        ([x], {"call": broken}, RuntimeError, "odd"),
        ([x, bad], {}, ValueError, "batches must make finite inputs; those of '1' are not"),
    ]
    for batches, arguments, kind, message in cases:
        with pytest.raises(kind, match=message):
            spartan.recalibrate(model, batches, **arguments)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="model must have a BatchNorm module that keeps statistics"):
        spartan.recalibrate(mlp(4, 4), [x])
    with pytest.raises(TypeError, match="model must be a"):
        spartan.recalibrate("model", [x])  # type: ignore[arg-type]


def test_a_norm_that_no_batch_reaches_keeps_its_statistics() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
            self.idle.running_mean.fill_(3.0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    model = Idle()
    assert spartan.recalibrate(model, [torch.randn(9, 4)]) == ["used"]
    assert float(model.idle.running_mean[0]) == 3.0


# --- distill ---------------------------------------------------------------------------------------------------------


def pair() -> tuple[nn.Sequential, nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    return (
        mlp(8, 16, 5, dtype=torch.float64, seed=1),
        mlp(8, 16, 5, dtype=torch.float64, seed=2),
        torch.randn(6, 8).double(),
    )


def test_losses_are_those_of_the_equations() -> None:
    student, teacher, x = pair()
    s, t = student(x), teacher(x)
    expected = {
        "mse": (s - t).square().sum() / t.square().sum(),
        "cosine": (1 - (s * t).sum(-1) / (s.norm(dim=-1) * t.norm(dim=-1))).mean(),
        "kl": 4 * ((t / 2).softmax(-1) * ((t / 2).log_softmax(-1) - (s / 2).log_softmax(-1))).sum(-1).mean(),
    }
    for loss, value in expected.items():
        found = spartan.distill(student, teacher, loss=loss, temperature=2.0)(x)
        assert float(found.loss.detach()) == pytest.approx(float(value.detach()), rel=1e-5), loss
        assert torch.equal(found.output, s)
    own = spartan.distill(student, teacher, loss=lambda a, b: (a - b).abs().max())(x)
    assert float(own.loss.detach()) == float((s - t).abs().max().detach())


def test_hidden_states_count_as_well() -> None:
    student, teacher, x = pair()
    found = spartan.distill(student, teacher, hidden=["0", "1"], hidden_weight=0.5)(x).loss
    states = [
        ((f(x) - g(x)).square().sum() / g(x).square().sum()).detach()
        for f, g in ((student[0], teacher[0]), (student[:2], teacher[:2]))
    ]
    plain = spartan.distill(student, teacher)(x).loss
    assert float(found.detach()) == pytest.approx(float(plain.detach()) + 0.5 * float(sum(states)) / 2, rel=1e-9)
    assert not student[0]._forward_hooks and not teacher[0]._forward_hooks


def test_only_the_student_learns_and_zeros_stay() -> None:
    student, _, x = pair()
    teacher = copy.deepcopy(student).train()
    spartan.prune(student, spartan.Wanda(sparsity=0.5), [x], include="*.weight")
    zeros = {name: p.detach() == 0 for name, p in student.named_parameters() if p.dim() > 1}
    method = spartan.OneShot(sparsity=0.5, prune_at=0)
    sparsifier = spartan.Sparsifier(student, method, 30, include="*.weight", count="masked", keep_zeros=True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    sparsifier.attach(optimizer)
    distillation = spartan.distill(student, teacher)
    losses = []
    for _ in range(30):
        loss = distillation(x).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    sparsifier.finalize()
    assert losses[-1] < 0.3 * losses[0]
    assert all(p.grad is None for p in teacher.parameters()) and all(m.training for m in teacher.modules())
    for name, own in zeros.items():
        assert torch.equal(student.get_parameter(name) == 0, own)


def test_models_of_hugging_face_give_their_last_hidden_state() -> None:
    teacher = bert()
    student = copy.deepcopy(teacher)
    tokens = torch.arange(12).view(2, 6)
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    spartan.prune(student, spartan.Magnitude(sparsity=0.5), include="encoder.*.weight")
    found = spartan.distill(student, teacher, hidden="encoder.layer.?")(batch)
    s, t = (model(**batch, output_hidden_states=True) for model in (student, teacher))
    expected = (s.last_hidden_state - t.last_hidden_state).square().sum() / t.last_hidden_state.square().sum()
    each = [
        (a - b).square().sum() / b.square().sum() for a, b in zip(s.hidden_states[1:], t.hidden_states[1:], strict=True)
    ]
    assert float(found.loss.detach()) == pytest.approx(float((expected + sum(each) / 3).detach()), rel=1e-5)


def test_wrong_arguments_of_distill_are_named() -> None:
    student, teacher, x = pair()
    cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (student, {}, ValueError, "teacher must have parameters of its own; it shares '0.weight'"),
        (3, {}, TypeError, "teacher must be a torch.nn.Module; got int"),
        (teacher, {"loss": "l1"}, ValueError, "loss must be one of mse, cosine, kl"),
        (teacher, {"temperature": 0}, ValueError, "temperature must be above 0"),
        (teacher, {"hidden_weight": -1.0}, ValueError, "hidden_weight"),
        (teacher, {"hidden": "layers.*"}, ValueError, r"hidden names 'layers.\*', which is no module of both"),
    ]
    for other, arguments, kind, message in cases:
        with pytest.raises(kind, match=message):
            spartan.distill(student, other, **arguments)

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"odd": self.layer(x.float())}

    with pytest.raises(TypeError, match="of must say which tensor of the output counts; the model gives dict"):
        spartan.distill(Named(), Named())(x)
    assert float(spartan.distill(Named(), Named(), of=lambda output: output["odd"])(x).loss.detach()) > 0
