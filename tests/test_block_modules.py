"""Modules on block-sparse products: training through the moving mask, and packed inference."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import spartan
from spartan.nn import BlockSparseLinear, MaskedLinear, mask_weight
from spartan_kernels import expand_blocks


def masked(block_size: tuple[int, int], soft: bool, preserve_scale: bool, straight_through: bool) -> MaskedLinear:
    """A masked layer of ragged blocks with random masks."""
    torch.manual_seed(0)
    layer = nn.Linear(23, 17)
    carrier = mask_weight(layer, block_size, soft=soft, preserve_scale=preserve_scale)
    assert isinstance(carrier, MaskedLinear)
    if carrier.mask_soft is not None:
        carrier.mask_soft.copy_(torch.rand(carrier.mask_soft.shape))
    carrier.mask_hard.copy_(torch.rand(carrier.mask_hard.shape) < 0.5)
    carrier.mask_beta.fill_(3.0)
    if carrier.mask_scale is not None:
        carrier.mask_scale.fill_(2.5)
    carrier.mask_straight_through = straight_through
    carrier.masks_changed()
    return carrier


@pytest.mark.parametrize("block_size", [(4, 4), (8, 3), (1, 5)], ids=str)
@pytest.mark.parametrize(
    ("soft", "preserve_scale", "straight_through"),
    [(True, False, True), (True, True, True), (True, False, False), (False, False, False), (False, True, True)],
)
def test_masked_linear_learns_as_the_dense_product_of_its_masked_weight(
    block_size: tuple[int, int], soft: bool, preserve_scale: bool, straight_through: bool
) -> None:
    layer = masked(block_size, soft, preserve_scale, straight_through)
    x = torch.randn(5, 23, requires_grad=True)
    upstream = torch.randn(5, 17)
    leaves = (x, layer.weight, layer.bias)
    y = layer(x)
    expected = functional.linear(x, layer.masked(layer.weight), layer.bias)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    got = torch.autograd.grad(y, leaves, upstream)
    for ours, dense in zip(got, torch.autograd.grad(expected, leaves, upstream), strict=True):
        torch.testing.assert_close(ours, dense, rtol=1e-5, atol=1e-5)


def block_linear(out: int, in_: int, side: int, density: float, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(in_, out, bias=bias)
    keep = torch.rand(-(-out // side), -(-in_ // side)) < density
    with torch.no_grad():
        layer.weight.mul_(expand_blocks(keep, layer.weight.shape, (side, side)))
    return layer


def pruned_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        block_linear(64, 48, 16, 0.3),
        nn.ReLU(),
        nn.Sequential(block_linear(40, 64, 8, 0.3, bias=False)),
        nn.Linear(40, 3),
    )


def test_to_block_sparse_computes_the_same() -> None:
    model = pruned_model()
    x = torch.randn(9, 48)
    expected = model(x)
    packed = spartan.to_block_sparse(model, tokens=1 << 16)
    assert packed is model and [type(m) for m in (model[0], model[2][0], model[3])] == [
        BlockSparseLinear,
        BlockSparseLinear,
        nn.Linear,
    ]
    narrow = (4, 1) if spartan.info()["native"]["available"] else (8, 8)
    assert (model[0].block_size, model[2][0].block_size) == ((16, 16), narrow)
    assert "density=0." in repr(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    single = spartan.to_block_sparse(block_linear(16, 16, 8, 0.0), 8)
    assert isinstance(single, BlockSparseLinear) and torch.equal(single(torch.ones(2, 16)), single.bias.expand(2, 16))


def test_packed_modules_save_copy_train_and_export() -> None:
    model = spartan.to_block_sparse(pruned_model(), (8, 8))
    x = torch.randn(9, 48)
    fresh = copy.deepcopy(model)
    for parameter in fresh.parameters():
        nn.init.zeros_(parameter)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    exported = torch.export.export(fresh, (x,), dynamic_shapes=({0: torch.export.Dim("tokens", min=2)},))
    torch.testing.assert_close(exported.module()(x[:4]), fresh(x[:4]), rtol=1e-6, atol=1e-6)
    compiled = torch.compile(fresh, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), fresh(x), rtol=1e-6, atol=1e-6)


def test_a_transformer_layer_keeps_its_fast_path() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True).eval()
    with torch.no_grad():
        layer.linear1.weight[:16] = 0
    x = torch.randn(2, 5, 32)
    with torch.inference_mode():
        expected = layer(x)
        got = spartan.to_block_sparse(layer, 16)(x)
    assert isinstance(layer.linear1, BlockSparseLinear)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_masked_model_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    mask_weight(model[0], (4, 4), soft=True)
    with pytest.raises(ValueError, match=r"masked at '0'.*finalize"):
        spartan.to_block_sparse(model)


def test_sparsifier_to_packed_blocks() -> None:
    """From training on blocks to packed inference, with the sparsity asked for."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32))
    method = spartan.Spartan(sparsity=0.5, block_size=(16, 16))
    sparsifier = spartan.Sparsifier(model, method, total_steps=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsifier.attach(optimizer)
    x, y = torch.randn(64, 64), torch.randn(64, 32)

    def loss() -> Tensor:
        return functional.mse_loss(model(x), y)

    first = loss().item()
    for _ in range(10):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    sparsifier.finalize()
    expected, kept = model(x), int((model[0].weight != 0).sum())
    assert loss().item() < first and kept < 0.3 * 96 * 64
    spartan.to_block_sparse(model, tokens=1 << 16)
    assert isinstance(model[0], BlockSparseLinear) and model[0].values.numel() <= 1.1 * kept
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
