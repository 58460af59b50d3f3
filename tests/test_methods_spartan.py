"""Spartan's settings beyond the paper: how beta grows, and the weight gradient where the mask is not small."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from spartan import FLOPs, Sparsifier, Spartan
from spartan_kernels import block_scores

X = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


pytestmark = pytest.mark.usefixtures("one_thread")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 22), nn.ReLU(), nn.Linear(22, 4)
    ).double()


def loss(model: nn.Module, *weights: Any) -> torch.Tensor:
    output = torch.func.functional_call(model, weights[0], (X,)) if weights else model(X)
    return functional.cross_entropy(output, X[:, 0, 0].argmax(1))


def sharpened(tolerance: float, block: Any, **settings: Any) -> tuple[nn.Sequential, Sparsifier]:
    model = network()
    settings = {"preserve_scale": False, **settings}
    method = Spartan(sparsity=0.7, block_size=block, backward_tolerance=tolerance, **settings)
    sparsifier = Sparsifier(model, method, 100, costs=FLOPs(X) if block == 4 else None)
    for _ in range(75):
        sparsifier.step()
    return model, sparsifier


def equation_2(sparsifier: Sparsifier, restricted: bool) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Gradient, m and G by name, where G is zero outside B if that is asked for."""
    tensors = sparsifier._masks.tensors
    weights = {}
    for tensor in tensors:
        mask = tensor.expand(tensor.mask.soft * tensor.mask.hard)
        weights[tensor.name] = (tensor.weight.detach() * mask).requires_grad_()
    loss(network(), weights).backward()
    parts, top, bottom = [], 0.0, 0.0
    for tensor in tensors:
        theta, m, a = tensor.weight.detach(), tensor.mask.soft, tensor.carrier.mask_costs
        grad = weights[tensor.name].grad
        assert grad is not None
        used = grad * tensor.expand(tensor.carrier.mask_backward) if restricted else grad
        size = tensor.carrier.mask_block_size
        positive, negative = (block_scores((used * theta).clamp(**side), size) for side in ({"min": 0}, {"max": 0}))
        g, s = positive - negative, m * (1 - m)
        top, bottom = top + float((g * s).sum()), bottom + float((a * s).sum())
        parts.append((tensor, theta, m, s, g / a, used, grad))
    result = {}
    for tensor, theta, m, s, mean, used, grad in parts:
        pull = tensor.carrier.mask_beta * s * (mean - top / bottom)
        total = used * tensor.expand(m) + theta.sign() * tensor.expand(pull)
        result[tensor.name] = (total, tensor.expand(m), grad)
    return result


