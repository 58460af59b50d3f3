"""Experts found by product keys: the selection against all sums, the layer against a loop over all experts."""

from __future__ import annotations

import copy
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import spartan
from spartan.layers import ProductKeyExperts, product_key_topk

pytestmark = pytest.mark.usefixtures("one_thread")
EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "layers" / "product_key_experts.py"


def layer(experts: int = 49, dtype: torch.dtype = torch.float64, **settings: Any) -> ProductKeyExperts:
    torch.manual_seed(0)
    return ProductKeyExperts(6, experts, **{"heads": 3, "k": 4, "key_dim": 10, **settings}).to(dtype)


def reference(module: ProductKeyExperts, x: Tensor) -> Tensor:
    """The equations of the class, with all N experts and a mask, in the batch statistics of training."""
    tokens = x.reshape(-1, x.shape[-1])
    query = module.query(tokens)
    if module.norm is not None:
        norm = module.norm
        mean, variance = query.mean(0), query.var(0, correction=0)
        query = (query - mean) / torch.sqrt(variance + norm.eps) * norm.weight + norm.bias
    hidden = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}[module.activation](tokens @ module.down.T)
    y = torch.zeros_like(tokens)
    for head in query.chunk(module.heads, -1):
        first, second = head.chunk(2, -1)
        scores = ((first @ module.keys[0].T)[:, :, None] + (second @ module.keys[1].T)[:, None, :]).flatten(1)
        kept = scores >= scores.topk(module.k).values[:, -1:]
        if module.router == "softmax":
            gates = scores.masked_fill(~kept, -torch.inf).softmax(-1)
        else:
            gates = scores.sigmoid() * kept
        y = y + (gates * hidden) @ module.up
    return y.view(x.shape)


@pytest.mark.parametrize("shape", [(), (1,), (2, 5)])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 4), (7, 1), (7, 5), (7, 30), (7, 49), (31, 16), (64, 64)])
def test_the_selection_is_the_top_k_of_all_sums(n: int, k: int, shape: tuple[int, ...]) -> None:
    first, second = torch.randn(2, *shape, n, dtype=torch.float64)
    sums, indices = product_key_topk(first, second, k)
    everything = (first[..., :, None] + second[..., None, :]).flatten(-2)
    assert torch.equal(sums.sort(-1, descending=True).values, everything.topk(k).values)
    assert torch.equal(everything.gather(-1, indices), sums)
    assert all(len(set(row)) == k for row in indices.view(-1, k).tolist())


def test_the_selection_with_ties() -> None:
    first, second = torch.randint(3, (2, 50, 9)).double()
    sums, indices = product_key_topk(first, second, 12)
    everything = (first[..., :, None] + second[..., None, :]).flatten(-2)
    assert torch.equal(sums.sort(-1, descending=True).values, everything.topk(12).values)
    assert all(len(set(row)) == 12 for row in indices.tolist())


def test_gradient_of_the_selected_sums() -> None:
    first, second = torch.randn(2, 3, 6, dtype=torch.float64).requires_grad_().unbind(0)
    assert torch.autograd.gradcheck(lambda a, b: product_key_topk(a, b, 5)[0], (first, second))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"router": "sigmoid", "activation": "relu"},
        {"query_norm": False, "activation": "silu", "heads": 1},
        {"experts": 1, "k": 1},
        {"experts": 400, "sparse": True},
        {"experts": 400, "heads": 2, "k": 3},
    ],
    ids=lambda settings: ", ".join(map(str, settings.values())) or "default",
)
def test_outputs_and_gradients(settings: dict[str, Any]) -> None:
    module = layer(**settings)
    x = torch.randn(2, 11, 6, dtype=torch.float64, requires_grad=True)
    ours, expected = module(x), reference(module, x)
    torch.testing.assert_close(ours, expected)
    upstream = torch.randn_like(ours)
    leaves = [x, *module.parameters()]
    found = torch.autograd.grad(ours, leaves, upstream)
    for f, w in zip(found, torch.autograd.grad(expected, leaves, upstream), strict=True):
        torch.testing.assert_close(f.to_dense(), w)
    sparse = {name for (name, _), f in zip(module.named_parameters(), found[1:], strict=True) if f.is_sparse}
    assert sparse == ({"down", "up"} if module.sparse else set())


def test_sparse_gradients_train() -> None:
    module = layer(400, torch.float32, sparse=True)
    optimizer = torch.optim.SparseAdam([module.down, module.up], 0.1)
    before = module.down.detach().clone()
    x = torch.randn(8, 6)
    module(x).pow(2).sum().backward()
    optimizer.step()
    changed = (module.down != before).any(-1).nonzero().flatten()
    assert set(changed.tolist()) <= set(module.choose(x)[1].flatten().tolist())
    assert 0 < len(changed) < 400


