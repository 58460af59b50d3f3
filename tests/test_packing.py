"""Which layers run on packed blocks, what is said of the others, and what becomes of packed layers elsewhere."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import spartan
from spartan.nn import BlockSparseLinear
from spartan.saving import packing
from spartan_kernels import BlockSparseWeight, break_even
from spartan_kernels.break_even import Crossing

pytestmark = pytest.mark.usefixtures("one_thread")


MANY = 1 << 16  # tokens, so that small layers are worth packing
COMPILED = spartan.info()["native"]["available"]  # whose kernels multiply by single weights and by columns of few


class Conv1D(nn.Module):
    """Stands for that of Hugging Face's transformers: y = x w + b with w of shape [in, out]."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y, shaped like x but for the last dimension."""
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], self.nf)


def drop_blocks(weight: torch.Tensor, side: int, kept: float) -> None:
    grid = torch.rand(weight.shape[0] // side, weight.shape[1] // side) < kept
    with torch.no_grad():
        weight.mul_(grid.repeat_interleave(side, 0).repeat_interleave(side, 1))


def feed_forward(side: int = 16, kept: float = 0.3) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(64, 32), nn.GELU(), Conv1D(32, 64), nn.Linear(32, 48))
    for layer in (model[0], model[2], model[3]):
        drop_blocks(layer.weight, side, kept)
    return model


def rows(model: nn.Module, **arguments: object) -> dict[str, tuple[object, str | None]]:
    report = spartan.packing_report(model, **{"tokens": MANY, **arguments})  # type: ignore[arg-type]
    return {row.name: (row.block_size, row.reason) for row in report.rows}


# ------------------------------------------------------------------------------------------ transformers' Conv1D


