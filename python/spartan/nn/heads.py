"""Which Linear of a model is its classifier head, and which modules are low-rank adapters of another."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from spartan.distributed import own_class
from spartan.nn.wrappers import named_owners

__all__ = ["adapter_of", "head_of", "why_no_head"]

_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_LOW_RANK = ("lora_a", "lora_b")  # also where a library does not list the names of its adapters, as PEFT does
_COPIES = {"modules_to_save"}  # which it lists too: whole modules that are trained in the place of frozen ones


def head_of(model: nn.Module) -> nn.Module | None:
    """The last Linear in definition order, if it is a head; None if the model has none.

    It is none in a layer of a Transformer or any that repeats, with the same class and shapes, beside it, nor in a
    model of Hugging Face's without a head (`AutoModel`).
    """
    _, owners = _last_linear(model)
    return owners[-1] if owners and _why_not(owners) is None else None


def why_no_head(model: nn.Module) -> str | None:
    """Why the last Linear is not taken for a head, with its name; None if it is, or if there is none."""
    name, owners = _last_linear(model)
    reason = _why_not(owners) if owners else None
    return None if reason is None else f"{name}, the last Linear, is {reason}"


def adapter_of(name: str, owners: Sequence[nn.Module]) -> str | None:
    """The name of the adapter, as "lora_A", that the parameter `name` belongs to; None if to none."""
    listed = {adapter for owner in owners for adapter in getattr(owner, "adapter_layer_names", ())} - _COPIES
    return next((part for part in name.split(".") if part in listed or part.lower() in _LOW_RANK), None)


def _last_linear(model: nn.Module) -> tuple[str, tuple[nn.Module, ...]]:
    last: tuple[str, tuple[nn.Module, ...]] = "", ()
    for name, owners in named_owners(model):
        own = isinstance(owners[-1], nn.Linear) and not isinstance(owners[-1], NonDynamicallyQuantizableLinear)
        if own and adapter_of(name, owners) is None:
            last = name, owners
    return last


def _why_not(owners: tuple[nn.Module, ...]) -> str | None:
    *around, linear = owners
    if any(isinstance(owner, _LAYERS) for owner in around):
        return "in a layer of a Transformer"
    for parent, child in itertools.pairwise(around):
        if any(_alike(sibling, child, linear) for sibling in parent.children() if sibling is not child):
            return "in a layer that repeats"
    pretrained = next((owner for owner in reversed(around) if hasattr(owner, "base_model_prefix")), None)
    if pretrained is not None and _has_no_head(pretrained, linear):
        return f"of {own_class(pretrained).__name__}, which has no head"
    return None


def _alike(other: nn.Module, child: nn.Module, linear: nn.Module) -> bool:
    """Whether `other` is of the class of `child` and has a Linear of the same shape where that has `linear`."""
    if own_class(other) is not own_class(child):
        return False
    path = next(path for path, module in child.named_modules() if module is linear)
    same = dict(other.named_modules()).get(path)
    return isinstance(same, nn.Linear) and same.weight.shape == linear.weight.shape


def _has_no_head(pretrained: nn.Module, linear: nn.Module) -> bool:
    """Whether a model of Hugging Face's is what others put a head on: it is not made of such a one and a head."""
    prefix, outputs = getattr(pretrained, "base_model_prefix", ""), getattr(pretrained, "get_output_embeddings", None)
    if (prefix and hasattr(pretrained, prefix)) or (outputs is not None and outputs() is linear):
        return False
    return re.search("Head|For[A-Z]", own_class(pretrained).__name__) is None
