"""`GatedAttention` against a loop over tokens, paths against an enumeration, and the weight that follows a target."""

from __future__ import annotations

import copy
import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import spartan
from spartan.layers import DualAscent, GatedAttention, InterventionTokens, causal_graph, path_sparsity

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def make(dim: int = 6, heads: int = 2, openness: float = 0.0, **settings: object) -> GatedAttention:
    """In float64, with scores on both sides of zero."""
    layer = GatedAttention(dim, heads, openness=openness, **settings).double()  # type: ignore[arg-type]
    with torch.no_grad():
        layer.gate.weight.mul_(4)
    return layer


def looped(layer: GatedAttention, x: Tensor, gates: Tensor) -> Tensor:
    """y of one set of tokens `[tokens, dim]` for given gates, pair by pair."""
    queries, keys, values = layer.project(x).chunk(3, dim=-1)
    width = layer.dim // layer.heads
    rows = []
    for i in range(len(x)):
        heads = []
        for head in range(layer.heads):
            part = slice(head * width, (head + 1) * width)
            total, read = torch.zeros((), dtype=x.dtype), torch.zeros(width, dtype=x.dtype)
            for j in range(len(x)):
                if gates[i, j]:
                    weight = torch.exp(queries[i, part] @ keys[j, part] / math.sqrt(width))
                    total, read = total + weight, read + weight * values[j, part]
            heads.append(read / total if total > 0 else read)
        rows.append(layer.out.weight @ torch.cat(heads))
    return torch.stack(rows)


def scores(layer: GatedAttention, x: Tensor) -> Tensor:
    reads, is_read = layer.gate(x).chunk(2, dim=-1)
    return torch.einsum("...if,...jf->...ij", reads, is_read) / math.sqrt(layer.dim) + layer.openness


@pytest.mark.parametrize(("tokens", "heads", "openness"), [(5, 1, 0.0), (7, 3, -1.0), (1, 2, 0.0)])
def test_evaluation_is_the_equation(tokens: int, heads: int, openness: float) -> None:
    layer, x = make(6, heads, openness).eval(), torch.randn(3, tokens, 6, dtype=torch.float64)
    y, gates = layer(x)
    assert torch.equal(gates, (scores(layer, x).sigmoid() > 0.5).double())
    assert tokens == 1 or 0 < gates.mean() < 1
    for n in range(3):
        torch.testing.assert_close(y[n], looped(layer, x[n], gates[n]))


def test_training_samples_gates_by_their_probability() -> None:
    layer, x = make(openness=0.5), torch.randn(5, 6, dtype=torch.float64)
    y, gates = layer(x.expand(4000, -1, -1))
    expected = scores(layer, x).sigmoid()
    assert set(gates.unique().tolist()) == {0.0, 1.0}
    assert ((gates.mean(0) - expected).abs() < 5 * (expected * (1 - expected) / 4000).sqrt() + 1e-3).all()
    torch.testing.assert_close(y[7], looped(layer, x, gates[7]))


def test_gradients_with_fixed_gates_are_those_of_the_loop() -> None:
    layer, x = make().eval(), torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.project.parameters(), *layer.out.parameters()]
    layer.gate.requires_grad_(False).weight.zero_()
    layer.places = torch.nn.Parameter(torch.randn(5, 5, dtype=torch.float64))  # scores that do not depend on x
    y, gates = layer(x)
    along = torch.randn_like(y)
    ours = torch.autograd.grad((y * along).sum(), inputs)
    reference = torch.autograd.grad((looped(layer, x, gates) * along).sum(), inputs)
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("sharpness", [1.0, 30.0], ids=["even weights", "weights near 1"])
@pytest.mark.parametrize("openness", [-1.5, 0.0, 1.5])
def test_the_gradient_of_a_gate_is_what_its_switch_changes(openness: float, sharpness: float) -> None:
    layer, x = make(openness=openness, places=5, temperature=0.7).eval(), torch.randn(5, 6, dtype=torch.float64)
    with torch.no_grad():
        layer.project.weight[:6] *= sharpness
    y, gates = layer(x)
    along = torch.randn_like(y)
    (gradient,) = torch.autograd.grad((y * along).sum(), layer.places)
    relaxed = (scores(layer, x) / 0.7).sigmoid()
    for i, j in itertools.product(range(5), range(5)):
        opened, closed = gates.clone(), gates.clone()
        opened[i, j], closed[i, j] = 1, 0
        change = ((looped(layer, x, opened) - looped(layer, x, closed)) * along).sum()
        expected = change * relaxed[i, j] * (1 - relaxed[i, j]) / 0.7
        torch.testing.assert_close(gradient[i, j], expected, rtol=1e-6, atol=1e-9)


