"""Attention at predicted pairs: against dense attention with a mask, whose gradients autograd takes."""

from __future__ import annotations

import copy
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_images import write_set
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import spartan
from spartan.layers import ConnectivityAttention

pytestmark = pytest.mark.usefixtures("one_thread")
EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "layers" / "connectivity_attention.py"


def layer(dtype: torch.dtype = torch.float64, dim: int = 6, tokens: int = 9, **settings: Any) -> ConnectivityAttention:
    """A small layer whose predictor is not as it began."""
    torch.manual_seed(0)
    module = ConnectivityAttention(dim, 2, tokens, **{"keep": 4, "rank": 5, **settings}).to(dtype)
    for parameter in (module.down, module.up):
        parameter.data += 0.5 * torch.randn_like(parameter)
    return module


def padding(n: int, tokens: int) -> Tensor:
    """From none to all but one of the tokens of an input."""
    counts = torch.linspace(0, tokens - 1, n).long()
    return torch.stack([torch.randperm(tokens) < c for c in counts])


def soft_mask(values: Tensor, budget: Tensor, beta: float, dim: int) -> Tensor:
    """The soft mask by bisection, and a Newton step that has the gradient of its threshold."""
    lines = beta * values.movedim(dim, -1)
    finite = lines.detach().masked_fill(lines.isinf(), 0)
    low, high = -finite.amax(-1, keepdim=True) - 60, -finite.amin(-1, keepdim=True) + 60
    for _ in range(200):
        middle = (low + high) / 2
        above = (lines.detach() + middle).sigmoid().sum(-1, keepdim=True) > budget
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    mask = (lines + low).sigmoid()
    slope = (mask * (1 - mask)).detach().sum(-1, keepdim=True)
    step = torch.where(slope > 0, (mask.sum(-1, keepdim=True) - budget) / slope.clamp(min=1e-300), 0)
    return (lines + low - step).sigmoid().movedim(-1, dim)


def reference(module: ConnectivityAttention, x: Tensor, padded: Tensor | None) -> Tensor:
    """The equations of the class over all pairs."""
    n, tokens, dim = x.shape
    width = dim // module.heads
    query, key, value = module.query(x), module.key(x), module.value(x)
    heads = [part.view(n, tokens, module.heads, width).transpose(1, 2) for part in (query, key, value)]
    gone = torch.zeros(n, tokens, dtype=torch.bool) if padded is None else padded
    gone = gone[:, None, None, :]
    mixed = torch.einsum("rt,nhtd->nhrd", module.down, heads[1] * ~gone.mT)
    low = torch.softmax(torch.einsum("nhqd,nhrd->nhqr", heads[0], mixed) / width**0.5, -1)
    size = module.up.abs()
    largest = size >= size.topk(module.basis, 0).values[-1]
    soft = soft_mask(size, torch.tensor(float(module.basis)), 1.0, 0)
    connectivity = torch.einsum("nhqr,rt->nhqt", low, module.up * (largest + soft - soft.detach()))
    connectivity = connectivity.masked_fill(gone, -torch.inf)
    budget = (~gone).sum(-1, keepdim=True).clamp(max=module.k).to(x.dtype)
    soft = soft_mask(connectivity, budget, module.beta, -1)
    kept = (connectivity >= connectivity.topk(module.k).values[..., -1:]) & ~gone
    scores = torch.einsum("nhqd,nhkd->nhqk", heads[0], heads[1]) / width**0.5
    weights = torch.exp(scores - scores.amax(-1, keepdim=True)) * kept * (1 + soft - soft.detach())
    attended = torch.einsum("nhqk,nhkd->nhqd", weights / weights.sum(-1, keepdim=True), heads[2])
    return module.projection(attended.transpose(1, 2).reshape(n, tokens, dim))


@pytest.mark.parametrize("padded", [False, True], ids=["all", "padded"])
@pytest.mark.parametrize("settings", [{}, {"keep": 2, "basis": 1}, {"keep": 0.5, "rank": 9, "basis": 4, "tokens": 33}])
def test_outputs_and_gradients(settings: dict[str, Any], padded: bool) -> None:
    module = layer(**settings)
    x = torch.randn(4, module.tokens, 6, dtype=torch.float64, requires_grad=True)
    gone = padding(4, module.tokens) if padded else None
    ours, expected = module(x, gone), reference(module, x, gone)
    torch.testing.assert_close(ours, expected)
    upstream = torch.randn_like(ours)
    leaves = [x, *module.parameters()]
    found = torch.autograd.grad(ours, leaves, upstream)
    wanted = torch.autograd.grad(expected, leaves, upstream)
    for f, w in zip(found, wanted, strict=True):
        assert f.abs().max() > 0
        torch.testing.assert_close(f, w, rtol=1e-5, atol=1e-7)


def test_few_keys_of_many_are_fetched() -> None:
    module = layer(tokens=40, keep=2)
    x = torch.randn(2, 40, 6, dtype=torch.float64)
    torch.testing.assert_close(module(x), reference(module, x, None))


def test_one_key_is_its_value_and_leaves_the_predictor_no_gradient() -> None:
    module = layer(keep=1)
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    ours = module(x)
    torch.testing.assert_close(ours, reference(module, x, None))
    assert not torch.autograd.grad(ours.sum(), module.up)[0].any()


