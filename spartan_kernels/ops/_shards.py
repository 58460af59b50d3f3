"""Lists of DTensors: the shards that this rank solves, the process group that shares the budget, and the way back."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

Costs = Sequence[float | torch.Tensor] | None


@dataclass(frozen=True)
class Shards:
    """Values and costs as this rank passes them to an operator; `layouts` is empty where they were plain tensors.

    A layout is how a DTensor is cut for the solve. It is the tensor's own, but for a tensor replicated over ranks that
    other tensors of the list are sharded over: each of those ranks takes a part of it, so that it counts once.
    """

    values: Sequence[torch.Tensor]
    costs: Costs
    group: ProcessGroup | str | None
    originals: tuple[Any, ...] = ()
    layouts: tuple[tuple[Any, ...], ...] = ()

    def restore(self, masks: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Masks of the local parts as what the values were; differentiable."""
        if not self.layouts:
            return list(masks)
        return [
            _from_local(mask, value, layout).redistribute(value.device_mesh, value.placements)
            for mask, value, layout in zip(masks, self.originals, self.layouts, strict=True)
        ]

    def targets(self, name: str, masks: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Where this rank's parts of `masks` are written: their own memory, or room for a part that `store` brings."""
        if not self.layouts:
            return list(masks)
        if len(masks) != len(self.originals):
            raise ValueError(f"{name} must hold one mask for each of {len(self.originals)} values; got {len(masks)}")
        found = []
        for index, (value, layout) in enumerate(zip(self.originals, self.layouts, strict=True)):
            mask: Any = masks[index]
            where = (value.device_mesh, value.placements, value.shape)
            if not is_dtensor(mask) or (mask.device_mesh, mask.placements, mask.shape) != where:
                raise ValueError(
                    f"{name}[{index}] must be a DTensor of shape {tuple(value.shape)}, placed as its values"
                    f" {value.placements}; got {_described(mask)}"
                )
            own = layout == value.placements
            part = self.values[index]
            found.append(_local(mask) if own else torch.empty(part.shape, dtype=mask.dtype, device=part.device))
        return found

    def store(self, targets: Sequence[torch.Tensor], masks: Sequence[torch.Tensor]) -> None:
        """Copy those of `targets` that are not the masks' own memory into them."""
        for target, mask, value, layout in zip(targets, masks, self.originals, self.layouts, strict=False):
            if layout != value.placements:
                whole = _from_local(target, value, layout).redistribute(value.device_mesh, value.placements)
                _local(mask).copy_(_local(whole))


def is_dtensor(tensor: Any) -> bool:
    """Whether `tensor` is a DTensor, without importing what defines them (it takes seconds)."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def shards(values: Sequence[torch.Tensor], costs: Costs, group: ProcessGroup | str | None) -> Shards:
    """The local parts of a list of DTensors, cut so that every entry belongs to one rank; plain tensors as they are.

    Raises:
        ValueError: DTensors and plain tensors mixed, on several meshes, pending a reduction (`Partial`), or with a
            `group` (theirs is the mesh's); entrywise costs that are not DTensors of their values' shape.
    """
    tensors: list[Any] = list(values)
    if "torch.distributed.tensor" not in sys.modules or not any(is_dtensor(tensor) for tensor in tensors):
        return Shards(tensors, costs, group)
    if group is not None:
        raise ValueError("group must be None where values are DTensors: the ranks are those of their mesh")
    for index, tensor in enumerate(tensors):
        _require_placed(index, tensor, tensors)
    cut = sorted({d for tensor in tensors for d, p in enumerate(tensor.placements) if not p.is_replicate()})
    layouts = tuple(_layout(index, tensor, cut) for index, tensor in enumerate(tensors))
    parts = [_part(tensor, layout) for tensor, layout in zip(tensors, layouts, strict=True)]
    return Shards(
        parts, _cost_parts(costs, tensors, layouts), joint_group(tensors[0].device_mesh, cut), (*tensors,), layouts
    )


def _require_placed(index: int, value: Any, values: list[Any]) -> None:
    if not is_dtensor(value):
        raise ValueError(
            f"values must be all DTensors or all plain tensors; values[{index}] is {_described(value)}"
            " (DTensor.from_local with Replicate() places one that every rank has)"
        )
    if any(placement.is_partial() for placement in value.placements):
        raise ValueError(f"values[{index}] must be redistributed: pending a reduction, {value.placements}")
    first = next(v for v in values if is_dtensor(v))
    if value.device_mesh != first.device_mesh:
        raise ValueError(
            f"values must share a device mesh; values[0] is on {first.device_mesh},"
            f" values[{index}] on {value.device_mesh}"
        )


def _layout(index: int, value: Any, cut: list[int]) -> tuple[Any, ...]:
    from torch.distributed.tensor import Shard

    placements = value.placements
    replicated = [d for d in cut if placements[d].is_replicate()]
    if not replicated:
        return placements
    if value.dim() == 0:
        raise ValueError(f"values[{index}] is 0-dim and replicated: it cannot be cut; give it one dimension")
    taken = {placement.dim for placement in placements if not placement.is_replicate()}
    free = [dim for dim in range(value.dim()) if dim not in taken]
    dim = max(free or range(value.dim()), key=lambda d: value.shape[d])
    return tuple(Shard(dim) if d in replicated else placement for d, placement in enumerate(placements))


def _part(tensor: Any, layout: tuple[Any, ...]) -> torch.Tensor:
    if layout != tensor.placements:
        tensor = tensor.redistribute(tensor.device_mesh, layout)
    return tensor.to_local()


def _local(tensor: Any) -> torch.Tensor:
    with torch.no_grad():
        return tensor.to_local()


def _cost_parts(costs: Costs, values: list[Any], layouts: tuple[tuple[Any, ...], ...]) -> Costs:
    if costs is None or not isinstance(costs, Sequence) or len(costs) != len(values):
        return costs  # refused where all costs are checked
    parts: list[float | torch.Tensor] = []
    for index, (value, layout) in enumerate(zip(values, layouts, strict=True)):
        cost: Any = costs[index]
        if is_dtensor(cost) and (cost.device_mesh, cost.shape) == (value.device_mesh, value.shape):
            parts.append(_part(cost, layout))
        elif not isinstance(cost, torch.Tensor) or (cost.dim() == 0 and not is_dtensor(cost)):
            parts.append(cost)
        else:
            raise ValueError(
                f"costs[{index}] must be a number, a plain 0-dim tensor or a DTensor of shape {tuple(value.shape)} on"
                f" the mesh of its values; got {_described(cost)}"
            )
    return parts


def _from_local(part: torch.Tensor, like: Any, layout: tuple[Any, ...]) -> Any:
    from torch.distributed.tensor import DTensor

    stride = torch.empty(like.shape, device="meta").stride()
    return DTensor.from_local(part, like.device_mesh, layout, run_check=False, shape=like.shape, stride=stride)


def _described(value: Any) -> str:
    if is_dtensor(value):
        return f"a DTensor of shape {tuple(value.shape)}, {value.placements}"
    shape = f" of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else ""
    return f"{type(value).__name__}{shape}"


_joined: WeakKeyDictionary[Any, dict[tuple[int, ...], str]] = WeakKeyDictionary()


def joint_group(mesh: DeviceMesh, dims: list[int]) -> str | None:
    """The name of the process group of this rank along `dims` of the mesh, made on first use where they are several."""
    if not dims:
        return None
    if len(dims) == 1:
        return mesh.get_group(dims[0]).group_name
    import torch.distributed as dist

    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    where = tuple(slice(None) if d in dims else c for d, c in enumerate(coordinate))
    ranks = tuple(mesh.mesh[where].flatten().tolist())
    known = _joined.setdefault(dist.group.WORLD, {})
    if ranks not in known:
        known[ranks] = dist.new_group(list(ranks), use_local_synchronization=True).group_name
    return known[ranks]
