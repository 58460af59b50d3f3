"""Sparse training over several processes or nodes: parameters sharded by FSDP2, checkpoints for any number of ranks.

    torchrun --nproc-per-node 2 examples/multi_node.py                # two processes of this machine
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 examples/multi_node.py

Stopped at any moment, the same command goes on from the last checkpoint in `--folder`, with as many processes as it is
given then. On machines without GPUs it runs over gloo on the CPU, in seconds with the settings below.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

import spartan


def main() -> None:
    """Train to the end, from the last checkpoint if there is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="of the whole training")
    parser.add_argument("--stop-after", type=int, default=None, help="steps to make now, for a trial of going on")
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--batch", type=int, default=64, help="samples of all processes together in a step")
    parser.add_argument(
        "--folder", type=Path, default=Path("multi-node"), help="for checkpoints; all nodes must see it"
    )
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(dist.get_node_local_rank())
    mesh = init_device_mesh(device, (dist.get_world_size(),))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 10)).to(device)
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)

    # 16x16 blocks: each rank keeps a few bytes of masks for a block, and products skip the dropped blocks.
    method = spartan.Spartan(sparsity=0.9, block_size=16)
    sparsifier = spartan.Sparsifier(model, method, total_steps=options.steps, count="masked")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    sparsifier.attach(optimizer)

    load(options.folder, model, optimizer, sparsifier)
    end = options.steps if options.stop_after is None else sparsifier.step_count + options.stop_after
    for step in range(sparsifier.step_count, min(end, options.steps)):
        x = batch(step, options.batch).to(device)
        loss = functional.cross_entropy(model(x), x[:, :10].argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % options.every == 0 or step + 1 == end:
            save(options.folder, model, optimizer, sparsifier)
            say(f"step {step + 1}: loss {float(loss.detach()):.3f} on this rank, {sparsifier.sparsity:.1%} zeros")

    if sparsifier.step_count == options.steps:
        sparsifier.finalize()
        whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if dist.get_rank() == 0:
            torch.save(whole, options.folder / "model.pt")
        say(f"{sparsifier.sparsity:.1%} zeros in {options.folder / 'model.pt'}")
    dist.destroy_process_group()


def batch(step: int, size: int) -> torch.Tensor:
    """This rank's share of the batch of a step, which is the same whatever the number of ranks."""
    whole = torch.randn(size, 64, generator=torch.Generator().manual_seed(step))
    return whole.tensor_split(dist.get_world_size())[dist.get_rank()]


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, sparsifier: spartan.Sparsifier) -> None:
    """Write a checkpoint beside the others, and then say that it is the last one."""
    weights, moments = get_state_dict(model, optimizer)
    name = f"step-{sparsifier.step_count}"
    dcp.save({"model": weights, "optimizer": moments, "sparsifier": sparsifier}, checkpoint_id=folder / name)
    if dist.get_rank() == 0:
        (folder / "last.part").write_text(name)
        (folder / "last.part").replace(folder / "last")
    dist.barrier()


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, sparsifier: spartan.Sparsifier) -> None:
    """Go on from the last checkpoint, if there is one; it may come from another number of ranks."""
    if not (folder / "last").exists():
        return
    name = (folder / "last").read_text()
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": moments, "sparsifier": sparsifier}, checkpoint_id=folder / name)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    say(f"going on from {name}")


def say(text: str) -> None:
    """Print once."""
    if dist.get_rank() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    main()
