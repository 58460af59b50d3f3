"""Prune a trained model, layer by layer, with a few calibration batches."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from torch import nn

from spartan.budgets import CostModel, PricePerBlock
from spartan.nn.selection import Selector, find_weights, select_weights, skipped_weights
from spartan.pruning.base import Pruner
from spartan.pruning.forwards import Call, Forwards, call_with, list_of
from spartan.pruning.layers import Layer, require_plain
from spartan.pruning.plan import plan_of
from spartan.pruning.result import PruningResult
from spartan.pruning.steps import Steps
from spartan.sparsifier.parts import Group, Part, parts_of
from spartan.training.progress import Progress

__all__ = ["prune"]

_COUNTS = ("masked", "model")
_UNCALLED = ("refuse", "skip")


def prune(
    model: nn.Module,
    method: Pruner,
    batches: Iterable[Any] | None = None,
    *,
    include: Selector | None = None,
    exclude: Selector | None = None,
    groups: Sequence[Group] = (),
    count: str = "masked",
    costs: CostModel | PricePerBlock | None = None,
    call: Call | None = None,
    uncalled: str = "refuse",
    errors: bool = True,
    progress: bool | None = None,
) -> PruningResult:
    """Prune the weights of a trained model in place, in one pass over its layers.

    The layers are pruned in the order in which the model calls them. Hooks see what goes into one: the model is run on
    all batches up to that layer and stopped there, in evaluation mode and without gradients, and blocks of layers that
    are done give the output of their last run (`Forwards`). So later layers see the outputs of pruned earlier ones,
    and the statistics of one layer (or of those that share an input) are in memory at a time. They are in float32 at
    least, whatever the dtype of the weights. Modules and names stay; dropped weights are exact zeros.

    Budgets are met exactly, as `Sparsifier` meets them: what is kept never costs more, and less by less than a block.
    With the distribution "global" the budget of each layer is chosen first: a pass over the dense model scores every
    block by the squared error that dropping it adds to the outputs of its rows, each divided by the variance of that
    output, so that all outputs of all layers count alike. All blocks are compared by that (divided by their cost), and
    a layer's budget is what it keeps of them. `Magnitude` compares magnitudes as they are.

    Args:
        model: any module, not sharded; what is pruned by default is what `Sparsifier` masks.
        method: `Magnitude`, `Wanda` or `OBS`; or `DSnoT` or `ADMM` around one of them, or around masks.
        batches: calibration inputs, gone through once and kept: any iterable of mappings (arguments by name), tuples or
            lists (by position), or tensors (the only argument). `Magnitude` needs none.
        include: weights to prune instead of the default, as in `Sparsifier`.
        exclude: weights to leave dense, likewise.
        groups: settings of their own for some, see `spartan.Group`.
        count: what `sparsity` is a fraction of: "masked", the weights that are pruned, or "model", all parameters.
        costs: what a block costs, as in `Sparsifier`; `sparsity` then is the fraction of that cost that is removed.
        call: a function (model, batch) that runs the model, for batches that it does not take as they are.
        uncalled: what to do with a weight whose inputs cannot be seen, as no batch reaches it or its module reads it
            without calling: "refuse", with its name, before anything is changed, or "skip", which leaves it dense.
        errors: report the error of each layer, for which the products of its inputs are summed even where the method
            needs only their squares.
        progress: show how far it is; None: where a person watches.

    Returns:
        What was done, by layer; `print` shows it as a table.

    Raises:
        TypeError: a model, method, selector or batch of the wrong type. ValueError: no weight to prune, a sparsity that
            cannot be reached, no batches, weights or inputs that are not finite, a weight that is never called; the
            model is untouched then, but for inputs that become infinite by what was pruned before them.
        PruningInterrupted: Ctrl-C. Layers before the one it names are pruned, the others dense: the model is valid, and
            so it is after an error of the model's own, of which a warning says where.

    Example::

        result = spartan.prune(model, spartan.Wanda(sparsity=0.5), batches)
        print(result)
    """
    _require(model, method, count, uncalled)
    given = None if batches is None else list_of(batches)
    if method.needs_inputs and given is None:
        raise ValueError(f"batches must be given: {method.name} scores weights by their inputs")
    parts, skipped = _parts(model, method, include, exclude, groups, costs)
    layers = [Layer(weight, part.block_size, part.pattern) for part in parts for weight in part.weights]
    require_plain(layers)
    shown = sys.stdout.isatty() if progress is None else progress
    with ExitStack() as opened:
        forwards = None
        if given is not None:
            forwards = opened.enter_context(Forwards(model, given, layers, call or call_with))
            unseen = {layers[index].name: reason for index, reason in forwards.unseen.items()}
            if method.needs_inputs and unseen:
                parts = _without(parts, unseen, uncalled)
                skipped = {**skipped, **unseen}
        steps = Steps(method, layers, forwards, errors=errors)
        plan = plan_of(model, method.masking, parts, count, costs, steps.scores)
        for planned in plan.values():
            method.require(planned.layer)
        bar = opened.enter_context(Progress(len(plan), 0, shown=shown, label="pruning"))
        return steps.run(plan, skipped, bar)


def _require(model: Any, method: Any, count: str, uncalled: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    if not isinstance(method, Pruner):
        raise TypeError(f"method must be one such as spartan.Wanda(sparsity=0.5); got {method!r}")
    for name, value, allowed in (("count", count, _COUNTS), ("uncalled", uncalled, _UNCALLED)):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


def _parts(
    model: nn.Module,
    method: Pruner,
    include: Selector | None,
    exclude: Selector | None,
    groups: Sequence[Group],
    costs: CostModel | PricePerBlock | None,
) -> tuple[list[Part], dict[str, str]]:
    """The weights to prune by their settings, and why others are not."""
    if method.masking is not None:
        return parts_of(model, method.masking, include, exclude, groups)
    masks = method.masks or {}
    if groups or costs is not None:
        raise ValueError("groups and costs must be left out where masks are given, which leave nothing to choose")
    found = find_weights(model)
    unknown = sorted(set(masks) - {c.name for c in found if c.unfit is None})
    if unknown:
        raise ValueError(f"masks are given for {unknown}, which the model has not, or not to prune")
    if include is None:
        include = list(masks)
    chosen = [c for c in select_weights(model, found, include, exclude) if c.name in masks]
    skipped = skipped_weights(model, found, chosen, include, exclude)
    if not chosen:
        raise ValueError(f"model has no weight to prune; include= can choose others. Skipped: {skipped}")
    return [Part(chosen, (1, 1), "uniform")], skipped


def _without(parts: Sequence[Part], unseen: Mapping[str, str], uncalled: str) -> list[Part]:
    """The parts without weights whose inputs are not seen.

    Raises:
        ValueError: there are such, which `uncalled` refuses, or nothing else.
    """
    if uncalled == "refuse":
        raise ValueError(
            f"the inputs of some weights are not seen: {dict(unseen)}; leave them out with exclude=, or dense with"
            ' uncalled="skip"'
        )
    left = [replace(part, weights=[c for c in part.weights if c.name not in unseen]) for part in parts]
    if not any(part.weights for part in left):
        raise ValueError(f"no weight is left to prune: {dict(unseen)}")
    return [part for part in left if part.weights]