def test_layers_stored_by_inputs_are_packed_and_compute_the_same() -> None:
    model = feed_forward()
    x = torch.randn(5, 3, 32)
    expected = model(x)
    assert {size for size, _ in rows(model).values()} == {(16, 16)}
    spartan.to_block_sparse(model, tokens=MANY)
    assert [type(model[i]) for i in (0, 2, 3)] == [BlockSparseLinear] * 3
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert model[0].weight.shape == (32, 64)
    spartan.to_block_sparse(model := feed_forward(), (16, 8))  # outputs x inputs
    assert model[0].block_size == (16, 8)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_training_by_blocks_multiplies_only_kept_blocks_of_layers_stored_by_inputs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In value and gradient as a plain copy with its weights masked, through the product of blocks."""
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(64, 32), nn.GELU(), Conv1D(32, 64))
    plain = copy.deepcopy(model)
    sparsifier = spartan.Sparsifier(model, spartan.StaticRandom(sparsity=0.7, block_size=(16, 8)), 4, count="masked")
    for name, mask in sparsifier.masks().items():
        with torch.no_grad():
            plain.get_parameter(name).mul_(mask.hard.repeat_interleave(8, 0).repeat_interleave(16, 1))
    seen = []
    kept = spartan.nn.modules.masked_linear
    monkeypatch.setattr(spartan.nn.modules, "masked_linear", lambda *a, **k: seen.append(a[3]) or kept(*a, **k))
    x = torch.randn(7, 32)
    y, expected = model(x), plain(x)
    assert seen == [(16, 8)] * 2
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    expected.backward(upstream)
    for (name, got), want in zip(model.named_parameters(), plain.parameters(), strict=True):
        mask = sparsifier.masks().get(name)
        keep = 1.0 if mask is None else mask.hard.repeat_interleave(8, 0).repeat_interleave(16, 1)
        assert got.grad is not None and want.grad is not None
        torch.testing.assert_close(got.grad, want.grad * keep, rtol=1e-5, atol=1e-5)


def test_packed_layers_stored_by_inputs_are_saved_and_loaded(tmp_path: Path) -> None:
    model = spartan.to_block_sparse(feed_forward(), tokens=MANY)
    x = torch.randn(5, 32)
    spartan.save_pretrained(model, tmp_path / "packed")
    spartan.save_pretrained(model, tmp_path / "dense", dense=True)
    for fresh in (
        feed_forward(8, 0.5),
        spartan.to_block_sparse(feed_forward(8, 0.5), tokens=MANY),
        copy.deepcopy(model),
    ):
        loaded = spartan.load_pretrained(fresh, tmp_path / "packed")
        assert [type(loaded[i]) for i in (0, 2, 3)] == [BlockSparseLinear] * 3
        assert torch.equal(loaded(x), model(x))
    assert {k: v.shape for k, v in load_file(tmp_path / "dense" / "model.safetensors").items()} == {
        k: v.shape for k, v in feed_forward().state_dict().items()
    }
    plain = spartan.load_pretrained(feed_forward(8, 0.5), tmp_path / "dense")
    assert type(plain[0]) is Conv1D
    torch.testing.assert_close(plain(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", [(8, 8), (5, 7)])
def test_the_transpose_of_a_packed_weight_is_that_of_its_dense_one(block: tuple[int, int]) -> None:
    torch.manual_seed(0)
    mask = torch.rand(-(-33 // block[0]), -(-26 // block[1])) < 0.4
    packed = BlockSparseWeight.from_dense(torch.randn(33, 26), block, mask)
    turned = packed.transposed()
    assert (turned.shape, turned.block_size) == ((26, 33), block[::-1])
    assert torch.equal(turned.to_dense(), packed.to_dense().mT)
    assert torch.equal(turned.layout.mask(), packed.layout.mask().mT)
    assert torch.equal(turned.transposed().values, packed.values)


def test_packed_layers_become_the_dense_ones_that_they_were() -> None:
    model = feed_forward()
    model[3].bias.requires_grad_(False)
    before = copy.deepcopy(model)
    undone = spartan.to_dense(spartan.to_block_sparse(model, tokens=MANY))
    assert [type(module) for module in undone.modules()] == [type(module) for module in before.modules()]
    for (name, value), other in zip(undone.named_parameters(), before.named_parameters(), strict=True):
        assert name == other[0] and torch.equal(value, other[1]) and value.requires_grad == other[1].requires_grad
    x = torch.randn(5, 32)
    assert torch.equal(undone(x), before(x))
    single = spartan.to_dense(spartan.to_block_sparse(feed_forward()[3], 16))
    assert type(single) is nn.Linear and torch.equal(single.weight, before[3].weight)


# ------------------------------------------------------------------------------------- what is left, and why


class Subclass(nn.Linear):
    """A class of its own."""


def test_layers_that_are_not_packed_are_named_with_the_reason() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(32, 2)
    shared = nn.Linear(32, 32, bias=False)
    model = nn.ModuleDict(
        {
            "attention": attention,
            "own": Subclass(32, 32),
            "first": shared,
            "second": nn.Linear(32, 32, bias=False),
            "hooked": nn.Linear(32, 32),
            "full": nn.Linear(32, 32),
            "conv": nn.Conv1d(32, 32, 1),
            "packed": nn.Linear(32, 32),
            "table": nn.Embedding(32, 32),
        }
    )
    model["second"].weight = shared.weight
    model["hooked"].register_forward_hook(lambda *_: None)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and not name.startswith("full"):
            drop_blocks(parameter, 16, 0.0)
    expected = {
        "attention.in_proj_weight": "MultiheadAttention reads its weights itself",
        "attention.out_proj.weight": "MultiheadAttention reads its weights itself",
        "own.weight": "Subclass is a class of its own",
        "first.weight": "it is shared with second.weight",
        "hooked.weight": "its layer has hooks",
        "full.weight": "it has no zeros" if COMPILED else "no block of 8 x 8 is all zeros",
        "conv.weight": "it is of a Conv1d, not of a Conv2d",
        "packed.weight": None,
    }
    assert {name: reason for name, (_, reason) in rows(model).items()} == expected
    with pytest.warns(UserWarning, match=r"blocks of zeros but are multiplied densely: .*in_proj_weight \(Multihead"):
        spartan.to_block_sparse(model, tokens=MANY)
    assert {name: reason for name, (_, reason) in rows(model).items()} == expected
    assert isinstance(model["packed"], BlockSparseLinear) and type(model["own"]) is Subclass
    shown = str(spartan.packing_report(model, tokens=MANY))
    assert "1 of 8 weights in packed blocks" in shown and "Subclass is a class of its own" in shown


def test_the_training_report_names_products_that_are_dense_though_masked_by_blocks() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(32, 2, 64), nn.Linear(32, 32), Conv1D(32, 32), nn.Linear(32, 2))
    sparsifier = spartan.Sparsifier(model, spartan.OneShot(sparsity=0.2, block_size=8), 4)
    report = sparsifier.report()
    assert report.dense_products == {
        "0.self_attn.in_proj_weight": "MultiheadAttention",
        "0.self_attn.out_proj.weight": "NonDynamicallyQuantizableLinear",
        "0.linear1.weight": "Linear",
        "0.linear2.weight": "Linear",
    }
    assert "multiplied densely, blocks or not (by MultiheadAttention): 0.self_attn.in_proj_weight" in str(report)


# ------------------------------------------------------------------------ never slower, never larger: the choice


def single_weights(sparsity: float) -> nn.Sequential:
    """A layer whose zeros lie one by one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256))
    with torch.no_grad():
        model[0].weight.mul_(torch.rand(256, 256) > sparsity)
    return model


