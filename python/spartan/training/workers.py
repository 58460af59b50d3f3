"""The processes of one run, as torchrun starts them, or just this one."""

from __future__ import annotations

import gc
import importlib
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spartan.training.tasks import Slice

__all__ = ["Workers", "joined"]


@dataclass(frozen=True)
class Workers:
    """This process among those of its run: number `rank` of `size`, computing on `device`."""

    rank: int
    size: int
    device: torch.device

    @property
    def writes(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    @property
    def part(self) -> Slice:
        """Its part of each batch."""
        return Slice(self.rank, self.size)

    def total(self, values: Tensor) -> Tensor:
        """Sum over the processes."""
        if self.size == 1:
            return values
        summed = values.to(self.device, copy=True)
        dist.all_reduce(summed)
        return summed.to(values.device)

    def any(self, asked: bool) -> bool:
        """Whether any process says so."""
        return asked if self.size == 1 else bool(self.total(torch.tensor(int(asked), device="cpu")))

    def wrapped(self, model: nn.Module) -> nn.Module:
        """`model` with gradients averaged over the processes.

        Masks are the same everywhere without being sent, as weights are; running statistics differ until `agree`.
        """
        if self.size == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        wrapper = nn.parallel.DistributedDataParallel
        renamed = "forward_sync_buffers" in inspect.signature(wrapper).parameters  # in newer releases of PyTorch
        quiet: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
        return wrapper(model, device_ids=devices, **quiet)

    def agree(self, model: nn.Module) -> None:
        """Give all processes the first one's running statistics, which only evaluation reads."""
        if self.size > 1:
            kept = model.state_dict()
            for name, buffer in model.named_buffers():
                if name in kept:
                    dist.broadcast(buffer, 0)


@contextmanager
def joined(device: str) -> Iterator[Workers]:
    """Join the processes that torchrun started, if it did; `device` "auto" takes a GPU where there is one.

    Raises:
        ValueError: a device that is unknown or not there. RuntimeError: processes that cannot be reached.
    """
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    local = os.environ.get("LOCAL_RANK")
    chosen = _device(f"cuda:{local}" if name == "cuda" and local is not None else name)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Workers(0, 1, chosen)
        return
    importlib.import_module("torch.distributed.nn")  # its default arguments would keep a group that is there already
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Workers(dist.get_rank(), dist.get_world_size(), chosen)
    finally:
        # A group that nobody holds ends its threads. One that still runs while the interpreter ends may abort it.
        gc.collect()
        dist.destroy_process_group()


def _device(name: str) -> torch.device:
    """The device of this name, on which a tensor can be made."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda, cuda:0 or another of PyTorch's; got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} is not there: PyTorch sees no CUDA device")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r} is not there: {str(error).splitlines()[0]}") from error
    return device
