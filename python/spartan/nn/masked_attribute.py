"""Modules that keep their own forward pass and read masked weights: the attribute gives the masked value.

The parameter stays where it is, under its name: states, copies and pickles, lists of parameters and what a trainer
saves are those of the plain module. Only what reads `module.weight` sees theta * m * h. The class of the module is
replaced by one of its own with a property for each masked parameter; the masks are a child of the module.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from spartan.distributed import is_dtensor, own_class, set_own_class

__all__ = [
    "mask_attribute",
    "masked_attributes",
    "masked_class",
    "masks_of_attribute",
    "plain_class",
    "unmask_attribute",
]

_READ = "_masked_weights_read"  # what a forward pass that is being made has read
_REPLICA = "_masked_replica"
_CLASSES: dict[tuple[type, type | None, tuple[str, ...]], type[Any]] = {}


def mask_attribute(module: nn.Module, parameter: str, carrier: nn.Module) -> None:
    """Have `module.<parameter>` give `carrier(theta)`; several modules may share a carrier."""
    module.add_module(_child(parameter), carrier)
    kind = own_class(module)
    names = (*getattr(kind, "_masked_names", ()), parameter)
    set_own_class(module, masked_class(plain_class(kind), None, names))


def unmask_attribute(module: nn.Module, parameter: str) -> None:
    """Undo `mask_attribute`; the parameter keeps its present value."""
    delattr(module, _child(parameter))
    kind: Any = own_class(module)
    plain = plain_class(kind)
    names = tuple(name for name in kind._masked_names if name != parameter)
    set_own_class(module, masked_class(plain, None, names) if names else plain)
    setattr(module, parameter, module._parameters[parameter])  # recurrent layers hold what they read last


def masked_attributes(module: nn.Module) -> tuple[str, ...]:
    """The parameters whose attributes give masked values."""
    names: tuple[str, ...] = getattr(own_class(module), "_masked_names", ())
    return names


def masks_of_attribute(module: nn.Module, parameter: str) -> nn.Module | None:
    """What `mask_attribute` was given for a parameter; None if it was not."""
    return module._modules.get(_child(parameter))


def plain_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The class that `masked_class` made `kind` of; a class that it did not make, as it is."""
    return getattr(kind, "_plain_class", kind)


def masked_class(plain: type[nn.Module], mixin: type[nn.Module] | None, names: tuple[str, ...]) -> type[Any]:
    """A class of modules of class `plain` with `mixin` before it, and the attributes `names` masked; made once."""
    key = plain, mixin, names
    if key not in _CLASSES:
        members: dict[str, Any] = {name: _masked_property(name) for name in names}
        members.update(
            _plain_class=plain, _mixin=mixin, _masked_names=names, __reduce_ex__=_reduce, __module__=plain.__module__
        )
        if names:
            members["forward"] = _reading_once(plain.forward)
        bases = (plain,) if mixin is None else (mixin, plain)
        _CLASSES[key] = type(f"Masked{plain.__name__}", bases, members)
    return _CLASSES[key]


def _child(parameter: str) -> str:
    return f"masks_of_{parameter}"


def _masked_property(name: str) -> property:
    child = _child(name)

    def compute(module: nn.Module) -> torch.Tensor:
        carrier: Any = module._modules[child]
        theta: Any = module._parameters[name] if name in module._parameters else module.__dict__[_REPLICA][name]
        # Between passes FSDP looks here for the part of the parameter that it stores.
        return theta if is_dtensor(theta) and not carrier.computes_with(theta) else carrier(theta)

    def masked(module: nn.Module) -> torch.Tensor:
        """theta * m * h."""
        if torch.compiler.is_compiling() or _READ not in module.__dict__:
            return compute(module)
        read = module.__dict__[_READ]
        key = name, torch.is_grad_enabled()
        if key not in read:
            read[key] = compute(module)
        return read[key]

    def replicate(module: nn.Module, value: torch.Tensor) -> None:
        """What `DataParallel` sets on its replicas, which have no parameters."""
        module.__dict__.setdefault(_REPLICA, {})[name] = value

    return property(masked, replicate)


def _reading_once(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward pass that masks each weight once, however often it reads it, as it does one expert after another."""

    @functools.wraps(forward)
    def once(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or _READ in module.__dict__:
            return forward(module, *args, **kwargs)
        module.__dict__[_READ] = {}
        try:
            return forward(module, *args, **kwargs)
        finally:
            del module.__dict__[_READ]

    return once


def _reduce(module: Any, protocol: int) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """What copies and pickles are made of: the class is made again from what it was made of."""
    state = dict(module.__getstate__() if hasattr(module, "__getstate__") else module.__dict__)
    if "_flat_weights" in state:  # a recurrent layer's: masked weights are no leaves
        state["_flat_weights"] = [module._parameters.get(name) for name in module._flat_weights_names]
    kind: Any = own_class(module)
    return _new, (kind._plain_class, kind._mixin, kind._masked_names), state


def _new(plain: type[nn.Module], mixin: type[nn.Module] | None, names: tuple[str, ...]) -> nn.Module:
    kind: Any = masked_class(plain, mixin, names)
    module: nn.Module = kind.__new__(kind)
    return module