@pytest.mark.skipif(not COMPILED, reason="needs the compiled CPU kernels")
@pytest.mark.parametrize("sparsity", [0.85, 0.9, 0.95, 0.97])
def test_zeros_that_lie_one_by_one_are_packed_as_single_weights(sparsity: float) -> None:
    model = single_weights(sparsity)
    x, dense = torch.randn(300, 256), copy.deepcopy(model)
    (row,) = spartan.packing_report(model, tokens=300).rows
    assert row.block_size == (1, 1) and row.reason is None
    assert (
        row.speedup is not None
        and row.speedup > 1
        and f"{row.speedup:.1f}" in str(spartan.packing_report(model, tokens=300))
    )
    spartan.to_block_sparse(model, tokens=300)
    torch.testing.assert_close(model(x), dense(x), rtol=1e-5, atol=1e-5)
    stored = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert stored < sum(tensor.nbytes for tensor in dense.parameters())


@pytest.mark.parametrize("sparsity", [0.3, 0.6])
def test_a_layer_of_few_zeros_stays_dense(sparsity: float) -> None:
    model = single_weights(sparsity)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spartan.to_block_sparse(model)
    assert type(model[0]) is nn.Linear
    assert "the dense product is faster" in str(rows(model)["0.weight"][1]) or "no block" in str(rows(model))


