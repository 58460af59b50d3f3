"""Process groups: their names as operators take them, and the one exchange that a solve over ranks needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def group_name(group: ProcessGroup | str | None) -> str:
    """The name under which `torch.distributed` knows a group; empty for None, this process alone.

    Raises:
        TypeError: `group` is something else.
    """
    if group is None:
        return ""
    name = group if isinstance(group, str) else getattr(group, "group_name", None)
    if not isinstance(name, str):
        raise TypeError(
            f"group must be a torch.distributed process group, its name or None; got {type(group).__name__}"
        )
    return name


def refuse_group(name: str, backend: str) -> None:
    """Raise ValueError where a backend that solves alone is given a group."""
    if name:
        raise ValueError(f"group is not served by this backend; got backend={backend!r}")


def process_group(name: str) -> ProcessGroup:
    """The process group called `name`."""
    from torch.distributed import distributed_c10d

    found: ProcessGroup = distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type]
    return found


def gather(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """The tensors of all ranks, of one shape and dtype, stacked in the ranks' order: the same bits on every rank."""
    import torch.distributed as dist

    group = process_group(name)
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.stack(parts)


def gather_rows(row: torch.Tensor, name: str) -> tuple[torch.Tensor, slice]:
    """The 1-dim tensors of all ranks, of any lengths, one after the other; and where this rank's own lies in them."""
    lengths = gather(torch.tensor([row.numel()], device=row.device), name)[:, 0].tolist()
    padded = row.new_zeros(max(lengths))
    padded[: row.numel()] = row
    rank = process_group(name).rank()
    start = sum(lengths[:rank])
    whole = torch.cat([part[:n] for part, n in zip(gather(padded, name), lengths, strict=True)])
    return whole, slice(start, start + row.numel())
