"""A whole training step, sparse against the same network trained dense."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.case import Settings, Work, case
from bench.checks import check_budget_mask
from spartan_kernels import block_scores

_TOTAL_STEPS = 120
_RAMP = _TOTAL_STEPS // 5  # by then the kept fraction is at its target and beta still anneals


class _Trainer:
    """A network, its optimizer and, unless dense, its sparsifier, on one batch."""

    def __init__(self, s: Settings, method: Any) -> None:
        import spartan

        widths, batch = ((256, 512, 512, 10), 128) if s.quick else ((1024, 2048, 2048, 1536, 10), 512)
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for in_, out in itertools.pairwise(widths):
            layers += [nn.Linear(in_, out), nn.ReLU()]
        self.model = nn.Sequential(*layers[:-1]).to(s.device, s.dtype)
        self.weights = sum(p.numel() for p in self.model.parameters())
        self.flops = 6 * batch * sum(i * o for i, o in itertools.pairwise(widths))
        self.sparsifier: Any = None
        self.block = 1 if method is None else method.block_size
        if method is not None:
            self.sparsifier = spartan.Sparsifier(self.model, method, _TOTAL_STEPS)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.x = torch.randn(batch, widths[0], device=s.device, dtype=s.dtype)
        self.y = torch.randint(widths[-1], (batch,), device=s.device)

    def forward_backward(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(self.x), self.y)
        loss.backward()
        return loss

    def step(self) -> Tensor:
        loss = self.forward_backward()
        if self.sparsifier is not None:
            self.sparsifier.correct_gradients()
        self.optimizer.step()
        if self.sparsifier is not None:
            self.sparsifier.step()
        return loss

    def breakdown(self, synchronize: Callable[[], None]) -> dict[str, float]:
        parts = {
            "forward and backward": self.forward_backward,
            "coupling of the gradients": self.sparsifier.correct_gradients,
            "optimizer": self.optimizer.step,
            "mask update": self.sparsifier.step,
        }
        seconds = {}
        for name, part in parts.items():
            synchronize()
            start = time.perf_counter()
            part()
            synchronize()
            seconds[name] = time.perf_counter() - start
        return seconds

    def check(self, loss: Tensor) -> None:
        """Check that the loss is finite and the masks are those of the weights, under one budget."""
        if not bool(loss.isfinite()):
            raise AssertionError(f"the loss is {float(loss)}")
        masks = self.sparsifier.masks()
        # m = sigmoid(beta sqrt(a) v / a + mu), v the sum of |theta| over a block of a weights, all blocks whole
        weights = [self.model.get_parameter(name).detach() for name in masks]
        sums = [w.abs() if self.block == 1 else block_scores(w, self.block) for w in weights]
        scores = torch.cat([v.flatten() / self.block for v in sums])
        soft = torch.cat([m.soft.flatten() for m in masks.values()])
        kept = sum(int(m.hard.sum()) for m in masks.values())
        budget = float(soft.double().sum())
        check_budget_mask(soft, budget, values=scores, beta=float(self.sparsifier.beta))
        if abs(kept - budget) > 1 + 1e-6 * budget:
            raise AssertionError(f"the hard masks keep {kept} blocks, the soft ones {budget:.1f}")


@case("training_step", "mlp-9M-batch-512")
def training_step(s: Settings) -> Work:
    """MLP of 9.5 million weights at batch 512, Spartan at 90% unstructured against dense."""
    return _spartan_step(s, 1)


@case("training_step", "mlp-9M-batch-512-block-32")
def training_step_in_blocks(s: Settings) -> Work:
    """The same at 90% in blocks of 32 x 32, with the gradient of every weight."""
    return _spartan_step(s, 32)


def _spartan_step(s: Settings, block: int) -> Work:
    import spartan

    sparse, dense = _Trainer(s, spartan.Spartan(sparsity=0.9, block_size=block)), _Trainer(s, None)
    for _ in range(_RAMP):
        sparse.step()

    def synchronize() -> None:
        if torch.device(s.device).type == "cuda":
            torch.cuda.synchronize()

    return Work(
        ours=sparse.step,
        operands=[()],
        check=sparse.check,
        bytes=0,
        flops=sparse.flops,
        peers={"dense": dense.step},
        breakdown=lambda: sparse.breakdown(synchronize),
        notes={"weights": float(sparse.weights), "batch": float(len(sparse.x))},
    )
