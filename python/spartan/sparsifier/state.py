"""The state of a sparsifier as tensors and plain types: taken, checked wholly, restored over any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from spartan.distributed import is_dtensor, local, placed_on
from spartan.masks import MaskedTensor, MaskSet
from spartan.methods.base import Method
from spartan.nn.wrappers import same_names
from spartan_kernels.arguments import block_grid

__all__ = ["VERSION", "check_state", "load_state", "mask_entries", "state_of"]

VERSION = 2
# Version 1 left out what a merged mask no longer has, and costs at first; the rest is the same.
_READABLE = (1, VERSION)
_GRIDS = ("soft", "hard", "backward")  # one entry per block
_SCALARS = ("beta", "scale", "straight_through", "restricted")  # the scale of a stack: one for each matrix
_OPTIONAL = ("soft", "scale", "backward")
_FLAGS = ("hard", "backward", "straight_through", "restricted")
_HIGHEST = {"soft": 1.0, "beta": math.inf, "scale": math.inf}


def mask_entries(method: Method, masks: MaskSet) -> dict[str, set[str]]:
    """By name of the weight, which of the entries that not every mask has are those of this training."""
    always = {"backward"} if method.masking is not None and method.masking.backward_masks else set()
    return {
        t.name: always | {key for key in _OPTIONAL if getattr(t.carrier, f"mask_{key}") is not None}
        for t in masks.tensors
    }


def state_of(method: Method, masks: MaskSet, entries: dict[str, set[str]]) -> dict[str, Any]:
    """All state, copied. The keys are the same at every step, as `torch.distributed.checkpoint` needs them.

    Masks that tensor parallelism divides are DTensors, of one entry per block of the whole weight; all else is the same
    on every rank.
    """
    return {
        "version": VERSION,
        "method": method.name,
        "settings": method.settings(),
        "total_steps": masks.total_steps,
        "step": masks.step,
        "frozen": masks.frozen,
        "costs": {tensor.name: tensor.cost for tensor in masks.tensors if tensor.cost is not None},
        "initial": [group.initial for group in masks.groups],
        "targets": [group.target for group in masks.groups],
        "solved": [group.solved for group in masks.groups],
        "solver": [group.state.clone() for group in masks.groups],
        "masks": {tensor.name: _tensor_state(tensor, entries[tensor.name]) for tensor in masks.tensors},
    }


def _tensor_state(tensor: MaskedTensor, entries: set[str]) -> dict[str, torch.Tensor]:
    """Masks and their numbers. What a merged mask no longer has is filled in: ones, for `backward` the kept blocks."""
    carrier = tensor.carrier
    scale = carrier.mask_beta.new_ones(carrier.mask_scale_shape)
    absent = {"soft": tensor.mask.soft, "scale": scale, "backward": carrier.mask_hard}
    state = {"hard": carrier.mask_hard, "beta": carrier.mask_beta}
    state["straight_through"] = torch.tensor(carrier.mask_straight_through, device="cpu")
    state["restricted"] = torch.tensor(carrier.mask_backward is not None, device="cpu")
    for key in _OPTIONAL:
        present = getattr(carrier, f"mask_{key}")
        if key == "soft" and present is not None:
            present = tensor.mask.soft  # it may be computed
        if present is not None or key in entries:
            state[key] = absent[key] if present is None else present
    grid = block_grid(tensor.shape, carrier.mask_block_size)
    return {
        key: placed_on(tensor.seen, value.clone(), grid) if key in _GRIDS else value.clone()
        for key, value in state.items()
    }


def check_state(
    state: Any, own: dict[str, Any], entries: dict[str, set[str]], capacities: Sequence[float]
) -> dict[str, Any]:
    """`state` as `load_state` takes it; it may be older, or say the names of a wrapped model.

    Args:
        state: from `state_of`, now or earlier.
        own: the present one.
        entries: from `mask_entries`.
        capacities: of the groups of masks: the most that each can keep.

    Raises:
        ValueError: it cannot be restored where `own` is the present state; what differs is named.
    """
    if isinstance(state, dict) and state.get("version") == 1:
        state = {"costs": {}, "initial": own["initial"], **state}
    if not isinstance(state, dict) or set(state) != set(own):
        found = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"state must have the entries {sorted(own)}; got {found}")
    if state["version"] not in _READABLE:
        raise ValueError(f"state is of another training: its version is {state['version']!r}, here it is {VERSION}")
    state = _with_plain_names(state, own)
    for key in ("method", "settings", "total_steps", "costs"):
        if state[key] != own[key]:
            theirs, ours = _difference(state[key], own[key])
            raise ValueError(f"state is of another training: its {key} is {theirs!r}, here it is {ours!r}")
    for key, kind in (("step", int), ("frozen", bool), ("masks", dict)):
        if type(state[key]) is not kind:
            raise ValueError(f"state has a wrong entry {key!r}: {state[key]!r}; it must be of type {kind.__name__}")
    if state["step"] < 0:
        raise ValueError(f"state has a wrong entry 'step': {state['step']}; it must be at least 0")
    theirs, ours = state["masks"], own["masks"]
    if set(theirs) != set(ours):
        raise ValueError(f"state is of another model: it masks {sorted(theirs)}, here {sorted(ours)} are masked")
    for name in ours:
        # Version 1 has no mask for the gradient where there is none at that step.
        needed = {"hard", "beta"} | (set() if state["frozen"] else entries[name] - {"backward"})
        _check_tensor(name, theirs[name], needed, ours[name])
    if state["targets"] != own["targets"]:
        raise ValueError(f"state is of another model: budgets {state['targets']}, here {own['targets']}")
    _check_groups(state, own, capacities)
    return state


def _difference(theirs: Any, ours: Any) -> tuple[Any, Any]:
    """Of two mappings what they do not share, else both as they are."""
    if not isinstance(theirs, dict) or not isinstance(ours, dict):
        return theirs, ours
    return tuple({k: v for k, v in a.items() if k not in b or b[k] != v} for a, b in ((theirs, ours), (ours, theirs)))  # type: ignore[return-value]


def _with_plain_names(state: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A state with the names of `own`, where it has those of wrapped modules in them, as older ones do."""
    masks, costs, settings = state["masks"], state["costs"], state["settings"]
    if not all(isinstance(part, dict) and all(isinstance(key, str) for key in part) for part in (masks, costs)):
        return state
    names = same_names(masks, own["masks"])
    if not names:
        return state
    named = settings.get("distribution") if isinstance(settings, dict) else None
    if isinstance(named, dict):
        patterns = same_names(named, own["settings"].get("distribution", ()))
        settings = {**settings, "distribution": {patterns.get(key, key): part for key, part in named.items()}}
    masks, costs = ({names.get(key, key): part for key, part in parts.items()} for parts in (masks, costs))
    return {**state, "masks": masks, "costs": costs, "settings": settings}


