"""Statistics of batch normalisation, measured again after pruning."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from spartan.budgets import one_forward
from spartan.pruning.forwards import Call, call_with, list_of

__all__ = ["recalibrate"]

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def recalibrate(model: nn.Module, batches: Iterable[Any], *, call: Call | None = None) -> list[str]:
    """Measure the running means and variances of all BatchNorm modules again, as pruning changes what they see.

        mean <- mean over batches of E[x],        var <- mean over batches of Var(x)

    Only those modules are in training mode meanwhile, and no weight changes. Modules that follow one see inputs
    normalised by the batch, as in training.

    Args:
        model: any module.
        batches: gone through once, as in `prune`; each of a size as in training.
        call: a function (model, batch) that runs the model, for batches that it does not take as they are.

    Returns:
        Names of the modules measured again. One that no batch reaches keeps its statistics and is not named.

    Raises:
        ValueError: no batches, a model without BatchNorm that keeps statistics, inputs that are not finite. Whatever is
            raised, the statistics are as before.

    Example::

        spartan.prune(model, spartan.OBS(sparsity=0.8), batches)
        spartan.recalibrate(model, batches)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    norms = {name: m for name, m in model.named_modules() if isinstance(m, _NORMS) and m.track_running_stats}
    if not norms:
        raise ValueError("model must have a BatchNorm module that keeps statistics; it has none")
    given = list_of(batches)
    before = {name: {k: v.clone() for k, v in norm.named_buffers(recurse=False)} for name, norm in norms.items()}
    try:
        with one_forward(model), ExitStack() as stack, torch.compiler.set_stance("force_eager"):
            for norm in norms.values():
                stack.callback(setattr, norm, "momentum", norm.momentum)
                norm.reset_running_stats()
                norm.momentum = None  # the mean over all batches
                norm.training = True
            for batch in given:
                (call or call_with)(model, batch)
        reached = {name for name, norm in norms.items() if int(norm.num_batches_tracked or 0)}
        for name in sorted(reached):
            own = dict(norms[name].named_buffers(recurse=False))
            if not bool((own["running_mean"] + own["running_var"]).isfinite().all()):
                raise ValueError(f"batches must make finite inputs; those of {name!r} are not")
    except BaseException:
        _restore(norms, before, norms)
        raise
    _restore(norms, before, set(norms) - reached)
    return [name for name in norms if name in reached]


def _restore(norms: dict[str, Any], before: dict[str, dict[str, torch.Tensor]], which: Iterable[str]) -> None:
    for name in which:
        for key, value in before[name].items():
            getattr(norms[name], key).copy_(value)
