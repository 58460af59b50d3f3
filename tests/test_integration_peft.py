"""PEFT: adapters of a pruned model leave its zeros, in training, merged, unmerged and from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spartan

peft = pytest.importorskip("peft", reason="the extra `integrations` is not installed")
from spartan.integrations.peft import keep_zeros  # noqa: E402


class Network(nn.Module):
    """Two linear layers, 70% of each zero."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(24, 48), nn.Linear(48, 10)
        self.convolution = nn.Conv2d(1, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x).relu())
        return out


def pruned() -> Network:
    network = Network()
    spartan.prune(network, spartan.Magnitude(sparsity=0.7, distribution="uniform"), include=[nn.Linear])
    return network


def adapted(**settings: Any) -> tuple[Any, dict[str, Tensor]]:
    """A pruned network with adapters, and where its weights are zero."""
    network = pruned()
    zeros = {name: getattr(network, name).weight == 0 for name in ("first", "second")}
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["first", "second"], **settings)
    return peft.get_peft_model(network, config), zeros


def trained(model: Any, steps: int = 20) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    torch.manual_seed(1)
    x, y = torch.randn(64, 24), torch.randint(10, (64,))
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("settings", [{}, {"lora_bias": True}, {"use_rslora": True}], ids=str)
def test_a_merge_keeps_the_zeros_and_the_outputs(settings: dict[str, Any]) -> None:
    model, zeros = adapted(**settings)
    assert len(keep_zeros(model)) == 2
    losses = trained(model)
    assert losses[-1] < 0.9 * losses[0]
    model.eval()
    x = torch.randn(5, 24)
    before = model(x)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), before, rtol=1e-4, atol=1e-5)
    for name, zero in zeros.items():
        weight = getattr(merged, name).weight
        assert torch.equal(weight == 0, zero)


def test_without_it_a_merge_fills_the_zeros() -> None:
    model, zeros = adapted()
    trained(model)
    merged = model.merge_and_unload()
    assert int((merged.first.weight == 0).sum()) < 0.1 * int(zeros["first"].sum())


@pytest.mark.parametrize("safe", [True, False])
def test_adapters_can_be_merged_and_taken_out_again(safe: bool) -> None:
    model, zeros = adapted()
    keep_zeros(model)
    trained(model)
    model.eval()
    base, x = model.base_model.model.first.base_layer.weight, torch.randn(5, 24)
    first, before = base.detach().clone(), model(x)
    model.merge_adapter(safe_merge=safe)
    assert not torch.equal(model.base_model.model.first.base_layer.weight, first)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    weight = model.base_model.model.first.base_layer.weight
    torch.testing.assert_close(weight, first, rtol=1e-5, atol=1e-6)
    assert torch.equal(weight == 0, zeros["first"])


def test_the_gradient_is_that_of_the_masked_weight() -> None:
    model, zeros = adapted(init_lora_weights="gaussian")
    keep_zeros(model)
    layer = model.base_model.model.first
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    x, upstream = torch.randn(7, 24), torch.randn(7, 48)
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    found = torch.autograd.grad(layer(x), (down, up), upstream)
    a, b = down.detach().double().requires_grad_(), up.detach().double().requires_grad_()
    weight = layer.base_layer.weight.detach().double() + ~zeros["first"] * (2.0 * (b @ a))
    exact = torch.autograd.grad(x.double() @ weight.T, (a, b), upstream.double())
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


def test_a_saved_adapter_is_loaded_into_the_same_model(tmp_path: Path) -> None:
    model, _ = adapted()
    keep_zeros(model)
    trained(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(pruned(), tmp_path)
    keep_zeros(again)
    x = torch.randn(5, 24)
    torch.testing.assert_close(again.eval()(x), model.eval()(x))


def test_bad_models_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="no LoRA layer"):
        keep_zeros(pruned())
    with pytest.raises(ValueError, match=r"convolution.*Conv2d"):
        keep_zeros(peft.get_peft_model(pruned(), peft.LoraConfig(r=2, target_modules=["convolution"])))
    with pytest.raises(ValueError, match="not plain LoRA"):
        keep_zeros(adapted(use_dora=True)[0])
    model, _ = adapted()
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge"):
        keep_zeros(model)