def test_masks_that_are_not_floating_are_refused() -> None:
    layer, x = GatedAttention(8), torch.randn(2, 3, 8)
    for mask in (torch.zeros(2, 3, dtype=torch.bool), torch.ones(2, 3, dtype=torch.int64)):
        with pytest.raises(
            ValueError, match=f"mask must be floating, 0 or -inf where a token is absent; got {mask.dtype}"
        ):
            layer(x, mask)
        with pytest.raises(ValueError, match="mask must be floating"):
            InterventionTokens(2, 8)(x, torch.zeros(2, dtype=torch.int64), mask)


def test_the_least_number_masks_as_infinity_does() -> None:
    layer, x, mask = make(openness=2.0).eval(), torch.randn(2, 4, 6, dtype=torch.float64), torch.zeros(2, 4)
    mask[:, 1] = -torch.inf
    expected = layer(x, mask)
    for found, wanted in zip(layer(x, mask.clamp_min(torch.finfo(mask.dtype).min)), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_loss_that_is_not_finite_leaves_the_weight_and_the_mean() -> None:
    ascent = DualAscent(1.0)
    ascent(torch.tensor(2.0), torch.tensor(1.0))
    average = ascent.average.clone()
    ascent(torch.tensor(float("nan")), torch.tensor(1.0))
    assert torch.equal(ascent.average, average) and ascent.weight.isfinite()


@pytest.mark.parametrize("training", [False, True])
def test_a_token_with_no_open_gate_gets_zero_and_a_finite_gradient(training: bool) -> None:
    layer, x = make(openness=-1000.0).train(training), torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    y, gates = layer(x)
    assert not y.any() and not gates.any()
    (y * torch.randn_like(y)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in [x, *layer.parameters()])


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e3])
def test_gradients_are_finite_where_weights_are_extreme(scale: float) -> None:
    layer, x = GatedAttention(8, openness=0.0), torch.randn(16, 6, 8)
    with torch.no_grad():
        layer.project.weight.mul_(scale)
    y, gates = layer(x)
    (y.sum() + path_sparsity([gates])).backward()
    assert y.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_absent_tokens_change_nothing() -> None:
    layer, x = make(openness=1.0).eval(), torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.zeros(2, 5, dtype=torch.float64)
    mask[0, 3:] = mask[1, :1] = -math.inf
    y, gates = layer(x, mask)
    torch.testing.assert_close(y[0, :3], layer(x[0, :3])[0])
    torch.testing.assert_close(y[1, 1:], layer(x[1, 1:])[0])
    assert not gates[0, 3:].any() and not gates[0, :, 3:].any() and not y[0, 3:].any()
    (y.square().sum() + gates.sum()).backward()
    assert x.grad is not None and not x.grad[0, 3:].any() and x.grad[0, :3].all()


def test_places_add_a_score_for_each_pair() -> None:
    layer, x = make(places=4).eval(), torch.randn(3, 4, 6, dtype=torch.float64)
    with torch.no_grad():
        layer.places.copy_(torch.eye(4) * 1000 - 500)  # type: ignore[union-attr]
    assert torch.equal(layer(x)[1], torch.eye(4, dtype=torch.float64).expand(3, -1, -1))


def counted(gates: list[Tensor], i: int, j: int) -> int:
    """Paths from j to i, by enumeration: at each layer a token is kept, or goes through an open gate."""
    found = 0
    for between in itertools.product(range(gates[0].shape[-1]), repeat=len(gates) - 1):
        steps = list(itertools.pairwise((j, *between, i)))
        found += math.prod(int(g[b, a]) + (a == b) for g, (a, b) in zip(gates, steps, strict=True))
    return found


@pytest.mark.parametrize(("layers", "tokens"), [(1, 4), (3, 3), (2, 5)])
def test_paths_are_those_of_an_enumeration(layers: int, tokens: int) -> None:
    gates = [(torch.rand(2, tokens, tokens) < 0.3).double() for _ in range(layers)]
    pairs = list(itertools.product(range(tokens), range(tokens)))
    counts = torch.tensor([[counted([g[n] for g in gates], i, j) for i, j in pairs] for n in range(2)])
    assert path_sparsity(gates).item() == pytest.approx(counts.double().mean().item())
    assert torch.equal(causal_graph(gates).flatten(1), counts > 0)


