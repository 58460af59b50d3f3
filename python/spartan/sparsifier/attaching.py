"""Optimizers that a sparsifier is attached to: found under wrappers, hooked, together one step of its masks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import TensorWeakRef

from spartan.distributed import local
from spartan.masks import MaskedTensor, MaskSet

__all__ = ["Attachment", "training", "unwrapped_optimizers"]

_HOOKS = "_optimizer_step_pre_hooks"


def unwrapped_optimizers(optimizers: Sequence[Any]) -> tuple[torch.optim.Optimizer, ...]:
    """The optimizers themselves, without what Accelerate, Lightning and their like put around them.

    Raises:
        TypeError: something that is no optimizer, or none at all.
    """
    if not optimizers:
        raise TypeError("optimizer must be a torch.optim.Optimizer, or several; got none")
    return tuple(_unwrapped(optimizer) for optimizer in optimizers)


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    inner = optimizer
    while not _runs_hooks(inner) and hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not isinstance(inner, torch.optim.Optimizer) or not _runs_hooks(inner):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer; got {type(optimizer).__name__}")
    return inner


def _runs_hooks(optimizer: Any) -> bool:
    """Whether its `step` runs hooks: wrappers look like optimizers, but were never initialised as one."""
    return _HOOKS in getattr(optimizer, "__dict__", {})


class Attachment:
    """Hooks in the optimizers that train the masked weights.

    One round, in which each of them steps once after a common backward pass, is one step of the masks: `correct` is
    called before the first of them steps, or in its closure, and `advance` when the last one has.

    Args:
        optimizers: from `unwrapped_optimizers`.
        masks: what they train.
        correct: completes all gradients of masked weights.
        advance: moves the masks.
        ready: called first at each step.

    Raises:
        ValueError: an optimizer that cannot be followed, or has none of the masked weights; a masked weight in none.
    """

    def __init__(
        self,
        optimizers: tuple[torch.optim.Optimizer, ...],
        masks: MaskSet,
        correct: Callable[[], None],
        advance: Callable[[], None],
        ready: Callable[[], None],
    ) -> None:
        for optimizer in optimizers:
            _require_followed(optimizer)
        self._trained = _trained_by(optimizers, masks.tensors)
        self._masks, self._correct, self._advance, self._ready = masks, correct, advance, ready
        self._optimizers = optimizers
        self._waiting: set[int] = set()  # those that have not stepped in this round
        self._skipped = False  # a step of this round that an optimizer leaves out by itself
        self._closure_ran = True  # that of the present step, if it has one
        self._gradients: dict[int, list[tuple[TensorWeakRef | None, int]]] = {}
        self._finite: dict[int, torch.Tensor] = {}
        self._handles: list[RemovableHandle] = []
        for optimizer in optimizers:
            self._handles += [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
            ]

    def remove(self) -> None:
        """Take the hooks out."""
        for handle in self._handles:
            handle.remove()

    def _before_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _inside_step(optimizer):
            return None
        self._ready()
        index = self._optimizers.index(optimizer)
        key = "closure" if kwargs.get("closure") is not None else _position(args)
        skipped = self._masks.step_skipped()
        self._closure_ran = True
        if key is None:
            self._begin(index, skipped)
            return None
        self._closure_ran = False
        if isinstance(key, str):
            return args, {**kwargs, key: self._followed(kwargs[key], index, skipped)}
        return (*args[:key], self._followed(args[key], index, skipped), *args[key + 1 :]), kwargs

    def _followed(self, closure: Callable[[], Any], index: int, skipped: bool) -> Callable[[], Any]:
        """The closure, after which gradients are as the optimizer reads them."""

        def closure_then_correct() -> Any:
            if self._closure_ran:
                raise RuntimeError(
                    f"{type(self._optimizers[index]).__name__} calls its closure more than once in a step, but masks"
                    " and corrected gradients are of one point; use an optimizer that computes the gradient once"
                )
            loss = closure()
            self._closure_ran = True
            with torch.no_grad():
                self._begin(index, skipped)
            return loss

        return closure_then_correct

    def _begin(self, index: int, skipped: bool) -> None:
        """Final gradients are there, of all optimizers: correct them, once in a round."""
        several = len(self._optimizers) > 1
        if self._waiting and several and not (index in self._waiting and self._unchanged(index)):
            self._require_left_out()
            self._waiting = set()
        opens = not self._waiting or not several
        if opens:
            self._waiting = set(range(len(self._optimizers)))
            self._skipped = False
            if several:
                self._finite = {i: _all_finite(optimizer) for i, optimizer in enumerate(self._optimizers)}
        self._skipped = self._skipped or skipped
        if opens and not skipped:
            self._correct()
        if opens and several:
            self._gradients = {i: [_identity(t.weight.grad) for t in own] for i, own in enumerate(self._trained)}

    def _after_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _inside_step(optimizer):
            return
        if not self._closure_ran:
            raise RuntimeError(
                f"{type(optimizer).__name__} did not call the closure of its step, so its gradients were not corrected;"
                " call backward before step() instead"
            )
        self._ready()
        self._waiting.discard(self._optimizers.index(optimizer))
        if not self._waiting and not self._skipped:
            self._advance()

    def _unchanged(self, index: int) -> bool:
        """Whether the gradients of this optimizer's masked weights are those of the round's beginning."""
        now = (_identity(tensor.weight.grad) for tensor in self._trained[index])
        before = self._gradients[index]
        return all(_same(old, new) for old, new in zip(before, now, strict=True))

    def _require_left_out(self) -> None:
        """Raise unless those that made no step in this round had no finite gradients to make it with."""
        for index in sorted(self._waiting):
            if bool(self._finite[index]):
                raise RuntimeError(
                    "attached optimizers must each step once after a common backward pass, as masks move when all have;"
                    f" number {index + 1} ({type(self._optimizers[index]).__name__}) did not, or its gradients changed"
                    " after the first of them stepped. Call backward, and GradScaler.unscale_ for each, before the"
                    " first step; for losses of their own, make a Sparsifier for each"
                )


def _position(args: tuple[Any, ...]) -> int | None:
    """Where a closure is among the arguments, of which the first is the optimizer."""
    return next((place for place, value in enumerate(args) if place and callable(value)), None)


def _inside_step(optimizer: Any) -> bool:
    """Whether this `step` is part of another, as where that of a subclass calls its base's: both run hooks.

    Told from the calls in progress, so that a step which an exception broke off leaves nothing behind.
    """
    if sum("step" in vars(kind) for kind in type(optimizer).__mro__ if kind is not torch.optim.Optimizer) < 2:
        return False
    hooked = getattr(type(optimizer).step, "__code__", None)
    running, frame = 0, sys._getframe()
    while frame is not None and running < 2:
        running += frame.f_code is hooked and frame.f_locals["args"][0] is optimizer
        frame = frame.f_back  # type: ignore[assignment]
    return running == 2


def _require_followed(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError for an optimizer whose steps have no moment between final gradients and update."""
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "optimizer must compute one gradient for each step; LBFGS searches along a line with many, and its history"
            " does not survive a change of masks. Use AdamW, SGD or another of first order"
        )
    if getattr(optimizer, "_overlap_with_ddp", False):
        raise ValueError(
            f"optimizer must step after the backward pass; {type(optimizer).__name__} with overlap_with_ddp=True steps"
            " during it, before all gradients are there. Leave overlap_with_ddp out"
        )


