"""Gates under a budget of cost: against a knapsack solved by hand, with every gradient and refusal."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_images import write_set
from torch import Tensor, nn

import spartan
from spartan.layers import KnapsackGate

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("hard", "soft", "scaled")


def soft_by_hand(scores: Tensor, costs: Tensor, k: Tensor, beta: float) -> Tensor:
    """m of one row in float64: bisection, then a Newton step of size nought, which carries the derivatives."""
    low, high = -1e3, 1e3
    with torch.no_grad():
        for _ in range(200):
            middle = (low + high) / 2
            over = float((costs * torch.sigmoid(beta * scores + middle)).sum()) > float(k)
            low, high = (low, middle) if over else (middle, high)
    m = torch.sigmoid(beta * scores + low)
    slope = (costs * m * (1 - m)).sum().detach()
    return torch.sigmoid(beta * scores + low + (k - (costs * m).sum()) / slope)


def hard_by_hand(scores: Tensor, costs: Tensor, k: float) -> Tensor:
    kept, left = torch.zeros_like(scores), k
    for i in sorted(range(len(scores)), key=lambda i: -float(scores[i])):
        if costs[i] > left:
            break
        kept[i], left = 1, left - float(costs[i])
    return kept


def by_hand(kind: str, scores: Tensor, costs: Tensor, k: Tensor, beta: float) -> Tensor:
    soft = soft_by_hand(scores, costs, k, beta)
    hard = hard_by_hand(scores.detach(), costs, float(k.detach()))
    return {"soft": soft, "scaled": soft * hard, "hard": hard + soft - soft.detach()}[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [(), (5,), (2, 3)])
def test_gates_and_gradients_are_those_of_a_knapsack_by_hand(kind: str, rows: tuple[int, ...]) -> None:
    costs = torch.rand(9) * 4 + 0.1
    gate = KnapsackGate(costs, nn.Identity(), beta=3.0, kind=kind)
    scores = torch.randn(*rows, 9, dtype=torch.float64).requires_grad_()
    budget = (0.1 + 0.8 * torch.rand(rows, dtype=torch.float64)).requires_grad_()
    upstream = torch.randn(*rows, 9, dtype=torch.float64)
    found = gate(scores, budget)
    grads = torch.autograd.grad(found, (scores, budget), upstream)

    own = costs.double()
    flat = zip(scores.view(-1, 9), budget.view(-1), strict=True)
    expected = torch.stack([by_hand(kind, s, own, f * own.sum(), 3.0) for s, f in flat]).view(*rows, 9)
    wanted = torch.autograd.grad(expected, (scores, budget), upstream)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grads, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["hard", "scaled"])
def test_kept_blocks_never_cost_more_than_the_budget(kind: str) -> None:
    gate = KnapsackGate(torch.rand(33) * 10 + 0.01, nn.Linear(5, 33), kind=kind)
    budget = torch.cat([torch.rand(200), torch.tensor([0.0, 1.0])])
    gates = gate(torch.randn(202, 5), budget)
    spent = gate.spent(gates)
    assert bool((spent <= budget.double() + 1e-12).all())
    assert spent[-2:].tolist() == [0.0, 1.0]
    widest = float(gate.costs.max() / gate.costs.sum())
    assert bool((spent > budget - widest - 1e-6).all())  # only the block that does not fit is missing


def test_a_soft_gate_spends_its_budget() -> None:
    gate = KnapsackGate([1.0, 2.0, 5.0], kind="soft", budget=0.3)
    assert float((gate() * gate.costs).sum()) == pytest.approx(0.3 * 8, rel=1e-5)


def test_free_scores_make_a_row_for_each_budget() -> None:
    gate = KnapsackGate(torch.ones(8))
    with torch.no_grad():
        gate.free.copy_(torch.arange(8.0))
    assert gate(budget=torch.tensor([0.25, 0.5, 1.0])).sum(-1).tolist() == [2, 4, 8]
    assert gate(budget=0.25).tolist() == [0, 0, 0, 0, 0, 0, 1, 1]
    gate(budget=torch.tensor([0.5, 0.75])).square().sum().backward()
    assert gate.free.grad.abs().sum() > 0


def test_clients_have_gates_of_their_own() -> None:
    gate = KnapsackGate(torch.ones(6), nn.Embedding(3, 6))
    gates = gate(torch.tensor([2, 0]), torch.tensor([0.5, 1.0]))
    assert gates.sum(-1).tolist() == [3, 6]
    (gates[0] * torch.randn(6)).sum().backward()
    assert [bool(row.any()) for row in gate.scores.weight.grad] == [False, False, True]


def test_a_score_gains_where_a_block_is_worth_its_price() -> None:
    """dL/ds_i = beta dm_i (g_i - r a_i), r = sum dm g / sum dm a = dL/dk."""
    gate = KnapsackGate([1.0, 4.0, 2.0], kind="soft", beta=2.0)
    k = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    gates, g = gate(budget=k), torch.tensor([1.0, -0.5, 3.0])
    (gates * g).sum().backward()
    slope = (gates * (1 - gates)).detach()
    price = (slope * g).sum() / (slope * gate.costs).sum()
    torch.testing.assert_close(gate.free.grad, 2 * slope * (g - price * gate.costs))
    assert float(k.grad) == pytest.approx(float(price * gate.costs.sum()), rel=1e-5)


def test_gates_skip_the_blocks_of_a_weight() -> None:
    gate = KnapsackGate(torch.ones(6), budget=0.5)
    weight, x = torch.randn(12, 8, requires_grad=True), torch.randn(5, 8)
    gates = gate().view(3, 2)
    y = spartan.masked_linear(x, weight, gates, block_size=4)
    whole = gates.detach().repeat_interleave(4, 0).repeat_interleave(4, 1)
    torch.testing.assert_close(y, x @ (weight * whole).mT)
    y.square().sum().backward()
    assert bool((weight.grad[whole == 0] == 0).all()) and gate.free.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_graph_breaks(kind: str) -> None:
    gate = KnapsackGate(torch.rand(7) + 0.5, nn.Linear(4, 7), kind=kind)
    x, budget = torch.randn(6, 4), torch.rand(6, requires_grad=True)
    compiled = torch.compile(gate, fullgraph=True)

    def answer(gate: nn.Module) -> tuple[Tensor, ...]:
        gates = gate(x, budget)
        return gates, *torch.autograd.grad(gates.square().sum(), [budget, *gate.parameters()])

    torch.testing.assert_close(answer(compiled), answer(gate))


def test_autocast_selects_in_float32() -> None:
    gate = KnapsackGate(torch.rand(16) + 0.1, nn.Linear(4, 16), kind="soft")
    with torch.autocast("cpu", torch.bfloat16):
        gates = gate(torch.randn(3, 4))
        assert gates.dtype == torch.float32
    spent = (gates * gate.costs).sum(-1) / gate.costs.sum()
    torch.testing.assert_close(spent, torch.full((3,), 0.5), rtol=1e-5, atol=0)


def test_copies_and_saved_gates_are_the_same(tmp_path: Path) -> None:
    gate, x = KnapsackGate(torch.rand(5) + 0.1, nn.Linear(3, 5)), torch.randn(4, 3)
    expected = gate(x)
    assert torch.equal(copy.deepcopy(gate)(x), expected)
    other = KnapsackGate(torch.ones(5), nn.Linear(3, 5))
    other.load_state_dict(gate.state_dict())
    assert torch.equal(other(x), expected)
    spartan.save_pretrained(gate, tmp_path)
    loaded = spartan.load_pretrained(KnapsackGate(torch.ones(5), nn.Linear(3, 5)), tmp_path)
    assert torch.equal(loaded(x), expected)
    assert "5 blocks, budget=0.5" in repr(gate)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"costs": []}, "costs must be positive numbers"),
        ({"costs": [1.0, 0.0]}, "costs must be positive numbers"),
        ({"costs": [1.0, float("nan")]}, "costs must be positive numbers"),
        ({"costs": torch.ones(2, 2)}, "costs must be positive numbers"),
        ({"budget": 1.5}, "budget must be a fraction .* got 1.5"),
        ({"budget": -0.1}, "budget must be a fraction"),
        ({"beta": -1.0}, "beta must be at least 0"),
        ({"beta": float("inf")}, "beta must be at least 0"),
        ({"kind": "firm"}, "kind must be one of hard, soft, scaled; got 'firm'"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        KnapsackGate(**{"costs": [1.0, 2.0], **settings})


def test_wrong_calls_are_refused() -> None:
    free, made = KnapsackGate([1.0, 2.0]), KnapsackGate([1.0, 2.0], nn.Linear(3, 2))
    with pytest.raises(TypeError, match="has scores of its own and takes no x; got Tensor"):
        free(torch.ones(2))
    with pytest.raises(TypeError, match="makes its scores of x; got none"):
        made()
    with pytest.raises(ValueError, match=r"scores must be \[..., 2\]"):
        KnapsackGate([1.0, 2.0], nn.Linear(3, 4))(torch.ones(5, 3))
    with pytest.raises(ValueError, match="budget must be a fraction"):
        free(budget=2.0)
    with pytest.raises(ValueError, match="budget must be in"):
        free(budget=torch.tensor(1.1))
    with pytest.raises(ValueError, match="budget must be a number or of shape"):
        made(torch.ones(5, 3), torch.ones(4))


@pytest.mark.parametrize("name", ["knapsack_gate", "architecture_search"])
def test_the_example_runs(name: str, tmp_path: Path) -> None:
    write_set(tmp_path / "data", train=400, test=100, side=16)
    path = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    script = ROOT / "examples" / "layers" / f"{name}.py"
    subprocess.run(
        [sys.executable, script, "--quick", "--out", tmp_path / "out", "--data", tmp_path / "data"],
        env={**os.environ, "PYTHONPATH": path},
        check=True,
        capture_output=True,
    )
    results = json.loads((tmp_path / "out" / f"{name}.json").read_text())["results"]
    assert results and all(0 <= record["accuracy"] <= 100 for record in results)
    assert (tmp_path / "out" / f"{name}.png").stat().st_size > 0