def test_no_tokens_at_all() -> None:
    module = ProductKeyExperts(8, 16, heads=2, k=3, key_dim=4).eval()
    assert module(torch.zeros(0, 5, 8)).shape == (0, 5, 8)


def test_chosen_experts_are_those_used() -> None:
    module = layer().eval()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    gates, indices = module.choose(x)
    assert gates.shape == indices.shape == (2, 5, 3, 4)
    hidden = F.gelu(torch.einsum("bthkd,btd->bthk", module.down[indices], x))
    expected = torch.einsum("bthk,bthkd->btd", gates * hidden, module.up[indices])
    torch.testing.assert_close(module(x), expected)


def test_active_parameters_by_hand() -> None:
    assert layer().active_parameters() == 6 * 30 + 60 + 2 * 7 * 5 + 2 * 3 * 4 * 6
    assert layer(query_norm=False).active_parameters() == 6 * 30 + 30 + 2 * 7 * 5 + 2 * 3 * 4 * 6
    everything = layer(1, heads=1, k=1)
    assert everything.active_parameters() == sum(p.numel() for p in everything.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"experts": 50}, "experts must be a square number; got 50"),
        ({"experts": 0}, "got 0"),
        ({"experts": -4}, "got -4"),
        ({"k": 50}, "k must be from 1 to the 49 experts; got 50"),
        ({"k": 0}, "got 0"),
        ({"key_dim": 7}, "key_dim must be even and at least 2; got 7"),
        ({"key_dim": 0}, "got 0"),
        ({"heads": 0}, "heads must be at least 1; got 0"),
        ({"router": "argmax"}, "router must be one of softmax, sigmoid; got 'argmax'"),
        ({"activation": "tanh"}, "activation must be one of gelu, relu, silu; got 'tanh'"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer(**settings)


def test_inputs_that_are_refused() -> None:
    module = layer()
    for call in (module, module.choose):
        with pytest.raises(ValueError, match=r"x must be \[\.\.\., 6\]; got \[2, 5\]"):
            call(torch.randn(2, 5))
    with pytest.raises(ValueError, match=r"one shape; got \[2, 3\] and \[2, 4\]"):
        product_key_topk(torch.randn(2, 3), torch.randn(2, 4), 1)
    for k in (0, 10):
        with pytest.raises(ValueError, match=f"k must be from 1 to the 9 sums; got {k}"):
            product_key_topk(torch.randn(2, 3), torch.randn(2, 3), k)


@pytest.mark.parametrize("experts", [49, 400], ids=["dense", "gathered"])
def test_compiled(experts: int) -> None:
    module = layer(experts, torch.float32)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 5, 6)
    ours, expected = compiled(x), module(x)
    torch.testing.assert_close(ours, expected)
    parameters = list(module.parameters())
    found, wanted = (torch.autograd.grad(y.pow(2).sum(), parameters) for y in (ours, expected))
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w)


@pytest.mark.parametrize("experts", [16, 400], ids=["dense", "gathered"])
def test_autocast(experts: int) -> None:
    module = layer(experts, torch.float32, k=experts if experts == 16 else 4)
    x = torch.randn(3, 5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x.bfloat16())
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    if experts == 16:  # all are used: rounding changes no choice
        torch.testing.assert_close(y.float(), module(x), atol=0.05, rtol=0.05)


def test_copies_and_files(tmp_path: Path) -> None:
    module, x = layer(dtype=torch.float32), torch.randn(2, 9, 6)
    module(x)  # statistics of the queries
    expected = module.eval()(x)
    assert torch.equal(copy.deepcopy(module)(x), expected)
    fresh = layer(dtype=torch.float32).eval()
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh(x), expected)
    spartan.save_pretrained(module, tmp_path)
    loaded = spartan.load_pretrained(ProductKeyExperts(6, 49, 3, 4, 10), tmp_path)
    assert torch.equal(loaded.eval()(x), expected)


def test_example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--quick", "--out", str(tmp_path)])
    monkeypatch.setattr(sys, "path", [*sys.path])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    records = json.loads((tmp_path / "product_key_experts.json").read_text())["results"]
    assert [r["experts"] for r in records] == [None, 1024]
    assert 0 < records[1]["used"] <= 100 and records[1]["total"] > 4 * records[1]["active"]
    assert (tmp_path / "product_key_experts.png").stat().st_size > 0
