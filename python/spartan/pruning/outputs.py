"""Outputs of modules that are not run again: kept as long as something reads them, and given in their place."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from spartan_kernels.torch_private import TorchDispatchMode, tree_flatten, tree_leaves, tree_unflatten

__all__ = ["Outputs"]


class Outputs:
    """Outputs of finished modules by batch.

    An output is let go when all that read it is in modules that are not run again either: of a chain of blocks only
    the last one stays. Its shape stays in its place, with NaN for values, which the statistics would refuse.

    Args:
        outer: the modules whose outputs may be kept, and the modules that each is in.

    Attributes:
        batch: the number of the batch that is run.
    """

    def __init__(self, outer: Mapping[nn.Module, set[nn.Module]]) -> None:
        self.batch = 0
        self._outer = outer
        self._kept: dict[nn.Module, dict[int, Any]] = {}
        self._empty: set[tuple[nn.Module, int]] = set()
        self._readers: dict[nn.Module, set[frozenset[nn.Module]]] = {}  # the modules around each reader
        self._replaced = ExitStack()

    def __contains__(self, module: nn.Module) -> bool:
        return module in self._kept

    def clear(self) -> None:
        """Let every module run again."""
        self._replaced.close()
        self._kept.clear()
        self._empty.clear()

    def held(self) -> int:
        """Bytes of the outputs."""
        outputs = (
            out for module, kept in self._kept.items() for b, out in kept.items() if (module, b) not in self._empty
        )
        tensors = (leaf for output in outputs for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor))
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note during a forward what reads the output of each module."""
        active: list[nn.Module] = []
        made: dict[int, set[nn.Module]] = {}  # by where the values lie
        alive: list[Any] = []  # so that nothing else comes to lie there

        def enter(module: nn.Module, _: Any) -> None:
            active.append(module)

        def leave(module: nn.Module, _: Any, output: Any) -> None:
            active.pop()
            self._readers.setdefault(module, set())
            alive.append(output)
            for tensor in tree_leaves(output):
                if isinstance(tensor, torch.Tensor):
                    made.setdefault(tensor.untyped_storage().data_ptr(), set()).add(module)

        def note(tensor: torch.Tensor) -> None:
            for module in made.get(tensor.untyped_storage().data_ptr(), ()):
                self._readers[module].add(frozenset(active))

        with ExitStack() as stack:
            for module in self._outer:
                stack.callback(module.register_forward_pre_hook(enter).remove)
                stack.callback(module.register_forward_hook(leave).remove)
            stack.enter_context(_Reads(note))
            yield

    def replay(self, module: nn.Module) -> None:
        """Let a module give the output of its next run from then on."""
        inside = [other for other in self._kept if module in self._outer[other]]
        kept: dict[int, Any] = {}
        self._kept[module] = kept
        forward, own = module.forward, module.__dict__.get("forward")

        def replayed(*args: Any, **kwargs: Any) -> Any:
            if self.batch in kept:
                empty = (module, self.batch) in self._empty
                return kept[self.batch] if empty else _mapped(torch.Tensor.clone, kept[self.batch])
            output = forward(*args, **kwargs)
            kept[self.batch] = _mapped(torch.Tensor.clone, output)  # models write into what modules return
            for other in inside:
                self._kept[other].pop(self.batch, None)
            self._let_go()
            return output

        module.forward = replayed
        restore = (lambda: setattr(module, "forward", own)) if own is not None else lambda: delattr(module, "forward")
        self._replaced.callback(restore)

    def _let_go(self) -> None:
        """Empty the outputs of this batch that nothing reads any more."""
        for module, kept in self._kept.items():
            if self.batch in kept and (module, self.batch) not in self._empty and not self._needed(module):
                kept[self.batch] = _mapped(_shape_of, kept[self.batch])
                self._empty.add((module, self.batch))

    def _needed(self, module: nn.Module) -> bool:
        """Whether something reads the output where modules are still run; also where that is not known."""
        readers = self._readers.get(module)
        return readers is None or any(
            not any(self.batch in self._kept.get(around, {}) for around in reader) for reader in readers
        )


class _Reads(TorchDispatchMode):
    """Tells of every tensor that an operation takes."""

    def __init__(self, note: Callable[[torch.Tensor], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs or {})):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf)
        return func(*args, **(kwargs or {}))


def _mapped(change: Callable[[torch.Tensor], torch.Tensor], output: Any) -> Any:
    """An output with its tensors changed, and a copy of what else it has."""
    leaves, structure = tree_flatten(output)
    changed = [change(leaf) if isinstance(leaf, torch.Tensor) else copy.deepcopy(leaf) for leaf in leaves]
    return tree_unflatten(changed, structure)


def _shape_of(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of this shape that takes no memory."""
    value = math.nan if tensor.is_floating_point() else 0
    return torch.full((), value, dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)