def _check_tensor(name: str, state: Any, needed: set[str], own: dict[str, torch.Tensor]) -> None:
    if not isinstance(state, dict):
        raise ValueError(f"state of {name!r} must be a dict; got {type(state).__name__}")
    for key in sorted(needed | set(state)):
        value = state.get(key)
        if key not in _GRIDS + _SCALARS or not isinstance(value, torch.Tensor):
            raise ValueError(f"state of {name!r} has a wrong entry {key!r}")
        like = own["hard"] if key in _GRIDS else own.get(key)
        wanted = () if like is None else tuple(like.shape)
        if tuple(value.shape) != wanted:
            raise ValueError(
                f"state is of another model: {key} of {name!r} has shape {tuple(value.shape)}, here {wanted}"
            )
        if value.dtype is not torch.bool if key in _FLAGS else not value.is_floating_point():
            raise ValueError(f"state of {name!r} has a wrong entry {key!r}: its dtype is {value.dtype}")
        if key not in _FLAGS and (outside := _outside(value, _HIGHEST[key])):
            allowed = "in [0, 1]" if key == "soft" else "finite and at least 0"
            raise ValueError(f"state of {name!r} has a wrong entry {key!r}: {outside} values are not {allowed}")


def _outside(values: Any, highest: float) -> int:
    """How many values are not in [0, highest], or not finite; the same on all ranks that share a DTensor."""
    wrong: Any = (~((values >= 0) & (values <= highest) & (values < math.inf))).sum()
    return int(wrong.full_tensor() if is_dtensor(wrong) else wrong)


def _check_groups(state: dict[str, Any], own: dict[str, Any], capacities: Sequence[float]) -> None:
    for key in ("solved", "solver", "initial"):
        if not isinstance(state[key], Sequence) or len(state[key]) != len(own[key]):
            raise ValueError(f"state must have {len(own[key])} entries in {key!r}; got {state[key]!r}")
    for solved in state["solved"]:
        if type(solved) is not bool:
            raise ValueError(f"state has a wrong entry 'solved': {solved!r}; it must be of type bool")
    for initial, most in zip(state["initial"], capacities, strict=True):
        if type(initial) not in (int, float) or not 0 < initial <= most:
            raise ValueError(f"state has a wrong entry 'initial': {initial!r}; it must be a number in (0, {most}]")
    for solver, wanted in zip(state["solver"], own["solver"], strict=True):
        if not isinstance(solver, torch.Tensor) or (solver.shape, solver.dtype) != (wanted.shape, wanted.dtype):
            raise ValueError(f"state has a wrong entry 'solver': {solver!r}; it must be {wanted.dtype} {wanted.shape}")


def load_state(state: dict[str, Any], masks: MaskSet) -> None:
    """Restore what `check_state` accepts."""
    masks.step, masks.frozen = state["step"], state["frozen"]
    for group, initial in zip(masks.groups, state["initial"], strict=True):
        group.initial = float(initial)
    for group, solved, solver in zip(masks.groups, state["solved"], state["solver"], strict=True):
        group.solved = bool(solved)
        group.state = solver.to(device=group.device, copy=True)
    for tensor in masks.tensors:
        _load_tensor(tensor, state["masks"][tensor.name], masks.frozen)
    for group in masks.groups if not masks.frozen else ():
        group.place_solution()


def _load_tensor(tensor: MaskedTensor, state: dict[str, torch.Tensor], frozen: bool) -> None:
    carrier, seen = tensor.carrier, tensor.seen
    found: dict[str, torch.Tensor | None] = {}
    for key in _OPTIONAL:
        absent = frozen or (key == "backward" and not state.get("restricted", True))
        value = None if absent else state.get(key)
        if value is not None:
            dtype = torch.bool if key == "backward" else seen.dtype
            value = _here(tensor, value).to(seen.device, dtype, copy=True)
        found[key] = value
    carrier.set_soft(found["soft"], found["scale"])
    carrier.mask_backward = found["backward"]
    carrier.mask_hard.copy_(_here(tensor, state["hard"]))
    carrier.mask_beta.copy_(state["beta"])
    carrier.mask_straight_through = bool(state.get("straight_through", "soft" in state))
    carrier.masks_changed()


def _here(tensor: MaskedTensor, value: Any) -> torch.Tensor:
    """What this rank's module computes with of a mask of the whole weight, however that is placed."""
    seen = tensor.seen
    if is_dtensor(value):
        if (value.device_mesh, tuple(value.placements)) == (seen.mesh, seen.placements):
            return local(value)
        value = value.full_tensor()
    return value if value.dim() == 0 else seen.slice_of(value)