def test_a_gpu_takes_single_weights_for_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Triton serves them, which multiplies few tokens with single weights by a kernel of its own."""
    gpu, served = torch.device("cuda"), {"triton"}
    monkeypatch.setattr(packing, "refusal", lambda operator, name, *rest: None if name in served else "not here")
    assert packing._narrow(gpu, torch.bfloat16, 16) == ((1, 1),)
    assert packing._narrow(gpu, torch.bfloat16, 17) == ()
    served.clear()
    assert packing._narrow(gpu, torch.bfloat16, 1) == ()


def test_narrow_blocks_that_are_asked_for_are_packed_unless_measured_as_slower() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    torch.manual_seed(0)
    with torch.no_grad():
        model[0].weight.mul_((torch.rand(16, 64) < 0.6).repeat_interleave(4, 0))
    with break_even.using((Crossing("float32", 4, 1, False, 0.1),)):
        assert "the dense product is faster" in str(rows(model, block_size=(4, 1))["0.weight"][1])
    with break_even.using(()):
        assert rows(model, block_size=(4, 1), tokens=128)["0.weight"] == ((4, 1), None)


def test_blocks_that_are_faster_but_larger_are_not_packed() -> None:
    surface = tuple(Crossing("float32", *size, False, 0.9) for size in ((1, 1), (4, 1)))
    with break_even.using(surface):
        size, reason = rows(single_weights(0.6))["0.weight"]
    assert size is None and ("are larger: 1" in str(reason)) == COMPILED


@pytest.mark.parametrize("sparsity", [0.9, 0.95, 0.97])
def test_a_size_that_is_asked_for_is_packed_and_its_file_is_no_larger(sparsity: float, tmp_path: Path) -> None:
    model = single_weights(sparsity)
    spartan.save_pretrained(model, tmp_path / "plain")
    spartan.to_block_sparse(model, 8)
    assert isinstance(model[0], BlockSparseLinear)
    spartan.save_pretrained(model, tmp_path / "packed")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("plain", "packed")]
    assert sizes[1] <= sizes[0] + 200
    loaded = spartan.load_pretrained(nn.Sequential(nn.Linear(256, 256)), tmp_path / "packed")
    assert isinstance(loaded[0], BlockSparseLinear) and loaded[0].block_size == (8, 8)
    assert torch.equal(loaded[0].values, model[0].values)


def test_a_packed_block_of_zeros_survives_its_file(tmp_path: Path) -> None:
    """It is trained: what is saved by its values alone would lose it."""
    torch.manual_seed(0)
    weight = torch.zeros(64, 64)
    weight[0, 0] = 1.0
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[0, :3] = True
    model = nn.Sequential(BlockSparseLinear(BlockSparseWeight.from_dense(weight, 8, mask)))
    spartan.save_pretrained(model, tmp_path)
    loaded = spartan.load_pretrained(nn.Sequential(nn.Linear(64, 64, bias=False)), tmp_path)
    assert torch.equal(loaded[0].packed.layout.mask(), mask)


def test_the_block_is_the_one_whose_product_takes_least_time() -> None:
    """Blocks of 16 are not read as those of 8, which store no more but are slower, nor as 32, which store more."""
    torch.manual_seed(0)
    for side in (8, 16, 32, 64):
        model = nn.Sequential(nn.Linear(512, 512))
        drop_blocks(model[0].weight, side, 0.2)
        expected = (4, 1) if COMPILED and side == 8 else (side, side)
        assert rows(model)["0.weight"] == (expected, None)


def test_a_small_layer_is_packed_where_it_sees_enough_tokens_to_be_worth_a_call() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64))
    drop_blocks(model[0].weight, 16, 0.2)
    assert "is faster: " in str(rows(model, tokens=64)["0.weight"][1])
    assert rows(model, tokens=4096)["0.weight"] == ((16, 16), None)
    for tokens in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match=f"tokens must be an int of at least 1; got {tokens!r}"):
            spartan.to_block_sparse(model, tokens=tokens)  # type: ignore[arg-type]


def test_a_measured_machine_decides_by_its_measurements() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256))
    drop_blocks(model[0].weight, 16, 0.3)

    def surface(density: float | None) -> tuple[Crossing, ...]:
        sizes = (*((side, side) for side in (8, 16, 32, 64, 128)), (4, 1), (1, 1))
        return tuple(Crossing("float32", *size, False, density) for size in sizes)

    with break_even.using(surface(0.1)):
        assert "the dense product is faster" in str(rows(model)["0.weight"][1])
    with break_even.using(surface(0.9)):
        assert rows(model)["0.weight"] == ((16, 16), None)
    with break_even.using(surface(None)):  # never slower, at any density
        assert rows(model)["0.weight"] == ((16, 16), None)


# ---------------------------------------------------------------------------------------------------- ONNX


def test_a_packed_model_is_exported_to_onnx_and_computes_the_same(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    model = spartan.to_block_sparse(feed_forward(), tokens=MANY).eval()
    x = torch.randn(5, 32)
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    (got,) = reference.ReferenceEvaluator(str(tmp_path / "model.onnx")).run(None, {"input": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_what_an_onnx_graph_is_traced_from_is_made_of_known_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the exporter's packages: the same branch, through `torch.export`."""
    model = spartan.to_block_sparse(feed_forward(), tokens=MANY).eval()
    x = torch.randn(5, 32)
    expected = model(x)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    graph = torch.export.export(model, (x,))
    assert not [node for node in graph.graph.nodes if "spartan" in str(node.target)]
    torch.testing.assert_close(graph.module()(x), expected, rtol=1e-4, atol=1e-5)
