"""TopKAutoencoder against dense products: by row and by batch, with gradients, sampled, with dead features."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import spartan
from spartan.layers import TopKAutoencoder, downstream_gradient

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("one_thread")


def made(seed: int = 0, rows: int = 11, **settings: Any) -> tuple[TopKAutoencoder, Tensor, Tensor]:
    """A layer of odd sizes, x and a gradient of it."""
    torch.manual_seed(seed)
    layer = TopKAutoencoder(9, 37, 4, **settings).double()
    with torch.no_grad():
        layer.bias.normal_(std=0.1)
        layer.center.normal_()
    return layer, torch.randn(rows, 9, dtype=torch.float64), torch.randn(rows, 9, dtype=torch.float64)


def dense(layer: TopKAutoencoder, x: Tensor, gradient: Tensor | None = None) -> Tensor:
    """Codes as the equations have them, by a sort of all scores."""
    z = ((x - layer.center) @ layer.encoder.T + layer.bias).clamp_min(0)
    scores = z if gradient is None else z * (gradient @ layer.decoder.T).abs()
    per_row, count = (scores, layer.k) if layer.by == "row" else (scores.reshape(1, -1), layer.k * len(x))
    order = per_row.argsort(dim=1, descending=True, stable=True)[:, :count]
    mask = torch.zeros_like(per_row).scatter(1, order, 1.0).view_as(z)
    return z * mask


@pytest.mark.parametrize("by", ["row", "batch"])
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_the_dense_product_with_its_gradients(by: str, weighted: bool) -> None:
    layer, x, g = made(by=by)
    gradient = g if weighted else None
    upstream = torch.randn_like(x)
    results = []
    for call in (lambda x: layer(x, gradient), lambda x: layer.decode(dense(layer, x, gradient))):
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        results.append([y, *torch.autograd.grad(y, [leaf, *layer.parameters()], upstream)])
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(layer.encode(x, gradient), dense(layer, x, gradient))
    shaped = layer(x[:10].view(2, 5, 9), None if gradient is None else g[:10].view(2, 5, 9))
    torch.testing.assert_close(
        shaped.view(10, 9), layer.decode(dense(layer, x[:10], None if gradient is None else g[:10]))
    )


def test_keeps_k_of_each_row_or_of_the_batch_on_average() -> None:
    layer, x, _ = made(rows=40)
    assert (layer.encode(x) > 0).sum(1).tolist() == [4] * 40
    layer, x, _ = made(rows=40, by="batch")
    kept = (layer.encode(x) > 0).sum(1)
    assert int(kept.sum()) == 160 and len(kept.unique()) > 1


def test_evaluation_by_batch_does_not_depend_on_the_batch() -> None:
    layer, x, g = made(rows=300, by="batch")
    least = dense(layer, x)[dense(layer, x) > 0].min()
    layer(x, g)  # the threshold is that of the codes, however they are weighed
    torch.testing.assert_close(layer.threshold, least)
    layer(x + 0.1)
    moved = dense(layer, x + 0.1)
    torch.testing.assert_close(layer.threshold, 0.95 * least + 0.05 * moved[moved > 0].min())
    layer.eval()
    before = layer.threshold.clone()
    together = layer(x)
    torch.testing.assert_close(together, torch.cat([layer(row[None]) for row in x]))
    torch.testing.assert_close(together, layer.decode(layer.encode(x)))
    assert torch.equal(before, layer.threshold)
    codes = layer.encode(x)
    assert (codes[codes > 0] >= before).all() and abs(float((codes > 0).sum()) / 300 - 4) < 0.5


def test_the_loss_has_the_parts_of_its_equation() -> None:
    layer, x, _ = made(sampled=True, revive=5, dead_after=100)
    layer.eval()  # codes are their means
    with torch.no_grad():
        layer.idle[10:] = 100
    found = layer.loss(x, auxiliary=0.3, divergence=0.2)
    mean = (x - layer.center) @ layer.encoder.T + layer.bias
    error = x - layer.decode(dense(layer, x))
    torch.testing.assert_close(found.reconstruction, error.square().sum() / (x - x.mean(0)).square().sum())
    z = mean.relu()[:, 10:]
    order = z.argsort(dim=1, descending=True, stable=True)[:, :5]
    revived = torch.zeros_like(z).scatter(1, order, z.gather(1, order)) @ layer.decoder[10:]
    torch.testing.assert_close(found.auxiliary, (error - revived).square().sum() / error.square().sum())
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(mean, layer.log_deviation.exp()), normal(0.0, 1.0))
    torch.testing.assert_close(found.divergence, kl.sum(1).mean())
    total = found.reconstruction + 0.3 * found.auxiliary + 0.2 * found.divergence
    torch.testing.assert_close(found.total, total)
    (of_decoder,) = torch.autograd.grad(found.auxiliary, layer.decoder, retain_graph=True)
    assert not of_decoder[:10].any() and of_decoder[10:].any()  # the dead ones alone, for the error is given
    for settings in ({"revive": 0}, {}):
        layer, x, _ = made(**settings)
        assert layer.loss(x).auxiliary == layer.loss(x).divergence == 0


def test_a_loss_of_one_row_is_refused() -> None:
    with pytest.raises(ValueError, match="the loss needs two rows at least"):
        TopKAutoencoder(4, 8, k=2).loss(torch.randn(1, 4))


def test_the_auxiliary_loss_revives_dead_features() -> None:
    dead = []
    for auxiliary in (0.0, 1.0):
        layer, x, _ = made(rows=64, dead_after=200, revive=8)
        optimizer = torch.optim.Adam(layer.parameters(), 0.02)
        for _ in range(100):
            layer.loss(x + 0.05 * torch.randn_like(x), auxiliary=auxiliary).total.backward()
            optimizer.step()
            optimizer.zero_grad()
            layer.normalize_decoder()
        dead.append(int(layer.dead().sum()))
        torch.testing.assert_close(layer.decoder.norm(dim=1), torch.ones(37, dtype=torch.float64))
    assert dead[1] < dead[0] / 2, dead


def test_idle_counts_rows() -> None:
    layer, x, _ = made()
    layer(x)
    used = (dense(layer, x) > 0).any(0)
    assert torch.equal(layer.idle, torch.where(used, 0, 11))
    layer(x[:2])
    layer.eval()(x)
    again = (dense(layer, x[:2]) > 0).any(0)
    assert torch.equal(layer.idle, torch.where(again, 0, torch.where(used, 2, 13)))
    assert not layer.dead().any()


def test_codes_are_sampled_in_training_alone() -> None:
    layer, x, _ = made(sampled=True)
    with torch.no_grad():
        layer.log_deviation.fill_(0.0)
    torch.manual_seed(1)
    one, other = layer(x), layer(x)
    assert not torch.allclose(one, other)
    loss = layer.loss(x)
    (of_deviation,) = torch.autograd.grad(loss.reconstruction, layer.log_deviation)
    assert of_deviation.any()
    layer.eval()
    torch.testing.assert_close(layer(x), layer.decode(dense(layer, x)))


def test_downstream_gradient_is_that_of_the_loss() -> None:
    x = torch.randn(5, 9)
    with torch.no_grad():
        found = downstream_gradient(lambda x: x.pow(3).sum(1), x)
    torch.testing.assert_close(found, 3 * x**2)
    assert not x.requires_grad


@pytest.mark.parametrize("by", ["row", "batch"])
def test_compiles_copies_saves_and_takes_autocast(by: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = TopKAutoencoder(16, 64, 5, by=by)
    x = torch.randn(32, 16)

    def run(layer: Any) -> list[Tensor]:
        loss = layer(x)
        return [loss.detach(), *torch.autograd.grad(loss.square().sum(), list(layer.parameters()))]

    copied = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled), run(copied))
    assert torch.equal(layer.idle, copied.idle) and torch.equal(layer.threshold, copied.threshold)
    torch.compile(layer.loss, fullgraph=True, backend="aot_eager")(x).total.backward()
    assert all(p.grad is not None for p in layer.parameters())
    layer.eval()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    other = TopKAutoencoder(16, 64, 5, by=by)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.eval()(x), layer(x))
    spartan.save_pretrained(torch.nn.Sequential(layer), tmp_path)
    loaded = spartan.load_pretrained(torch.nn.Sequential(TopKAutoencoder(16, 64, 5, by=by)), tmp_path).eval()
    assert torch.equal(loaded(x), layer(x))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = layer(x)
        assert layer.train().loss(x).total.dtype == torch.float32
    assert (mixed - layer.eval()(x)).square().mean() < 0.01 * x.square().mean()
    assert layer(x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 0}, "width must be at least 1; got 0"),
        ({"k": 0}, "k must be at least 1; got 0"),
        ({"dead_after": 0}, "dead_after must be at least 1; got 0"),
        ({"k": 9}, "k and revive must be at most the 8 features; got 9"),
        ({"revive": 9}, "k and revive must be at most the 8 features; got 2 and 9"),
        ({"by": "column"}, "by must be 'row' or 'batch'; got 'column'"),
    ],
    ids=str,
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TopKAutoencoder(**{"width": 4, "features": 8, "k": 2, **settings})


def test_bad_inputs_are_named() -> None:
    layer = TopKAutoencoder(4, 8, 2)
    with pytest.raises(ValueError, match=r"x must be \[..., 4\]; got \(3, 5\)"):
        layer(torch.zeros(3, 5))
    for call in (layer, layer.encode, layer.loss):
        with pytest.raises(ValueError, match=r"gradient must be \(3, 4\), as x is; got \(2, 4\)"):
            call(torch.zeros(3, 4), torch.zeros(2, 4))


def test_the_example_runs(tmp_path: Path) -> None:
    command = [sys.executable, "examples/layers/topk_autoencoder.py", "--quick", "--data", "random"]
    done = subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path.name for path in tmp_path.iterdir()} == {"topk_autoencoder.json", "topk_autoencoder.png"}
