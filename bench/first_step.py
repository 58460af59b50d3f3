"""What a first training step compiles: Spartan on a small MLP in blocks, on a GPU that is not there.

`python -m bench.first_step` runs a forward pass, a backward pass, an optimizer step and a solve of the Triton backend
with launches that go all the way to a driver which drops them, counts the kernels that Triton made for that, and says
how long they took. Nothing is computed: host code does not look at results.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import dataclass, replace
from unittest import mock

from spartan_kernels.h100 import PROCESSORS


@dataclass(frozen=True)
class FirstStep:
    """Kernels, by name, with the seconds that each took; and seconds of a core for the whole step, mostly compiling."""

    kernels: list[tuple[str, float]]
    core_seconds: float


def first_step() -> FirstStep:
    """Train one step with the Triton backend on CPU tensors and a stand-in driver; changes this process for good."""
    import triton

    from bench import compile_driver

    kernels: list[tuple[str, float]] = []

    def heard(*, src: object, times: object, cache_hit: bool, **rest: object) -> None:
        if not cache_hit:
            stages = [times.ir_initialization, *(us for _, us in times.lowering_stages)]  # type: ignore[attr-defined]
            kernels.append((src.name, sum(stages) / 1e6))  # type: ignore[attr-defined]

    with tempfile.TemporaryDirectory() as cache:
        triton.knobs.cache.dir = cache
        triton.knobs.compilation.listener = heard
        compile_driver.use("cuda", 90, 32)
        begin = sum(os.times()[:4])  # of this process and of ptxas: other work on the machine does not count
        _train()
        return FirstStep(kernels, sum(os.times()[:4]) - begin)


def _train() -> None:
    import torch

    import spartan
    from spartan_kernels import dispatch
    from spartan_kernels.backends.triton import configs

    support = dispatch.SUPPORT
    on_cpu = {
        operator: {name: replace(s, devices=()) if name == "triton" else s for name, s in row.items()}
        for operator, row in support.items()
    }
    limit = PROCESSORS * configs.PROGRAMS_PER_PROCESSOR
    with (
        mock.patch.object(dispatch, "SUPPORT", on_cpu),
        mock.patch.object(dispatch, "unavailable", lambda name: None),
        mock.patch.object(configs, "INTERPRETED_PROGRAMS", limit),
        # nothing is written, and on a CPU the operators look for numbers that are not finite
        mock.patch.object(torch, "empty", torch.zeros),
        mock.patch.object(torch, "empty_like", torch.zeros_like),
        mock.patch.object(torch.Tensor, "new_empty", torch.Tensor.new_zeros),
        spartan.backend("triton"),
    ):
        torch.manual_seed(0)
        sizes = ((256, 1024), (1024, 1024), (1024, 256))
        model = torch.nn.Sequential(*(torch.nn.Linear(*size) for size in sizes))
        sparsifier = spartan.Sparsifier(model, spartan.Spartan(sparsity=0.5, block_size=(32, 32)), total_steps=10)
        optimizer = torch.optim.AdamW(model.parameters())
        sparsifier.attach(optimizer)
        x = torch.randn(64, 256)
        model(x).square().mean().backward()
        optimizer.step()


def main(arguments: list[str] | None = None) -> int:
    """Print the count and the seconds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--list", action="store_true", help="name every kernel with its seconds")
    options = parser.parse_args(arguments)
    step = first_step()
    if options.list:
        for name, seconds in step.kernels:
            print(f"{seconds:6.2f} s  {name.strip('_')}")
    print(f"A first training step compiles {len(step.kernels)} kernels in {step.core_seconds:.1f} s of one core.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
