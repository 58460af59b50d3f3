"""The private parts of PyTorch that this package uses: all of them, each with its reason and what stands in for it.

A private name may go with any release. Each is looked up here at import. Where PyTorch lacks one, `MISSING` has its
name, a warning says so, and a public way stands in that is slower or does less. A test fails unless `MISSING` is empty.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import forward_ad, profiler

# No public name says the same; both modules are described in PyTorch's documentation.
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "HAS_LEVELS",
    "MISSING",
    "TorchDispatchMode",
    "any_requires_grad",
    "autocast_may_be_on",
    "below_autograd",
    "busy",
    "forward_mode",
    "forward_mode_set",
    "is_traceable_wrapper_subclass",
    "process_group",
    "single_level",
    "single_level_function",
    "transforms_active",
    "tree_flatten",
    "tree_leaves",
    "tree_unflatten",
    "watched",
]

MISSING: list[str] = []


def _found(module: str, name: str) -> Any:
    """This name of PyTorch, or None, which is noted."""
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError):
        MISSING.append(f"{module}.{name}")
        return None


def _present(*names: tuple[str, str]) -> bool:
    return all([_found(*name) is not None for name in names])


_transforms = _found("torch._C", "_are_functorch_transforms_active")
# Whether a transform of torch.func runs: what it traces has no numbers to read. Not known: yes, and nothing is read.
transforms_active: Callable[[], bool] = _transforms or (lambda: True)

_HAS_LEVEL = _present(("torch.autograd.forward_ad", "_current_level"))


def forward_mode() -> bool:
    """Whether forward-mode differentiation is on, which the operators refuse. Not known: yes, and autograd is asked."""
    return not _HAS_LEVEL or forward_ad._current_level >= 0


def _any_requires_grad(*operands: Any) -> bool:
    tensors = (x for o in operands for x in (o if isinstance(o, (list, tuple)) else (o,)))
    return any(isinstance(x, torch.Tensor) and x.requires_grad for x in tensors)


# Whether a gradient is wanted, in a tenth of the time that a loop over the operands takes.
any_requires_grad: Callable[..., bool] = _found("torch._C", "_any_requires_grad") or _any_requires_grad

_any_autocast = _found("torch._C", "_is_any_autocast_enabled")


def autocast_may_be_on() -> bool:
    """Whether some device's autocast may be on, asked of all of them at once. Not known: yes, and each is asked."""
    return _any_autocast is None or torch.compiler.is_compiling() or _any_autocast()


# Keeps a GPU busy for some cycles, so that launches are queued before what is timed. Without it they are timed too.
busy: Callable[[int], None] = _found("torch.cuda", "_sleep") or (lambda cycles: None)

_SEES_WATCHERS = (
    _present(
        ("torch._C", "_len_torch_dispatch_stack"),
        ("torch._C", "_is_tracing"),
        ("torch.autograd.profiler", "_is_profiler_enabled"),
    )
    and _HAS_LEVEL
)


def watched() -> bool:
    """Whether something watches, changes or keeps the calls of operators, which then go through the dispatcher.

    Else they leave it out, which saves tens of microseconds. Not known: yes.
    """
    return not _SEES_WATCHERS or bool(
        torch._C._len_torch_dispatch_stack()
        or transforms_active()
        or torch._C._is_tracing()
        or forward_ad._current_level >= 0
        or profiler._is_profiler_enabled
    )


# Gradients as PyTorch's own operators have them, level by level of torch.func, which refuses the functions that
# `torch.library.register_autograd` makes. That one serves where these are missing, without torch.func.
HAS_LEVELS = _present(
    ("torch.autograd.function", "_SingleLevelFunction"),
    ("torch._functorch.autograd_function", "enable_single_level_autograd_function"),
    ("torch._C", "_AutoDispatchBelowAutograd"),
    ("torch._C", "_after_autograd_keyset"),
    ("torch.autograd.forward_ad", "_set_fwd_grad_enabled"),
)
single_level_function: Any = (
    import_module("torch.autograd.function")._SingleLevelFunction if HAS_LEVELS else torch.autograd.Function
)


def single_level() -> AbstractContextManager[Any]:
    """Lets a `single_level_function` be applied; needs `HAS_LEVELS`."""
    context: AbstractContextManager[Any] = import_module(
        "torch._functorch.autograd_function"
    ).enable_single_level_autograd_function()
    return context


def forward_mode_set(enabled: bool) -> AbstractContextManager[Any]:
    """Forward-mode differentiation on or off in a block; needs `HAS_LEVELS`."""
    context: AbstractContextManager[Any] = forward_ad._set_fwd_grad_enabled(enabled)
    return context


def below_autograd(operator: Any, keyset: Any, operands: Iterable[Any]) -> Any:
    """Hand a call that reached autograd on to what lies below it; needs `HAS_LEVELS`."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator.redispatch(keyset & torch._C._after_autograd_keyset, *operands)


def process_group(name: str) -> ProcessGroup:
    """The process group of this name: operators take names, for a graph holds no groups.

    Raises:
        RuntimeError: PyTorch has no way to find it.
    """
    try:
        resolve = import_module("torch.distributed.distributed_c10d")._resolve_process_group
    except AttributeError:
        raise RuntimeError(f"PyTorch {torch.__version__} cannot find a process group by its name {name!r}") from None
    found: ProcessGroup = resolve(name)
    return found


if MISSING:
    warnings.warn(
        f"spartan: PyTorch {torch.__version__} has no {', '.join(MISSING)}; calls take longer"
        + ("" if HAS_LEVELS else ", and torch.func cannot differentiate the operators"),
        RuntimeWarning,
        stacklevel=2,
    )
