"""Copies of a masked model, such as averages of its weights: whose masks they have, and how they become plain."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from spartan.distributed import heed_in_ddp, is_dtensor
from spartan.masks import MaskedTensor
from spartan.nn.mask_carrier import MaskCarrier
from spartan.nn.masked_attribute import masked_attributes, masks_of_attribute
from spartan.nn.modules import MaskedWeight, unmask_weight
from spartan.nn.wrappers import named_owners

__all__ = ["PlacedMasks", "disown", "finalize", "finalize_by", "give_masks", "has_masks", "kept", "own", "placed"]


class PlacedMasks(NamedTuple):
    """The masks of one weight and where in a model, wrapped or not, it is: the module's name and its name there."""

    module: str
    parameter: str
    masks: MaskCarrier


def finalize(model: nn.Module) -> None:
    """Apply the masks that a copy of a masked model has for good: plain modules, with exact zeros.

    For copies that were made while the model was masked and brought its masks along, `copy.deepcopy(model)` or
    `AveragedModel(model)`, whether the model itself is finalized, still in training or gone. A copy has the masks that
    the model had when both were last alike: when it was made, or by `Sparsifier.copy_masks`. Those that never had
    masks, or follow parameters alone, get those of now and are finalized by `Sparsifier.finalize_copy`.

    Args:
        model: changed in place.

    Raises:
        ValueError: it has no masks, is itself in training by a sparsifier, or has weights that are divided over ranks.
    """
    found = list(_masked_weights(model))
    if not found:
        raise ValueError("model must be a copy of a masked model; it has no masks, so there is nothing to finalize")
    for module, parameter, carrier in found:
        owner = _OWNERS.get(carrier)
        if owner is not None and owner() is not None:
            raise ValueError("model must be a copy: this one is in training by a Sparsifier; call its finalize()")
        if carrier.mask_divided or is_dtensor(_original(module, parameter)):
            raise ValueError(f"model must have whole weights; {parameter!r} of a module in it is divided over ranks")
    names = [name for name, _ in model.named_buffers() if name.rpartition(".")[2].startswith("mask_")]
    done: set[int] = set()
    for module, parameter, carrier in found:
        weight = _original(module, parameter)
        if id(weight) not in done:  # tied weights are one
            done.add(id(weight))
            _apply(carrier, weight)
        unmask_weight(module, carrier, parameter)
    heed_in_ddp(model, names)


def finalize_by(places: list[PlacedMasks], model: nn.Module) -> None:
    """Make a copy plain and sparse by these masks, whether or not it has masks of its own."""
    pairs = _counterparts(places, model)
    for own_masks, weight, masks in pairs:
        if own_masks is not None:
            own_masks.take_masks(masks)
            continue
        given = MaskedWeight()
        given.mask_stack = masks.mask_stack
        given.attach_masks(given.turned(weight.detach()), masks.mask_block_size, soft=False)
        given.take_masks(masks)
        _apply(given, weight)
    if any(own_masks is not None for own_masks, _, _ in pairs):
        finalize(model)


def give_masks(places: list[PlacedMasks], model: nn.Module) -> None:
    """Give a masked copy these masks."""
    pairs = _counterparts(places, model)
    for place, (own_masks, _, _) in zip(places, pairs, strict=True):
        if own_masks is None:
            raise ValueError(f"model must be a copy of the masked model; it has no such masks in {place.module!r}")
    for own_masks, _, masks in pairs:
        assert own_masks is not None
        own_masks.take_masks(masks)


def has_masks(model: nn.Module) -> bool:
    """Whether some weights of a model are masked."""
    return any(isinstance(module, MaskCarrier) for module in model.modules())


def placed(model: nn.Module, tensors: Iterable[MaskedTensor]) -> list[PlacedMasks]:
    """Where in `model` each masked weight is, with its masks."""
    names = {id(owners[-1]): name for name, owners in named_owners(model)}
    return [PlacedMasks(names[id(tensor.module)], tensor.parameter, tensor.carrier) for tensor in tensors]


def kept(places: list[PlacedMasks]) -> list[PlacedMasks]:
    """The same masks, which stay when the modules that carry them become plain."""
    result = []
    for module, parameter, masks in places:
        own_masks = MaskedWeight()
        like = torch.empty((), dtype=masks.mask_dtype, device=masks.mask_hard.device).expand(masks.mask_shape)
        own_masks.mask_stack = masks.mask_stack
        own_masks.attach_masks(like, masks.mask_block_size, soft=False)
        own_masks.take_masks(masks)
        result.append(PlacedMasks(module, parameter, own_masks))
    return result


_OWNERS: weakref.WeakKeyDictionary[MaskCarrier, weakref.ref[Any]] = weakref.WeakKeyDictionary()


def own(sparsifier: object, tensors: Iterable[MaskedTensor]) -> None:
    """Remember that a sparsifier trains these, as long as it is there."""
    for tensor in tensors:
        _OWNERS[tensor.carrier] = weakref.ref(sparsifier)


def disown(tensors: Iterable[MaskedTensor]) -> None:
    """Forget that."""
    for tensor in tensors:
        _OWNERS.pop(tensor.carrier, None)


def _masked_weights(model: nn.Module) -> Iterator[tuple[nn.Module, str, MaskCarrier]]:
    for module in model.modules():
        if isinstance(module, MaskedWeight):
            continue
        for parameter in dict.fromkeys(("weight", *masked_attributes(module))):
            carrier = _carrier_of(module, parameter)
            if carrier is not None:
                yield module, parameter, carrier


def _carrier_of(module: nn.Module, parameter: str) -> MaskCarrier | None:
    """What carries the masks of a module's parameter, if it has masks."""
    if isinstance(module, MaskCarrier) and parameter == "weight":
        return module
    found = masks_of_attribute(module, parameter)
    return found if isinstance(found, MaskCarrier) else None


def _original(module: nn.Module, parameter: str) -> nn.Parameter:
    """theta, under the mask."""
    weight = module._parameters[parameter]
    assert weight is not None
    return weight


def _counterparts(
    places: list[PlacedMasks], model: nn.Module
) -> list[tuple[MaskCarrier | None, nn.Parameter, MaskCarrier]]:
    """Of the copy: its own masks, where it has some, and weight; and the masks that it is to have."""
    modules = {name: owners[-1] for name, owners in named_owners(model)}  # of a wrapper and its module, the latter
    found = []
    for name, parameter, masks in places:
        module = modules.get(name, nn.Identity())
        own_masks = _carrier_of(module, parameter)
        there = own_masks is not None or parameter in module._parameters
        weight = _original(module, parameter) if there else None
        same = weight is not None and all(m is None or m.fits(weight) for m in (masks, own_masks))
        if weight is None or not same:
            raise ValueError(f"model must be a copy of the masked model; it has no such {parameter} in {name!r}")
        found.append((own_masks, weight, masks))
    return found


def _apply(carrier: MaskCarrier, weight: nn.Parameter) -> None:
    """weight <- theta * m * h (* scale), dropped weights exactly +0."""
    with torch.no_grad():
        values = carrier.turned(weight.detach())
        values.copy_(carrier.masked_part(values).add_(0.0))