@pytest.mark.parametrize("block", [1, 4, (4, 3)])
def test_the_gradient_is_equation_2_with_the_gradient_on_b(block: Any) -> None:
    tolerance = 0.05
    model, sparsifier = sharpened(tolerance, block)
    loss(model).backward()
    sparsifier.correct_gradients()
    for tensor in sparsifier._masks.tensors:
        chosen = tensor.carrier.mask_backward
        assert chosen is not None
        assert torch.equal(chosen, (tensor.mask.soft >= tolerance) | tensor.mask.hard)
    kept, chosen_all, blocks = (
        sum(int(mask.sum()) for mask in masks)
        for masks in zip(
            *((t.mask.hard, t.carrier.mask_backward, torch.ones_like(t.mask.hard)) for t in sparsifier._masks.tensors),
            strict=True,
        )
    )
    assert kept < chosen_all < blocks  # or there were nothing to see
    for name, (expected, _, _) in equation_2(sparsifier, restricted=True).items():
        torch.testing.assert_close(model.get_parameter(name).grad, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("block", [1, (4, 3)])
def test_what_the_tolerance_leaves_out_is_at_most_eps_g(block: Any) -> None:
    tolerance = 0.05
    _, sparsifier = sharpened(tolerance, block)
    paper, restricted = (equation_2(sparsifier, restricted=flag) for flag in (False, True))
    for tensor in sparsifier._masks.tensors:
        name, outside = tensor.name, ~tensor.expand(tensor.carrier.mask_backward)
        m, grad = paper[name][1], paper[name][2]
        left_out = (grad * m)[outside]
        assert bool((left_out.abs() <= tolerance * grad[outside].abs()).all())
        # the rest of the difference is the mask's own part, beta s (g / a - r), small with s <= m
        difference = (paper[name][0] - restricted[name][0]).abs()
        assert float(difference.norm() / paper[name][0].norm()) < 4 * tolerance


def test_a_tolerance_below_every_mask_is_the_paper() -> None:
    grads = []
    for tolerance in (0.0, 1e-300):
        model, sparsifier = sharpened(tolerance, (4, 3))
        loss(model).backward()
        sparsifier.correct_gradients()
        grads.append([p.grad for p in model.parameters()])
    for paper, tolerant in zip(*grads, strict=True):
        torch.testing.assert_close(paper, tolerant, rtol=1e-12, atol=1e-15)


def test_b_shrinks_to_the_kept_blocks_as_the_mask_sharpens() -> None:
    model = network()
    method = Spartan(sparsity=0.7, block_size=(4, 3), beta=100.0, beta_units="mean", backward_tolerance=0.01)
    sparsifier = Sparsifier(model, method, 100)
    sizes = []
    for _ in range(79):
        sparsifier.step()
        tensors = sparsifier._masks.tensors
        sizes.append(sum(int(t.carrier.mask_backward.sum()) for t in tensors))
    blocks, kept = sum(t.mask.hard.numel() for t in tensors), sum(int(t.mask.hard.sum()) for t in tensors)
    assert sizes[0] == blocks
    assert sizes[20:] == sorted(sizes[20:], reverse=True)
    assert sizes[-1] < kept + 0.1 * blocks
    sparsifier.step()
    assert all(tensor.carrier.mask_backward is None for tensor in sparsifier._masks.tensors)  # fixed: h alone


def test_blocks_in_use_get_a_gradient_however_flat_the_mask() -> None:
    model = network()
    sparsifier = Sparsifier(model, Spartan.paper(sparsity=0.7, beta=1.0, block_size=4, backward_tolerance=0.99), 100)
    for _ in range(40):
        sparsifier.step()
    loss(model).backward()
    for tensor in sparsifier._masks.tensors:
        assert bool((tensor.soft < 0.99).all())
        assert torch.equal(tensor.backward, tensor.hard)
    assert bool(model[3].weight.grad.any())


def test_dropped_gradients_that_overflowed_do_not_spread() -> None:
    model, sparsifier = sharpened(0.05, 1)
    loss(model).backward()
    tensor = sparsifier._masks.tensors[1]
    outside = ~tensor.carrier.mask_backward
    tensor.weight.grad[outside] = math.inf
    sparsifier.correct_gradients()
    assert bool(tensor.weight.grad.isfinite().all())


def test_training_with_a_tolerance_resumes_bit_for_bit() -> None:
    method = Spartan(sparsity=0.7, block_size=4, beta=6.0, beta_units="mean", backward_tolerance=0.1)

    def run(model: nn.Sequential, sparsifier: Sparsifier, steps: range) -> None:
        for _ in steps:
            model.zero_grad()
            loss(model).backward()
            sparsifier.correct_gradients()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.sub_(parameter.grad, alpha=0.1)
            sparsifier.step()

    whole, half, again = network(), network(), network()
    run(whole, Sparsifier(whole, method, 20), range(20))
    first = Sparsifier(half, method, 20)
    run(half, first, range(11))
    second = Sparsifier(again, method, 20)
    again.load_state_dict(half.state_dict())
    second.load_state_dict(first.state_dict())
    run(again, second, range(11, 20))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_the_published_settings_are_one_word_away() -> None:
    paper = Spartan.paper(sparsity=0.9, block_size=4)
    assert paper == Spartan(sparsity=0.9, block_size=4, beta=10.0, beta_units="paper", preserve_scale=False)
    assert paper != Spartan(sparsity=0.9, block_size=4)
    assert (Spartan.paper(sparsity=0.9, beta=20.0).beta, Spartan.paper(pattern=(2, 4)).sparsity) == (20.0, 0.5)
    with pytest.raises(TypeError, match="sparsity must be a number; got NoneType"):
        Spartan.paper()


def test_defaults_do_not_depend_on_the_scale_of_the_weights() -> None:
    """Nor does the output: as published, both do."""
    masks: dict[str, list[torch.Tensor]] = {"default": [], "paper": []}
    for scale in (8.0, 0.125):
        for name, method in (("default", Spartan(sparsity=0.9)), ("paper", Spartan.paper(sparsity=0.9))):
            model = network()
            with torch.no_grad():
                for layer in (model[0], model[3]):
                    layer.weight.mul_(scale)
            sparsifier = Sparsifier(model, method, 100)
            for _ in range(60):
                sparsifier.step()
            soft = sparsifier.masks()["3.weight"].soft
            used = sparsifier._masks.tensors[-1].carrier.masked(model[3].weight).detach()
            masks[name] += [soft, used / scale]
    (soft, used, small, small_used), (*_, paper, _) = masks["default"], masks["paper"]
    torch.testing.assert_close(small, soft)
    torch.testing.assert_close(small_used, used)
    assert float((paper - masks["paper"][0]).abs().max()) > 0.1


def test_beta_grows_in_the_shape_asked_for() -> None:
    for shape, half in (("linear", 5.5), ("cosine", 5.5)):
        method = Spartan.paper(sparsity=0.5, beta=10.0, anneal_shape=shape)
        assert [method.beta_at(step, 100) for step in (0, 40, 80, 99)] == pytest.approx([1.0, half, 10.0, 10.0])
    quarter = [Spartan.paper(sparsity=0.5, beta=10.0, anneal_shape=s).beta_at(20, 100) for s in ("linear", "cosine")]
    assert quarter == pytest.approx([3.25, 1 + 9 * (1 - math.sqrt(0.5)) / 2])


def test_mean_units_are_magnitude_over_cost_in_blocks_with_costs() -> None:
    model = network()
    method = Spartan(sparsity=0.7, block_size=4, beta=5.0, beta_units="mean", ramp=0.0, anneal=1.0)
    sparsifier = Sparsifier(model, method, 10, costs=FLOPs(X))
    for _ in range(5):
        sparsifier.step()
    magnitude = cost = 0.0
    for tensor in sparsifier._masks.tensors:
        magnitude += float(tensor.weight.detach().abs().sum())
        cost += float((tensor.carrier.mask_costs * torch.ones_like(tensor.mask.soft)).sum())
    beta = 3.0 * cost / magnitude
    assert float(sparsifier._masks.tensors[0].carrier.mask_beta) == pytest.approx(4 * beta, rel=1e-6)