def _trained_by(
    optimizers: Sequence[torch.optim.Optimizer], tensors: Sequence[MaskedTensor]
) -> list[list[MaskedTensor]]:
    """The masked weights of each optimizer."""
    held = [{id(p) for group in optimizer.param_groups for p in group["params"]} for optimizer in optimizers]
    trained = [[tensor for tensor in tensors if id(tensor.weight) in own] for own in held]
    if tensors and not any(trained):
        raise ValueError("optimizer has none of the masked weights; attach the one that trains this model")
    for number, own in enumerate(trained, 1):
        if tensors and not own:
            raise ValueError(
                f"optimizer number {number} ({type(optimizers[number - 1]).__name__}) has none of the masked weights;"
                " attach only those that train some"
            )
    for tensor in tensors:
        if tensor.weight.requires_grad and not any(id(tensor.weight) in own for own in held):
            raise ValueError(
                f"masked weight {tensor.name!r} is in none of the attached optimizers and would train on gradients that"
                " are not corrected; attach all that train masked weights, attach(first, second), or leave it out of"
                " the masks with exclude="
            )
    return trained


def _identity(gradient: torch.Tensor | None) -> tuple[TensorWeakRef | None, int]:
    """What tells a gradient from another or a changed one, and keeps no memory."""
    return (None, 0) if gradient is None else (TensorWeakRef(gradient), gradient._version)


def _same(old: tuple[TensorWeakRef | None, int], new: tuple[TensorWeakRef | None, int]) -> bool:
    if old[0] is None or new[0] is None:
        return old[0] is new[0]
    return old[1] == new[1] and old[0]() is new[0]()


def training(optimizers: Sequence[Any], weights: Iterable[nn.Parameter]) -> list[Any]:
    """Those of `optimizers` that train some of the weights; all, where none does."""
    wanted = {id(weight) for weight in weights}
    some = [o for o in optimizers if any(id(p) in wanted for group in o.param_groups for p in group["params"])]
    return some or list(optimizers)


def _all_finite(optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """Whether all its gradients are finite, on the device: no step waits for it."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    sums = [local(gradient).sum(dtype=torch.float64) for gradient in gradients]
    return torch.stack([s.isfinite() for s in sums]).all() if sums else torch.tensor(True, device="cpu")
