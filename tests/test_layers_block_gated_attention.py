"""Attention to gated blocks against dense attention under the mask of these blocks; gates, their target, their loss."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spartan
from spartan.layers import BlockGate, BlockGatedAttention, block_gated_attention, block_maxima, gathered_blocks
from spartan.layers.block_gates import distillation
from spartan.layers.flex_blocks import attend_flex, block_mask
from spartan.training.models import Attention
from tests.pages import ROOT

# tokens, block, k: whole blocks and a ragged last one, k of 1, of some, of all but one and of all.
SHAPES = [(48, 8, 3), (50, 8, 3), (33, 16, 1), (41, 8, 5), (24, 8, 3), (5, 8, 2)]


def operands(t: int, queries: int | None = None, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(2, 3, length, 8, dtype=dtype, requires_grad=True) for length in (queries or t, t, t)]


def random_gates(queries: int, t: int, block: int) -> Tensor:
    return torch.randn(2, 3, -(-queries // block), -(-t // block))


def kept_blocks(gates: Tensor, k: int, causal: bool) -> Tensor:
    """By a loop over rows: the diagonal block and the best before it, or the best of all."""
    kept = torch.zeros_like(gates, dtype=torch.bool)
    for n, head, row in torch.cartesian_prod(*(torch.arange(size) for size in gates.shape[:3])).tolist():
        ranked = gates[n, head, row, : row if causal else None].argsort(descending=True)
        chosen = [*ranked[: k - causal].tolist(), *([row] if causal else [])]
        kept[n, head, row, chosen] = True
    return kept


def token_mask(kept: Tensor, block: int, queries: int, t: int, causal: bool) -> Tensor:
    mask = kept.repeat_interleave(block, 2).repeat_interleave(block, 3)[:, :, :queries, :t]
    return mask & torch.ones(t, t, dtype=torch.bool).tril() if causal else mask


def assert_same(found: Tensor, wanted: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(found, wanted)
    grad = torch.randn_like(found)
    for a, b in zip(torch.autograd.grad(found, inputs, grad), torch.autograd.grad(wanted, inputs, grad), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize(("t", "block", "k"), SHAPES)
def test_attention_is_dense_within_the_kept_blocks(t: int, block: int, k: int, causal: bool) -> None:
    inputs, gates = operands(t), random_gates(t, t, block)
    mask = token_mask(kept_blocks(gates, k, causal), block, t, t, causal)
    wanted = F.scaled_dot_product_attention(*inputs, attn_mask=mask, scale=0.4)
    assert_same(block_gated_attention(*inputs, gates, k, block, causal, scale=0.4), wanted, inputs)


def test_queries_and_keys_may_differ_in_number() -> None:
    inputs, gates = operands(45, queries=19), random_gates(19, 45, 8)
    mask = token_mask(kept_blocks(gates, 2, False), 8, 19, 45, False)
    wanted = F.scaled_dot_product_attention(*inputs, attn_mask=mask)
    assert_same(block_gated_attention(*inputs, gates, 2, 8), wanted, inputs)


def test_parts_of_any_size_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, gates = operands(50), random_gates(50, 50, 8)
    whole = block_gated_attention(*inputs, gates, 3, 8, True)
    monkeypatch.setattr(gathered_blocks, "_GATHERED_BYTES", 5 * 3 * 8 * 8 * 8)  # five query blocks at a time
    parts = block_gated_attention(*inputs, gates, 3, 8, True)
    assert_same(parts, whole, inputs)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize(("t", "block", "k"), SHAPES[:4])
def test_the_block_mask_of_flex_attention_says_the_same(t: int, block: int, k: int, causal: bool) -> None:
    inputs = [x.detach() for x in operands(t, dtype=torch.float32)]
    gates = random_gates(t, t, block)
    kept = kept_blocks(gates, k, causal)
    found = block_mask(gates, k, block, causal, (t, t))
    assert torch.equal(found.to_dense().bool(), kept)
    if causal:  # the diagonal alone is masked within
        assert torch.equal(found.kv_num_blocks, torch.ones_like(found.kv_num_blocks))
        assert torch.equal(found.kv_indices[..., 0], torch.arange(kept.shape[-1]).expand(kept.shape[:3]).int())
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", UserWarning)  # that it is not compiled
        attended = attend_flex(*inputs, gates, k, block, causal, None)
    wanted = F.scaled_dot_product_attention(*inputs, attn_mask=token_mask(kept, block, t, t, causal))
    torch.testing.assert_close(attended, wanted)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("t", [48, 43, 7])
def test_block_maxima_are_those_of_the_whole_map(t: int, causal: bool) -> None:
    query, key, _ = operands(t)
    scores = torch.einsum("nhqd,nhkd->nhqk", query, key) / 8**0.5
    if causal:
        scores = scores.masked_fill(~torch.ones(t, t, dtype=torch.bool).tril(), -torch.inf)
    weights, blocks = scores.softmax(-1), -(-t // 8)
    wanted = torch.empty(2, 3, blocks, blocks, dtype=torch.float64)
    for i in range(blocks):
        for j in range(blocks):
            wanted[:, :, i, j] = weights[:, :, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8].amax((-2, -1))
    torch.testing.assert_close(block_maxima(query, key, 8, causal), wanted)


@pytest.mark.parametrize("t", [24, 27, 5])
def test_gates_compare_pooled_blocks(t: int) -> None:
    gate = BlockGate(3, 8, block=8).double()
    for weight in gate.parameters():
        nn.init.normal_(weight)
    query, key, _ = operands(t)

    def pooled(x: Tensor) -> Tensor:
        parts = x.split(8, -2)
        return torch.stack([torch.cat([p.mean(-2), p.max(-2).values, p.min(-2).values], -1) for p in parts], -2)

    left = torch.einsum("nhbf,hfg->nhbg", pooled(query), gate.query)
    right = torch.einsum("nhbf,hfg->nhbg", pooled(key), gate.key)
    wanted = torch.einsum("nhig,nhjg->nhij", left, right) / 8**0.5
    assert_same(gate(query, key), wanted, [query, key, *gate.parameters()])


def test_untrained_gates_are_products_of_means() -> None:
    query, key, _ = operands(24)
    means = [x.unflatten(-2, (3, 8)).mean(-2) for x in (query, key)]
    torch.testing.assert_close(BlockGate(3, 8, 8).double()(query, key), means[0] @ means[1].mT / 8**0.5)


def test_the_loss_is_a_divergence_over_blocks_that_may_be_kept() -> None:
    gates = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    maxima = torch.rand(1, 2, 4, 4, dtype=torch.float64).tril()
    wanted = torch.zeros((), dtype=torch.float64)
    for head in range(2):
        for i in range(4):
            target = maxima[0, head, i, : i + 1] / maxima[0, head, i, : i + 1].sum()
            wanted = wanted + (target * (target.log() - gates[0, head, i, : i + 1].log_softmax(0))).sum() / 8
    assert_same(distillation(gates, maxima, is_causal=True), wanted, [gates])
    assert distillation((maxima + 1e-300).log(), maxima, is_causal=True).abs() < 1e-12


def test_a_block_whose_weights_vanish_is_pushed_down() -> None:
    gates = torch.zeros(1, 1, 2, 3, requires_grad=True)
    distillation(gates, torch.tensor([[[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]]])).backward()
    assert gates.grad is not None and (gates.grad[0, 0, :, 2] > 0).all()


def test_distillation_teaches_the_gate_alone_and_finds_the_blocks() -> None:
    torch.manual_seed(0)
    layer = BlockGatedAttention(16, 2, None, block=4, causal=True)
    with torch.no_grad():
        layer.query.weight.mul_(6)
    x = torch.randn(4, 32, 16)
    optimizer = torch.optim.Adam(layer.gate.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        loss = layer.distillation_loss(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is None for name, p in layer.named_parameters() if not name.startswith("gate"))


def test_without_k_the_layer_is_the_attention_it_was_made_of() -> None:
    x = torch.randn(2, 20, 12)
    attention = Attention(12, 3, causal=True)
    layer = BlockGatedAttention.from_attention(attention, None, block=4)
    assert layer.causal
    torch.testing.assert_close(layer(x), attention(x))
    layer.k = 5  # all blocks
    torch.testing.assert_close(layer(x), attention(x))
    layer.k = 2
    assert not torch.allclose(layer(x), attention(x))


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_made_of_a_multihead_attention(bias: bool) -> None:
    attention = nn.MultiheadAttention(12, 3, bias=bias, batch_first=True).eval()
    layer = BlockGatedAttention.from_attention(attention, None, block=4)
    x = torch.randn(2, 10, 12)
    torch.testing.assert_close(layer(x), attention(x, x, x)[0])
    assert not layer.training and not layer.causal


def test_it_compiles_as_one_graph() -> None:
    torch._dynamo.reset()
    layer = BlockGatedAttention(8, 2, 2, block=4, causal=True)
    x = torch.randn(2, 19, 8, requires_grad=True)
    found = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert_same(found, layer(x), [x])


def test_no_examples_at_all() -> None:
    layer = BlockGatedAttention(8, 2, 1, block=4, causal=True)
    assert layer(torch.zeros(0, 16, 8)).shape == (0, 16, 8)


def test_the_models_loss_asks_no_gradient_of_the_gates() -> None:
    layer = BlockGatedAttention(8, 2, 1, block=4, causal=True)
    layer.gate.requires_grad_(False)
    layer(torch.randn(1, 16, 8)).sum().backward()
    assert all(p.grad is not None for p in layer.parameters() if p.requires_grad)


@pytest.mark.parametrize(("heads", "bias"), [(4, True), (2, False)], ids=["heads", "biases"])
def test_projections_that_do_not_fit_are_refused(heads: int, bias: bool) -> None:
    layer = BlockGatedAttention(8, 2, 1)
    with pytest.raises(ValueError, match="attention must have"):
        layer.copy_projections(nn.MultiheadAttention(8, heads, bias=bias, batch_first=True))


def test_it_runs_under_autocast() -> None:
    layer = BlockGatedAttention(16, 2, 2, block=8, causal=True)
    x = torch.randn(2, 40, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found, loss = layer(x), layer.distillation_loss(x)
    assert found.dtype == torch.bfloat16 and loss.dtype == torch.float32
    found.float().sum().backward()
    weights = layer.query.weight.grad
    assert weights is not None and weights.isfinite().all()
    query, key, value = (y.detach().float().requires_grad_() for y in operands(40))
    gates = random_gates(40, 40, 8)
    with torch.autocast("cpu", torch.bfloat16):
        half = block_gated_attention(query, key, value, gates, 2, 8, True)
    torch.testing.assert_close(
        half.float(), block_gated_attention(query, key, value, gates, 2, 8, True), atol=0.05, rtol=0.05
    )
    half.float().sum().backward()
    assert query.grad is not None


def test_copies_and_saved_layers_compute_the_same(tmp_path: Path) -> None:
    layer = BlockGatedAttention(8, 2, 2, block=4)
    nn.init.normal_(layer.gate.query)
    x = torch.randn(2, 18, 8)
    spartan.save_pretrained(layer, tmp_path)
    loaded = spartan.load_pretrained(BlockGatedAttention(8, 2, 2, block=4), tmp_path)
    for same in (copy.deepcopy(layer), loaded):
        assert torch.equal(same(x), layer(x))


def test_bad_arguments_are_refused() -> None:
    query, key, value = (torch.randn(1, 2, 16, 4) for _ in range(3))
    gates = torch.randn(1, 2, 4, 4)
    with pytest.raises(ValueError, match="got k 0, block 4"):
        block_gated_attention(query, key, value, gates, 0, 4)
    with pytest.raises(ValueError, match="got k 1, block 0"):
        block_gated_attention(query, key, value, gates, 1, 0)
    with pytest.raises(ValueError, match=r"gates must be \[1, 2, 2, 2\]; got shape \[1, 2, 4, 4\]"):
        block_gated_attention(query, key, value, gates, 1, 8)
    with pytest.raises(ValueError, match="got 12 queries, 16 keys"):
        block_gated_attention(query[:, :, :12], key, value, gates, 1, 4, is_causal=True)
    with pytest.raises(ValueError, match="same n and heads"):
        block_gated_attention(query, key[:, :1], value, gates, 1, 4)
    with pytest.raises(ValueError, match="k must be at least 1, or None; got 0"):
        BlockGatedAttention(8, 2, 0)
    with pytest.raises(ValueError, match="dim 8, heads 3"):
        BlockGatedAttention(8, 3, 1)
    with pytest.raises(ValueError, match="got 2, 4, 0"):
        BlockGatedAttention(8, 2, 1, block=0)


@pytest.mark.parametrize(
    "attention", [nn.Linear(4, 4), nn.MultiheadAttention(4, 2), nn.MultiheadAttention(4, 2, kdim=3, batch_first=True)]
)
def test_attention_of_another_kind_is_refused(attention: nn.Module) -> None:
    with pytest.raises(TypeError, match=f"got {type(attention).__name__}"):
        BlockGatedAttention.from_attention(attention, 2)


def test_attention_that_hides_its_heads_is_refused() -> None:
    attention = nn.ModuleDict({"query_key_value": nn.Linear(4, 12), "projection": nn.Linear(4, 4)})
    attention.query_key_value, attention.projection = attention["query_key_value"], attention["projection"]
    with pytest.raises(TypeError, match="number of heads as num_heads or heads"):
        BlockGatedAttention.from_attention(attention, 2)


def test_the_example_runs(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "examples" / "layers" / "block_gated_attention.py", "--quick", "--out", tmp_path]
    path = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    shown = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    for stem in ("block_gated_attention", "block_gated_attention_time"):
        assert (tmp_path / f"{stem}.json").exists() and (tmp_path / f"{stem}.png").exists()
