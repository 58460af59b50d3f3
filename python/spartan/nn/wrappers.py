"""Names as the plain model has them, whatever wraps the model or a module of it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

from torch import nn

__all__ = ["is_wrapper", "named_owners", "same_names", "unwrapped"]

# Where a wrapper's class is, and what it calls the module that it wraps. A class nobody imported wraps nothing.
_WRAPPERS = (
    ("torch.nn.parallel", "DistributedDataParallel", "module"),
    ("torch.nn.parallel", "DataParallel", "module"),
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "ActivationWrapper",
        "_checkpoint_wrapped_module",
    ),
)
_CHILDREN = {child for _, _, child in _WRAPPERS}


def is_wrapper(module: nn.Module) -> bool:
    """Whether `module` only wraps another: data parallelism, `torch.compile`, checkpointed activations."""
    return _wrapped_as(module) is not None


def unwrapped(model: nn.Module) -> nn.Module:
    """The plain model that `model` wraps, or itself."""
    while (child := _wrapped_as(model)) is not None:
        model = getattr(model, child)
    return model


def named_owners(model: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, ...]]]:
    """Each module's name in the plain model, "" for the model itself, with all that it is in, outermost first, and it.

    A wrapper has the name of what it wraps.
    """
    found: dict[str, tuple[str, tuple[nn.Module, ...]]] = {}
    for path, module in model.named_modules():
        parent, _, child = path.rpartition(".")
        name, owners = found[parent] if path else ("", ())
        if path and _wrapped_as(owners[-1]) != child:
            name = f"{name}.{child}" if name else child
        found[path] = name, (*owners, module)
        yield found[path]


def same_names(others: Iterable[str], names: Iterable[str]) -> dict[str, str]:
    """Which of `names` each of `others` is where the two differ by the names of wrapped modules only; else nothing."""
    others, names = list(others), list(names)
    plain = {_without_wrappers(name): name for name in names}
    pairs = {other: plain.get(_without_wrappers(other), "") for other in others}
    return pairs if set(pairs.values()) == set(names) and len(pairs) == len(names) else {}


def _wrapped_as(module: nn.Module) -> str | None:
    """The name under which a wrapper has the module that it wraps; None if it is no wrapper."""
    for place, kind, child in _WRAPPERS:
        wrapper = getattr(sys.modules.get(place), kind, None)
        if wrapper is not None and isinstance(module, wrapper):
            return child
    return None


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _CHILDREN)