def test_the_gradient_of_paths_is_that_of_the_product() -> None:
    gates = [torch.rand(2, 4, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *g: path_sparsity(g), gates)
    eye = torch.eye(4, dtype=torch.float64)
    product = (gates[2] + eye) @ (gates[1] + eye) @ (gates[0] + eye)
    expected = torch.autograd.grad(product.mean(), gates)
    for a, b in zip(torch.autograd.grad(path_sparsity(gates), gates), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_does_not_round_the_paths() -> None:
    gates = [torch.ones(1, 32, 32)] * 3
    with torch.autocast("cpu", torch.bfloat16):
        assert path_sparsity(gates).item() == 33**3 / 32
        assert causal_graph(gates).all()


def test_the_weight_follows_the_target() -> None:
    ascent = DualAscent(1.0, rate=0.1, decay=0.5, limits=(1e-2, 1e2))
    assert ascent(torch.tensor(8.0), torch.tensor(3.0)).item() == pytest.approx(8 + 3e-2)  # at its least
    average, log_weight = 8.0, math.log(1e-2)
    for loss in (0.5, 0.1, 0.1, 0.1, 2.0, 2.0):
        average = 0.5 * average + 0.5 * loss
        log_weight = max(log_weight - 0.1 * min(average - 1, 1), math.log(1e-2))
        total = ascent(torch.tensor(loss), torch.tensor(3.0))
        assert total.item() == pytest.approx(loss + 3 * math.exp(log_weight))
    saved, again = ascent.state_dict(), DualAscent(1.0, rate=0.1, decay=0.5)
    again.load_state_dict(saved)
    assert torch.equal(again.weight, ascent.weight) and torch.equal(again.average, ascent.average)
    before = ascent.weight.clone()
    ascent.eval()(torch.tensor(0.0), torch.tensor(1.0))
    assert torch.equal(ascent.weight, before)


def test_dual_ascent_solves_a_constrained_problem() -> None:
    """Minimise x^2 subject to (x - 3)^2 <= 1: at x = 2 with a weight of (x - 3) / -x = 1/2."""
    x, ascent = torch.tensor(0.0, requires_grad=True), DualAscent(1.0, rate=0.05)
    for _ in range(1500):
        total = ascent((x - 3) ** 2, x**2)
        (gradient,) = torch.autograd.grad(total, x)
        with torch.no_grad():
            x -= 0.05 * gradient
    assert x.item() == pytest.approx(2, abs=1e-2) and ascent.weight.item() == pytest.approx(0.5, abs=1e-2)


def test_intervention_tokens_join_the_set_where_there_is_one() -> None:
    tokens, x = InterventionTokens(3, 6), torch.randn(4, 5, 6)
    mask = torch.zeros(4, 5)
    mask[2, 1] = -math.inf
    wide, there = tokens(x, torch.tensor([2, -1, 0, 2]), mask)
    assert torch.equal(wide[:, :5], x) and torch.equal(there[:, :5], mask)
    assert torch.equal(wide[[0, 2, 3], 5], tokens.tokens[[2, 0, 2]])
    assert there[:, 5].tolist() == [0, -math.inf, 0, 0]
    layer = GatedAttention(6).eval()
    torch.testing.assert_close(layer(wide, there)[0][1, :5], layer(x[1])[0])
    layer(*tokens(x, torch.full((4,), -1)))[0].sum().backward()
    assert tokens.tokens.grad is not None and not tokens.tokens.grad.any()


def build(dim: int = 8) -> torch.nn.ModuleDict:
    return torch.nn.ModuleDict({"tokens": InterventionTokens(2, dim), "attention": GatedAttention(dim, 2, places=4)})


def run(model: torch.nn.ModuleDict, x: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
    y, gates = model["attention"](*model["tokens"](x, which))
    return y, path_sparsity([gates, gates])


@pytest.mark.parametrize("training", [False, True])
def test_it_compiles_in_one_graph(training: bool) -> None:
    torch.compiler.reset()
    model, ascent = build().train(training), DualAscent(1.0).train(training)
    x, which = torch.randn(3, 3, 8), torch.tensor([0, -1, 1])

    def total(x: Tensor, which: Tensor) -> Tensor:
        y, paths = run(model, x, which)
        return ascent(y.square().mean(), paths)

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    value = compiled(x, which)
    value.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert len(gradients) == len(list(model.parameters()))
    if not training:  # the random numbers of the two are not the same
        for p in model.parameters():
            p.grad = None
        expected = total(x, which)
        expected.backward()
        torch.testing.assert_close(value, expected)
        for a, p in zip(gradients, model.parameters(), strict=True):
            torch.testing.assert_close(a, p.grad)


def test_autocast_computes_in_bfloat16_with_exact_gates() -> None:
    model, x, which = build(), torch.randn(3, 3, 8), torch.tensor([0, -1, 1])
    with torch.autocast("cpu", torch.bfloat16):
        y, gates = model["attention"](*model["tokens"](x, which))
    assert y.dtype == torch.bfloat16 and gates.dtype == torch.float32
    assert set(gates.unique().tolist()) <= {0.0, 1.0}
    y.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    expected = model.eval()["attention"](*model["tokens"](x, which))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model["attention"](*model["tokens"](x, which))
    assert torch.equal(rounded[1], expected[1])
    torch.testing.assert_close(rounded[0].float(), expected[0], atol=0.02, rtol=0.02)


def test_it_is_copied_and_saved(tmp_path: Path) -> None:
    model, x, which = build().eval(), torch.randn(3, 3, 8), torch.tensor([0, -1, 1])
    expected = run(model, x, which)
    spartan.save_pretrained(model, tmp_path)
    loaded = spartan.load_pretrained(build(), tmp_path).eval()
    for other in (copy.deepcopy(model), loaded):
        for a, b in zip(run(other, x, which), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GatedAttention(6, 4), "dim must be a positive multiple of heads; got dim 6 and heads 4"),
        (lambda: GatedAttention(0), "dim must be"),
        (lambda: GatedAttention(6, temperature=0), "temperature must be positive and finite; got 0"),
        (lambda: GatedAttention(6, places=0), "places must be at least 1, or None; got 0"),
        (lambda: GatedAttention(6)(torch.zeros(2, 3, 5)), r"x must be \[..., tokens, 6\]; got \[2, 3, 5\]"),
        (lambda: GatedAttention(6, places=4)(torch.zeros(3, 6)), "x must have the 4 tokens of places; got 3"),
        (lambda: GatedAttention(6)(torch.zeros(2, 3, 6), torch.zeros(3)), r"mask must be \[2, 3\].*got \[3\]"),
        (lambda: InterventionTokens(0, 6), "interventions and dim must be at least 1; got 0 and 6"),
        (lambda: InterventionTokens(1, 6)(torch.zeros(3, 5), torch.tensor(0)), r"x must be \[..., tokens, 6\]"),
        (lambda: InterventionTokens(1, 6)(torch.zeros(3, 6), torch.zeros(3).long()), r"which must be \[\].*\[3\]"),
        (
            lambda: InterventionTokens(1, 6)(torch.zeros(3, 6), torch.tensor(0), torch.zeros(4)),
            r"mask must be \[3\].*got \[4\]",
        ),
        (lambda: path_sparsity([]), "gates must have those of one layer at least; got none"),
        (lambda: causal_graph([torch.zeros(3, 4)]), r"gates must be .*got \[\[3, 4\]\]"),
        (lambda: path_sparsity([torch.zeros(3, 3), torch.zeros(2, 3, 3)]), "of one shape in all layers"),
        (lambda: DualAscent(0), "target must be positive and finite; got 0"),
        (lambda: DualAscent(1, rate=0), "rate must be positive and finite; got 0"),
        (lambda: DualAscent(1, decay=1), "decay must be from 0 up to 1, 1 excluded; got 1"),
        (lambda: DualAscent(1, limits=(2, 1)), r"limits must be 0 < least <= most, finite; got \(2, 1\)"),
        (lambda: DualAscent(1)(torch.zeros(2), torch.tensor(0.0)), r"loss must be 0-dim; got \[2\]"),
    ],
)
def test_refusals(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


def test_the_example_runs(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "examples/layers/gated_attention.py", "--quick", "--out", tmp_path]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert {path.name for path in tmp_path.iterdir()} == {"gated_attention.json", "gated_attention.png"}
