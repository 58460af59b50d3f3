"""Which weights of a model are masked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

__all__ = ["Candidate", "Selector", "select_weights"]

Selector = str | Sequence[str] | Callable[[str, nn.Module], bool]

_DEFAULT_TYPES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# These read `.weight` of their children instead of calling them (the second in its inference fast path).
_READS_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


@dataclass(frozen=True)
class Candidate:
    """A weight that can be masked.

    Attributes:
        name: of the parameter, "layers.0.weight".
        module: the module that has it.
        parametrized: its masked value must be what `.weight` gives, not only what the module's forward uses.
    """

    name: str
    module: nn.Module
    parametrized: bool


def select_weights(model: nn.Module, include: Selector | None, exclude: Selector | None) -> list[Candidate]:
    """The weights to mask, in definition order.

    By default those of exact types Linear, Conv1d, Conv2d and Conv3d, except the classifier head, which is
    the last Linear in definition order. `include` replaces that choice (any module with a floating-point
    `weight` of at least two dimensions, the head too) and `exclude` takes from it. Both are patterns for
    names of weights ("blocks.*.weight"), or a function of the weight's name and the module. A parameter
    shared by two modules is never chosen by default.

    Raises:
        ValueError: nothing is left to mask, a pattern that matches no weight, or a shared parameter asked for
        by name.
    """
    candidates, shared = _candidates(model)
    if include is None:
        chosen = _default(model, candidates, shared)
    else:
        chosen = [c for c in candidates if _matches(include, c)]
        _require_used("include", include, candidates)
        for candidate in chosen:
            if id(candidate.module.weight) in shared:
                raise ValueError(f"include chooses {candidate.name!r}, which several modules share; exclude it")
    if exclude is not None:
        _require_used("exclude", exclude, candidates)
        chosen = [c for c in chosen if not _matches(exclude, c)]
    if not chosen:
        raise ValueError(
            "model has no weight to sparsify: by default weights of Linear and Conv layers except the last Linear are"
            f" masked; include= can choose others among {[c.name for c in candidates] or 'none'}"
        )
    return chosen


def _candidates(model: nn.Module) -> tuple[list[Candidate], set[int]]:
    """All weights that can be masked, and the ids of parameters that occur more than once."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    found = []
    for path, module in model.named_modules():
        if hasattr(module, "mask_hard") or hasattr(module, "parametrizations"):
            raise ValueError(f"model has a masked or parametrized module already: {path!r}; finalize it first")
        weight = module._parameters.get("weight")
        if weight is None or isinstance(weight, nn.UninitializedParameter):
            continue
        if weight.dim() >= 2 and weight.is_floating_point() and weight.numel():
            parent = model.get_submodule(path.rpartition(".")[0])
            name = f"{path}.weight" if path else "weight"
            found.append(Candidate(name, module, isinstance(parent, _READS_WEIGHTS)))
    return found, {key for key, count in uses.items() if count > 1}


def _default(model: nn.Module, candidates: list[Candidate], shared: set[int]) -> list[Candidate]:
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    head = linears[-1] if linears else None
    return [
        c
        for c in candidates
        if type(c.module) in _DEFAULT_TYPES and c.module is not head and id(c.module.weight) not in shared
    ]


def _matches(selector: Selector, candidate: Candidate) -> bool:
    if callable(selector):
        return bool(selector(candidate.name, candidate.module))
    return any(fnmatchcase(candidate.name, pattern) for pattern in _patterns(selector))


def _patterns(selector: str | Sequence[str]) -> list[str]:
    patterns = [selector] if isinstance(selector, str) else list(selector)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"include and exclude take names, patterns or a function; got {selector!r}")
    return patterns


def _require_used(argument: str, selector: Selector, candidates: list[Candidate]) -> None:
    if callable(selector):
        return
    for pattern in _patterns(selector):
        if not any(fnmatchcase(candidate.name, pattern) for candidate in candidates):
            raise ValueError(
                f"{argument} pattern {pattern!r} matches no weight of two or more dimensions; the model has"
                f" {[c.name for c in candidates]}"
            )


def common_kind(weights: Sequence[torch.Tensor]) -> None:
    """Raise ValueError unless all weights share a dtype and a device, which one solve over them needs."""
    kinds = {(weight.dtype, weight.device) for weight in weights}
    if len(kinds) > 1:
        raise ValueError(f"masked weights must share a dtype and a device; got {sorted(map(str, kinds))}")
