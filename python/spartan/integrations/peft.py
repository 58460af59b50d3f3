"""PEFT: LoRA adapters of a pruned model that leave its zeros, in training and when they are merged."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["keep_zeros"]


def keep_zeros(model: nn.Module) -> list[str]:
    """Let the LoRA adapters of a pruned model change its kept weights alone, as trained and as merged.

        y = x (W + M * scale B A)^T,   M = 1 where W is not 0, else 0

    Without it B A is dense, and so is the weight once it is merged. PEFT's model, training, merging and files stay what
    they are; a file says nothing of M, so call this again after an adapter was added or loaded. The masked B A is
    formed for each call, and multiplied densely.

    Args:
        model: a PEFT model, or any module with PEFT's LoRA layers in it; its base weights are pruned already.

    Returns:
        The names of the layers.

    Raises:
        ValueError: no LoRA layer; one of another module than `nn.Linear`; an adapter that is merged or not plain LoRA
            (such as DoRA). Nothing is changed then.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if not layers:
        raise ValueError("model has no LoRA layer; call get_peft_model(model, LoraConfig(...)) first")
    for name, layer in layers.items():
        if not isinstance(layer, LoraLinear) or not isinstance(layer.get_base_layer(), nn.Linear):
            what = f"{type(layer).__name__} of {type(layer.get_base_layer()).__name__}"
            raise ValueError(f"layer {name!r} is a LoRA {what}; the zeros of nn.Linear alone can be kept")
        if layer.merged:
            raise ValueError(f"layer {name!r} has merged adapters; unmerge them first")
        for adapter, variant in layer.lora_variant.items():
            if not isinstance(variant, _KeptWeights):
                raise ValueError(f"adapter {adapter!r} of layer {name!r} is {type(variant).__name__}, not plain LoRA")
    for layer in layers.values():
        for adapter in layer.lora_A:
            layer.lora_variant[adapter] = _KeptWeights()
    return list(layers)


class _KeptWeights:
    """What PEFT calls a variant of LoRA: it asks it for the layer's output and for the merged weight."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        change = _change(module, active_adapter, module.get_base_layer().weight)
        bias = module.lora_B[active_adapter].bias
        shift = None if bias is None else bias * module.scaling[active_adapter]
        return result + functional.linear(module.lora_dropout[active_adapter](x), change.to(x.dtype), shift)

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight + _change(module, active_adapter, orig_weight).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data += _change(module, active_adapter, orig_weight).to(orig_weight.dtype)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight - _change(module, active_adapter, orig_weight).to(orig_weight.dtype)


def _change(module: Any, adapter: str, weight: Tensor) -> Tensor:
    """M * scale B A."""
    return torch.where(weight != 0, module.get_delta_weight(adapter), 0.0)