def test_all_pairs_are_dense_attention() -> None:
    module = layer(keep=1.0)
    x = torch.randn(3, 9, 6, dtype=torch.float64)
    heads = (part(x).view(3, 9, 2, 3).transpose(1, 2) for part in (module.query, module.key, module.value))
    dense = F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(3, 9, 6)
    torch.testing.assert_close(module(x), module.projection(dense))


def test_padded_tokens_change_nothing() -> None:
    module = layer()
    x, gone = torch.randn(3, 9, 6, dtype=torch.float64), padding(3, 9)
    other = torch.where(gone[..., None], torch.randn_like(x), x)
    assert torch.equal(module(x, gone)[~gone], module(other, gone)[~gone])


def test_training_changes_no_output() -> None:
    module = layer(torch.float32)
    x = torch.randn(3, 9, 6)
    with torch.no_grad():
        expected = module(x)
    assert torch.equal(module(x), expected)


def test_at_first_a_query_keeps_a_group() -> None:
    torch.manual_seed(0)
    module = ConnectivityAttention(8, 1, 12, keep=3, rank=4, basis=1)
    key = torch.zeros(1, 1, 12, 8)
    key[..., 6:9, 0] = 5  # the third of four groups of neighbours
    query = torch.zeros(1, 1, 1, 8)
    query[..., 0] = 5
    kept = module.connectivity(query, key).topk(3).indices
    assert sorted(kept.flatten().tolist()) == [6, 7, 8]


def test_operations_are_those_that_pytorch_counts() -> None:
    module = layer(torch.float32, dim=8, tokens=11, keep=11, rank=5, basis=5)  # products that leave nothing out
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.randn(1, 11, 8))
    assert sum(module.flops().values()) == counter.get_total_flops()
    half = layer(dim=8, tokens=12, keep=6).flops()["attention"]
    assert 2 * half == layer(dim=8, tokens=12, keep=12).flops()["attention"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 5}, "dim must be a positive multiple of heads; got dim 6, heads 5"),
        ({"keep": 0}, r"keep must be an int from 1 to 9, or a float in \(0, 1\]; got 0"),
        ({"keep": 10}, "got 10"),
        ({"keep": 1.5}, "got 1.5"),
        ({"keep": 0.0}, "got 0.0"),
        ({"rank": 0}, "rank must be from 1 to 9; got 0"),
        ({"rank": 10}, "rank must be from 1 to 9; got 10"),
        ({"rank": 4, "basis": 5}, "basis must be from 1 to 4; got 5"),
        ({"beta": 0.0}, "beta must be above 0; got 0"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConnectivityAttention(**{"dim": 6, "heads": 2, "tokens": 9, **settings})


def test_a_share_is_rounded_to_one_at_least() -> None:
    assert [layer(keep=share).k for share in (0.01, 0.5, 1.0)] == [1, 4, 9]


def test_inputs_that_are_refused() -> None:
    module = layer(torch.float32)
    x = torch.randn(2, 9, 6)
    for wrong in (x[:, :8], x[..., :5], x[0]):
        with pytest.raises(ValueError, match=r"x must be \[n, 9, 6\]; got"):
            module(wrong)
    for padded in (torch.zeros(2, 8, dtype=torch.bool), torch.zeros(2, 9)):
        with pytest.raises(ValueError, match=r"key_padding_mask must be bool \[2, 9\]; got"):
            module(x, padded)


@pytest.mark.parametrize("tokens", [9, 70], ids=["dense", "gathered"])
def test_compiled(tokens: int) -> None:
    module = layer(torch.float32, tokens=tokens)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x, gone = torch.randn(3, tokens, 6), padding(3, tokens)
    ours, expected = compiled(x, gone), module(x, gone)
    torch.testing.assert_close(ours, expected)
    parameters = list(module.parameters())
    found, wanted = (torch.autograd.grad(y.pow(2).sum(), parameters) for y in (ours, expected))
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w)


def test_autocast() -> None:
    module = layer(torch.float32, keep=9)  # all pairs: rounding changes no choice
    x = torch.randn(3, 9, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    torch.testing.assert_close(y.float(), module(x), atol=0.05, rtol=0.05)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_copies_and_files(tmp_path: Path) -> None:
    module, x = layer(torch.float32), torch.randn(2, 9, 6)
    expected = module(x)
    assert torch.equal(copy.deepcopy(module)(x), expected)
    fresh = ConnectivityAttention(6, 2, 9, keep=4, rank=5)
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh(x), expected)
    spartan.save_pretrained(module, tmp_path)
    loaded = spartan.load_pretrained(ConnectivityAttention(6, 2, 9, keep=4, rank=5), tmp_path)
    assert torch.equal(loaded(x), expected)


def test_example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_set(tmp_path / "data", train=64, test=20)
    arguments = ["--quick", "--data", str(tmp_path / "data"), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *arguments])
    monkeypatch.setattr(sys, "path", [*sys.path])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    records = json.loads((tmp_path / "connectivity_attention.json").read_text())["results"]
    assert [r["pairs"] for r in records] == ["all", "predicted", "random", "not trained"]
    assert (tmp_path / "connectivity_attention.png").stat().st_size > 0
