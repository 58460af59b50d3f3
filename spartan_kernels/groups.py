"""Process groups: their names as operators take them, and the exchanges that a solve over ranks needs.

What ranks exchange is gathered, then combined by each rank in the ranks' order: every rank computes with the same bits,
whichever algorithm the communication library takes. The empty name is this process alone, and costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from spartan_kernels.torch_private import process_group

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


def gather(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """The tensors of all ranks, of one shape and dtype, stacked in the ranks' order: the same bits on every rank."""
    if not name:
        return tensor[None]
    every = tensor.new_empty((process_group(name).size(), *tensor.shape))
    gather_into(every.view(-1), tensor.reshape(-1), name)
    return every


def gather_into(every: torch.Tensor, tensor: torch.Tensor, name: str) -> None:
    """Write the vectors of all ranks, of one length and dtype, into `every`, in the ranks' order."""
    import torch.distributed as dist

    # PyTorch 2.13 renamed it
    into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    into(every, tensor, group=process_group(name))


def total(every: torch.Tensor) -> torch.Tensor:
    """Sum of what `gather` returned, in the ranks' order."""
    result = every[0]
    for part in every[1:]:
        result = result + part
    return result


def summed(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Sum over the ranks, in their order."""
    return total(gather(tensor, name))


def sum_before(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Sum over the ranks before this one."""
    if not name:
        return torch.zeros_like(tensor)
    every = gather(tensor, name)
    return total(every[: process_group(name).rank()]) if process_group(name).rank() else torch.zeros_like(tensor)


def refusal(check: Callable[[], None]) -> str:
    """What `check` raises as ValueError, or nothing: told to the other ranks before it is raised on all of them."""
    try:
        check()
    except ValueError as error:
        return str(error)
    return ""


def raise_together(own: str, refused: torch.Tensor, name: str) -> None:
    """Raise ValueError on every rank where one refused its input: what the first such rank says.

    Args:
        own: this rank's `refusal`.
        refused: for each rank, whether it has one; the same on every rank.
        name: the group.
    """
    flags = refused.tolist()
    if not any(flags):
        return
    if not name:
        raise ValueError(own)
    import torch.distributed as dist

    messages: list[str] = [""] * len(flags)
    dist.all_gather_object(messages, own, group=process_group(name))
    rank = next(rank for rank, flag in enumerate(flags) if flag)
    raise ValueError(f"rank {rank}: {messages[rank]}")


def require_agreement(own: str, every: torch.Tensor, name: str) -> None:
    """Raise ValueError on every rank where one refused its input, or where budget or beta differ over the ranks.

    Args:
        own: this rank's `refusal`.
        every: [ranks, facts, ...] as gathered: whether a rank refused, its budget and its beta come first.
        name: the group.
    """
    raise_together(own, every[:, 0].reshape(len(every), -1).any(-1), name)
    for index, what in ((1, "budget"), (2, "beta")) if name else ():
        require_shared(what, every[:, index])


def require_shared(what: str, every: torch.Tensor) -> None:
    """Raise ValueError where a number is not the same on every rank."""
    values = every.flatten().tolist()
    if any(value != values[0] for value in values):
        raise ValueError(f"{what} must be the same on every rank of the group; got {values}")
