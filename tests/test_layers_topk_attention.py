"""Attention to the k largest scores: every row against a loop over its own keys, masks, mixtures, gradients."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import spartan
from spartan.layers import TopKAttention, topk_attention
from tests.pages import ROOT


def operands(t: int, d: int, queries: int | None = None, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    lengths = (queries or t, t, t)
    return [torch.randn(2, 3, length, d, dtype=dtype, requires_grad=True) for length in lengths]


def row_weights(scores: Tensor, k: int, beta: float | None) -> Tensor:
    """Weights of one query over its own keys: softmax of the k largest, or of scores plus the log of a soft mask."""
    weights, own = torch.zeros_like(scores), (scores > -torch.inf).nonzero()[:, 0]
    if len(own) == 0:
        return weights
    k = min(k, len(own))
    if beta is None:
        own = own[scores[own].argsort(descending=True)[:k]]
        return weights.index_put((own,), scores[own].softmax(0))
    mask = spartan.soft_topk(scores[own], float(k), beta=beta, backend="reference")
    return weights.index_put((own,), (scores[own] + mask.log()).softmax(0))


def expected(
    query: Tensor, key: Tensor, value: Tensor, shares: dict[int, float], allowed: Tensor | None, beta: float | None
) -> Tensor:
    scores = torch.einsum("nhqd,nhtd->nhqt", query, key) / query.shape[-1] ** 0.5
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    rows = scores.flatten(0, 2).unbind()
    weights = torch.stack([sum(share * row_weights(row, k, beta) for k, share in shares.items()) for row in rows])
    return torch.einsum("nhqt,nhtd->nhqd", weights.view(scores.shape), value)


def assert_same(found: Tensor, wanted: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(found, wanted)
    grad = torch.randn_like(found)
    for a, b in zip(torch.autograd.grad(found, inputs, grad), torch.autograd.grad(wanted, inputs, grad), strict=True):
        torch.testing.assert_close(a, b)


# 14 keys of 3 features are gathered, 13 keys of 5 are multiplied as a whole.
@pytest.mark.parametrize("beta", [None, 3.0], ids=["hard", "soft"])
@pytest.mark.parametrize(("t", "d", "k"), [(14, 3, 2), (13, 5, 4), (13, 5, 1), (6, 4, 9)])
def test_each_query_attends_to_its_k_largest_scores(t: int, d: int, k: int, beta: float | None) -> None:
    inputs = operands(t, d, queries=7)
    assert_same(topk_attention(*inputs, k, beta=beta), expected(*inputs, {k: 1.0}, None, beta), inputs)


@pytest.mark.parametrize("beta", [None, 3.0], ids=["hard", "soft"])
@pytest.mark.parametrize(("t", "d"), [(12, 3), (11, 5)])
def test_masks_hold_and_short_rows_keep_all_their_keys(t: int, d: int, beta: float | None) -> None:
    inputs = operands(t, d)
    mask = torch.rand(2, 1, t, t) > 0.3
    mask[:, :, 1] = False  # a query without any key
    allowed = mask & torch.ones(t, t, dtype=torch.bool).tril()
    found = topk_attention(*inputs, 4, mask, is_causal=True, beta=beta)
    assert_same(found, expected(*inputs, {4: 1.0}, allowed, beta), inputs)
    assert not found[:, :, 1].any()
    added = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(topk_attention(*inputs, 4, added, is_causal=True, beta=beta), found)


@pytest.mark.parametrize("beta", [None, 3.0], ids=["hard", "soft"])
@pytest.mark.parametrize(("t", "d"), [(12, 2), (9, 4)])
def test_several_k_are_mixed(t: int, d: int, beta: float | None) -> None:
    inputs = operands(t, d)
    mixture = torch.randn(3, dtype=torch.float64, requires_grad=True)
    causal = torch.ones(t, t, dtype=torch.bool).tril()
    found = topk_attention(*inputs, (3, 1, 5), is_causal=True, beta=beta, mixture=mixture)
    shares = dict(zip((3, 1, 5), mixture.softmax(0), strict=True))
    assert_same(found, expected(*inputs, shares, causal, beta), [*inputs, mixture])
    equal = topk_attention(*inputs, (3, 1, 5), is_causal=True, beta=beta)
    torch.testing.assert_close(equal, expected(*inputs, dict.fromkeys((3, 1, 5), 1 / 3), causal, beta))


@pytest.mark.parametrize("beta", [None, 2.0], ids=["hard", "soft"])
def test_k_of_all_keys_is_dense_attention(beta: float | None) -> None:
    inputs = operands(12, 4)
    found = topk_attention(*inputs, 12, is_causal=True, scale=0.3, beta=beta)
    assert_same(found, F.scaled_dot_product_attention(*inputs, is_causal=True, scale=0.3), inputs)


def test_a_sharp_soft_mask_is_the_hard_one() -> None:
    inputs = operands(20, 4)
    torch.testing.assert_close(topk_attention(*inputs, 3, beta=1e6), topk_attention(*inputs, 3))


def test_straight_through_has_the_hard_output_and_gradients_of_all_keys() -> None:
    query, key, value = operands(20, 4, queries=1)
    hard = topk_attention(query, key, value, 3)
    found = topk_attention(query, key, value, 3, beta=2.0, straight_through=True)
    torch.testing.assert_close(found, hard)
    (of_hard,) = torch.autograd.grad(hard.sum(), key)
    (of_found,) = torch.autograd.grad(found.sum(), key)
    assert (of_hard.abs().sum(-1) > 0).sum(-1).unique().tolist() == [3]
    assert (of_found.abs().sum(-1) > 0).all()


def test_dropout_drops_weights() -> None:
    inputs = operands(20, 4)
    torch.manual_seed(0)
    dropped = torch.stack([topk_attention(*inputs, 1, dropout_p=0.5) for _ in range(8)])
    whole = topk_attention(*inputs, 1)
    kept = dropped.abs().sum(-1) > 0
    assert 0.4 < kept.double().mean() < 0.6
    torch.testing.assert_close(dropped, 2 * whole * kept.unsqueeze(-1))


def test_the_layer_projects_attends_and_projects() -> None:
    torch.manual_seed(0)
    layer = TopKAttention(12, 3, (2, 4), causal=True).double()
    x = torch.randn(2, 9, 12, dtype=torch.float64, requires_grad=True)
    heads = [p(x).view(2, 9, 3, 4).permute(0, 2, 1, 3) for p in (layer.query, layer.key, layer.value)]
    attended = expected(*heads, {2: 0.5, 4: 0.5}, torch.ones(9, 9, dtype=torch.bool).tril(), None)
    assert_same(layer(x), layer.projection(attended.permute(0, 2, 1, 3).reshape(2, 9, 12)), [x])


@pytest.mark.parametrize("form", ["none", "bool", "float"])
def test_padding_of_a_context_has_no_part(form: str) -> None:
    layer = TopKAttention(8, 2, 3).double()
    x, context = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 7, 8, dtype=torch.float64)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[:, 4:] = True
    masks = {"none": None, "bool": torch.ones(5, 7, dtype=torch.bool), "float": torch.zeros(5, 7, dtype=torch.float64)}
    torch.testing.assert_close(layer(x, context, masks[form], key_padding_mask=padding), layer(x, context[:, :4]))


@pytest.mark.parametrize("beta", [None, 2.0], ids=["hard", "soft"])
def test_it_compiles_as_one_graph(beta: float | None) -> None:
    torch._dynamo.reset()
    layer = TopKAttention(8, 2, (2, 3), causal=True, beta=beta, straight_through=beta is not None)
    x = torch.randn(2, 40, 8, requires_grad=True)
    found = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, layer(x))
    (a,), (b,) = (torch.autograd.grad(y.square().sum(), x) for y in (found, layer(x)))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("beta", [None, 2.0], ids=["hard", "soft"])
def test_autocast_keeps_the_weights_in_float32(beta: float | None) -> None:
    layer = TopKAttention(16, 2, 16, beta=beta)  # all keys: rounding selects no others
    x = torch.randn(2, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), layer(x), atol=0.03, rtol=0.03)
    found.float().sum().backward()
    assert layer.query.weight.grad is not None


def test_copies_and_saved_layers_compute_the_same(tmp_path: Path) -> None:
    layer = TopKAttention(8, 2, (2, 3), beta=1.5)
    torch.nn.init.normal_(layer.mixture)
    x = torch.randn(2, 6, 8)
    spartan.save_pretrained(layer, tmp_path)
    loaded = spartan.load_pretrained(TopKAttention(8, 2, (2, 3), beta=1.5), tmp_path)
    other = TopKAttention(8, 2, (2, 3), beta=1.5)
    other.load_state_dict(layer.state_dict())
    for same in (copy.deepcopy(layer), loaded, other):
        assert torch.equal(same(x), layer(x))


def test_bad_arguments_are_refused() -> None:
    query, key, value = (torch.randn(1, 2, 5, 4) for _ in range(3))
    for k in (0, (), (2, 0)):
        with pytest.raises(ValueError, match="k must be at least 1"):
            topk_attention(query, key, value, k)
    with pytest.raises(ValueError, match="needs beta"):
        topk_attention(query, key, value, 2, straight_through=True)
    with pytest.raises(ValueError, match=r"mixture must be \[2\], .*\[3\]"):
        topk_attention(query, key, value, (1, 2), mixture=torch.zeros(3))
    with pytest.raises(ValueError, match=r"attn_mask must broadcast to \[1, 2, 5, 5\]; .*\[3, 1, 5, 5\]"):
        topk_attention(query, key, value, 2, torch.zeros(3, 1, 5, 5))
    with pytest.raises(ValueError, match=r"must be \[n, heads, tokens, dim\]"):
        topk_attention(query[0], key[0], value[0], 2)
    with pytest.raises(ValueError, match="same n and heads"):
        topk_attention(query, key[:, :1], value, 2)
    with pytest.raises(ValueError, match="tokens of value"):
        topk_attention(query, key, value[:, :, :3], 2)
    with pytest.raises(ValueError, match="one dtype"):
        topk_attention(query, key, value.double(), 2)


def test_masks_of_integers_and_causal_queries_of_another_number_are_refused() -> None:
    query, key = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4)
    with pytest.raises(ValueError, match=r"attn_mask must be bool or floating; got torch\.int64"):
        topk_attention(query, key, key, 2, torch.ones(3, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="is_causal needs as many queries as keys; got 3 queries, 5 keys"):
        topk_attention(query, key, key, 2, is_causal=True)


def test_a_bad_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="dim 10, heads 3"):
        TopKAttention(10, 3, 2)
    with pytest.raises(ValueError, match="k must be at least 1"):
        TopKAttention(8, 2, 0)
    with pytest.raises(ValueError, match="needs beta"):
        TopKAttention(8, 2, 2, straight_through=True)
    layer = TopKAttention(8, 2, 2)
    with pytest.raises(ValueError, match=r"x must be \[n, tokens, 8\]; got shape \[5, 8\]"):
        layer(torch.randn(5, 8))
    with pytest.raises(ValueError, match=r"context must be \[n, tokens, 8\]"):
        layer(torch.randn(1, 5, 8), torch.randn(1, 5, 7))
    with pytest.raises(ValueError, match=r"key_padding_mask must be torch.bool \[1, 5\]; got torch.float32 \[1, 5\]"):
        layer(torch.randn(1, 5, 8), key_padding_mask=torch.zeros(1, 5))


def test_the_example_runs(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "examples" / "layers" / "topk_attention.py", "--quick", "--out", tmp_path]
    path = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    shown = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert (tmp_path / "topk_attention.json").exists() and (tmp_path / "topk_attention.png").exists()
