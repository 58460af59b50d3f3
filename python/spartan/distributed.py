"""Weights whose values lie on several ranks: the part that this rank trains, and what the ranks exchange about it.

Two things divide a weight. FSDP2 cuts it for storage, and gathers it for forward and backward: the tensor that a module
computes with is whole. Tensor parallelism cuts it for good: each rank computes with a slice. Masks are kept as the
module computes with them, whole or by slice, so that forward and backward exchange nothing for them; what chooses the
masks runs on the parts.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from spartan_kernels.groups import gather, summed
from spartan_kernels.ops import is_dtensor, joint_group

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "Seen",
    "Shard",
    "fill",
    "fsdp_modules",
    "group_of_passes",
    "heed_in_ddp",
    "ignore_in_ddp",
    "is_dtensor",
    "largest",
    "least_positive",
    "local",
    "own_class",
    "placed_as",
    "placed_on",
    "require_aligned",
    "reshard",
    "seen_weights",
    "set_own_class",
    "shard_of",
    "total_over",
    "totals_over",
]

_IGNORED = "_ddp_params_and_buffers_to_ignore"  # where DistributedDataParallel looks
# What one exchange of masks takes at most on each rank, unless a single mask is larger.
_BUCKET_BYTES = 1 << 26


@dataclass(frozen=True)
class Seen:
    """The tensor that a module computes with on this rank: its shape, and its slice of the whole where it is one."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    mesh: DeviceMesh | None = None
    placements: tuple[Any, ...] = ()

    @classmethod
    def of(cls, weight: Any) -> Seen:
        """What `weight` is now."""
        if not is_dtensor(weight):
            return cls(weight.shape, weight.dtype, weight.device)
        own = local(weight)
        return cls(own.shape, own.dtype, own.device, weight.device_mesh, tuple(weight.placements))

    @property
    def like(self) -> torch.Tensor:
        """A tensor of this shape, dtype and device that takes no memory."""
        return torch.empty((), dtype=self.dtype, device=self.device).expand(self.shape)

    def slice_of(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's slice of a tensor that each rank has, the same, on the grid of the whole weight's blocks."""
        if self.mesh is None:
            return whole
        from torch.distributed.tensor import distribute_tensor

        return local(distribute_tensor(whole, self.mesh, self.placements))


@dataclass(frozen=True)
class Shard:
    """What this rank trains of the tensor it computes with: entries start to start + length along `dim`.

    Attributes:
        size: of the tensor along `dim`. most: the largest `length` of any rank. cut: name of the group of ranks that
            have its other parts; empty if it is whole here. split: name of the group of ranks that compute with other
            slices of the weight. ranks: of both.
    """

    dim: int = 0
    start: int = 0
    length: int = 0
    size: int = 0
    most: int = 0
    cut: str = ""
    split: str = ""
    ranks: str = ""

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This part of a tensor of the computation's shape; a view."""
        return tensor.narrow(self.dim, self.start, self.length) if self.cut else tensor

    def blocks(self, grid: torch.Tensor, block_size: tuple[int, int]) -> tuple[torch.Tensor, int]:
        """The blocks that this part touches, and how many of the first one's entries along `dim` lie before it."""
        side = block_size[self.dim] if self.dim < 2 else 1
        first, end = self.start // side, math.ceil((self.start + self.length) / side)
        return grid.narrow(self.dim, first, max(end - first, 0)), self.start - first * side


def fill(masks: Sequence[tuple[torch.Tensor, Shard]]) -> None:
    """Bring the other ranks' parts of tensors of the computation's shape here, several in one exchange."""
    bucket: list[tuple[torch.Tensor, Shard]] = []
    room = 0
    for mask, shard in masks:
        if bucket and (shard.cut != bucket[0][1].cut or room < mask.nbytes):
            _exchange(bucket)
            bucket = []
        room = _BUCKET_BYTES if not bucket else room
        if shard.cut:
            bucket.append((mask, shard))
            room -= mask.nbytes
    if bucket:
        _exchange(bucket)


def _exchange(masks: list[tuple[torch.Tensor, Shard]]) -> None:
    group = masks[0][1].cut
    sent, shapes = [], []
    for mask, shard in masks:
        own = shard.of(mask).movedim(shard.dim, 0)
        rows = own.new_zeros((shard.most, *own.shape[1:]))
        rows[: shard.length] = own
        sent.append(rows.flatten().view(torch.uint8))
        shapes.append(rows.shape)
    every = gather(torch.cat(sent), group).split([part.numel() for part in sent], dim=1)
    for (mask, shard), shape, parts in zip(masks, shapes, every, strict=True):
        whole = parts.contiguous().view(mask.dtype).reshape(-1, *shape[1:])[: shard.size]
        mask.movedim(shard.dim, 0).copy_(whole)


def local(tensor: Any) -> torch.Tensor:
    """This rank's values of a DTensor, the same memory; a plain tensor as it is. Without a graph."""
    return tensor.detach().to_local() if is_dtensor(tensor) else tensor.detach()


def placed_as(weight: Any, values: torch.Tensor) -> Any:
    """`values` of this rank as a DTensor placed as `weight` is; differentiable."""
    from torch.distributed.tensor import DTensor

    mesh, placements = weight.device_mesh, weight.placements
    return DTensor.from_local(values, mesh, placements, run_check=False, shape=weight.shape, stride=weight.stride())


def placed_on(seen: Seen, values: torch.Tensor, shape: Sequence[int]) -> Any:
    """`values` that belong to what a module computes with: a DTensor of `shape` where that is a slice."""
    if seen.mesh is None:
        return values
    from torch.distributed.tensor import DTensor

    size = torch.Size(shape)
    stride = torch.empty(size, device="meta").stride()
    return DTensor.from_local(values, seen.mesh, seen.placements, run_check=False, shape=size, stride=stride)


def shard_of(name: str, weight: Any, seen: Seen) -> Shard:
    """What this rank trains of the weight `name`, which its module computes with as `seen`.

    Raises:
        ValueError: a weight that FSDP cuts along several dimensions of its mesh, or that is divided otherwise than it
            divides weights.
    """
    if not is_dtensor(weight):
        return Shard()
    mesh, placements = weight.device_mesh, weight.placements
    stored = mesh.ndim - (seen.mesh.ndim if seen.mesh is not None else 0)
    cuts = [d for d in range(stored) if not placements[d].is_replicate()]
    splits = [stored + d for d, p in enumerate(seen.placements) if not p.is_replicate()]
    if len(cuts) > 1:
        raise ValueError(f"weight {name!r} must be cut by FSDP along one dimension of its mesh; got {placements}")
    split, ranks = (joint_group(mesh, dims) or "" for dims in (splits, cuts + splits))
    if not cuts:
        return Shard(split=split, ranks=ranks)
    dim = placements[cuts[0]].dim
    size = seen.shape[dim]
    each = math.ceil(size / mesh.size(cuts[0]))
    start = min(each * mesh.get_local_rank(cuts[0]), size)
    shard = Shard(dim, start, min(each, size - start), size, each, joint_group(mesh, cuts) or "", split, ranks)
    expected = (*seen.shape[:dim], shard.length, *seen.shape[dim + 1 :])
    if tuple(local(weight).shape) != expected:
        raise ValueError(
            f"weight {name!r} must be divided as fully_shard does, into {expected} here; got"
            f" {tuple(local(weight).shape)}, {placements} (call parallelize_module before Sparsifier)"
        )
    return shard


def fsdp_modules(model: nn.Module) -> list[Any]:
    """The modules of `model` that `fully_shard` was applied to, without importing it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, under the one that `fully_shard` puts before it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = type(module)
    return kind.__bases__[1] if fsdp is not None and issubclass(kind, fsdp.FSDPModule) else kind


def set_own_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Make `module` a `kind`, under the class that `fully_shard` put before its own."""
    now = type(module)
    if own_class(module) is not now:
        key = now, kind
        if key not in _SHARDED:
            members = {"__deepcopy__": now.__deepcopy__}  # type: ignore[attr-defined]
            _SHARDED[key] = type(f"FSDP{kind.__name__}", (now.__bases__[0], kind), members)
        kind = _SHARDED[key]
    object.__setattr__(module, "__class__", kind)


_SHARDED: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def reshard(model: nn.Module) -> None:
    """Have the modules hold the parameters that are trained, not what FSDP gathered for the last forward pass."""
    for module in fsdp_modules(model):
        module.reshard()


def require_aligned(name: str, weight: torch.Tensor, seen: Seen, block_size: tuple[int, int]) -> None:
    """Raise ValueError where tensor parallelism divides a block of the weight `name`: no rank could compute with it."""
    size = list(weight.shape)
    for index, placement in enumerate(seen.placements):
        if seen.mesh is None or placement.is_replicate():
            continue
        dim = placement.dim
        size[dim] = math.ceil(size[dim] / seen.mesh.size(index))
        if dim < 2 and size[dim] % block_size[dim]:
            raise ValueError(
                f"weight {name!r} of shape {tuple(weight.shape)} has blocks of {block_size}, which do not divide the"
                f" {size[dim]} entries along dimension {dim} that tensor parallelism gives each rank; choose another"
                " block_size, or leave it out with exclude="
            )


def ignore_in_ddp(model: nn.Module, names: Sequence[str]) -> None:
    """Have `DistributedDataParallel` not broadcast these buffers before each pass: every rank has the same."""
    ignored = set(getattr(model, _IGNORED, ())) | set(names)
    setattr(model, _IGNORED, sorted(ignored))


def heed_in_ddp(model: nn.Module, names: Sequence[str]) -> None:
    """Undo `ignore_in_ddp`."""
    ignored = sorted(set(getattr(model, _IGNORED, ())) - set(names))
    if ignored:
        setattr(model, _IGNORED, ignored)
    elif hasattr(model, _IGNORED):
        delattr(model, _IGNORED)


def seen_weights(model: nn.Module, uses: Sequence[tuple[nn.Module, str]]) -> list[Seen]:
    """What modules compute with as the parameters of these names; FSDP gathers its units for that, one by one."""
    reshard(model)
    stored: list[Any] = [getattr(module, name) for module, name in uses]
    seen = [Seen.of(weight) for weight in stored]
    for unit in fsdp_modules(model):
        unit.unshard()
        for index, (module, name) in enumerate(uses):
            gathered: Any = getattr(module, name)
            if gathered is not stored[index]:
                # Masks have the dtype of what is trained, which need not be that of the computation.
                seen[index] = replace(Seen.of(gathered), dtype=stored[index].dtype)
        unit.reshard()
    return seen


def group_of_passes(weight: Any) -> str:
    """Name of the group of ranks that share out a batch for `weight`: those of its mesh, else all; empty: one."""
    if is_dtensor(weight):
        return joint_group(weight.device_mesh, list(range(weight.device_mesh.ndim))) or ""
    import torch.distributed as dist

    world = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    return "" if world is None else world.group_name


def largest(values: Sequence[torch.Tensor], name: str) -> torch.Tensor:
    """The largest of all entries, which are at least 0, over the ranks of the group `name`."""
    own = torch.stack([v.max() if v.numel() else v.new_zeros(()) for v in values]).max()
    return gather(own, name).max()


def least_positive(values: Sequence[torch.Tensor], name: str) -> torch.Tensor:
    """The least of all entries above 0 over the ranks of the group `name`; infinite if there is none."""
    own = torch.stack([v.where(v > 0, math.inf).min() if v.numel() else v.new_full((), math.inf) for v in values]).min()
    return gather(own, name).min()


def totals_over(tensors: Sequence[torch.Tensor], name: str) -> list[torch.Tensor]:
    """Sums of several tensors of one dtype over the ranks of the group `name`, in one exchange."""
    if not name:
        return list(tensors)
    every = summed(torch.cat([tensor.reshape(-1) for tensor in tensors]), name)
    parts = every.split([tensor.numel() for tensor in tensors])
    return [part.reshape(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def total_over(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Sum over the ranks of the group `name`, the same bits on all of them."""
    return summed(tensor, name)
