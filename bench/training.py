"""A whole training step, sparse against the same network trained dense."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.case import Settings, Work, case
from bench.checks import check_budget_mask
from bench.timing import peak_memory, seconds_of
from spartan_kernels import block_scores

_TOTAL_STEPS = 120
_RAMP = _TOTAL_STEPS // 5  # by then the kept fraction is at its target and beta still anneals


class _Trainer:
    """A network, its optimizer and, unless dense, its sparsifier, on one batch."""

    def __init__(self, s: Settings, method: Any, total_steps: int = _TOTAL_STEPS) -> None:
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
            self.sparsifier = spartan.Sparsifier(self.model, method, total_steps)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.x = torch.randn(batch, widths[0], device=s.device, dtype=s.dtype)
        self.y = torch.randint(widths[-1], (batch,), device=s.device)

    def kept_bytes(self) -> int:
        """Memory that stays from step to step: masks, and what a method keeps for its next copy."""
        tensors = [buffer for name, buffer in self.model.named_buffers() if ".mask_" in name]
        tensors += [tensor.spare for tensor in self.sparsifier._masks.tensors if tensor.spare is not None]
        return sum(tensor.nbytes for tensor in tensors)

    def memory_over(self, dense: _Trainer, device: str) -> dict[str, float]:
        """Note how much more memory training takes at its worst moment than `dense` does."""
        kept = self.kept_bytes()
        for trainer in (self, dense):
            trainer.step()  # the first makes the optimizer's state
            trainer.optimizer.zero_grad()  # what is released but was not seen to be taken would not be counted
        more = peak_memory(self.step, device)[0] - peak_memory(dense.step, device)[0]
        each = next(self.model.parameters()).element_size() * self.weights
        return {"kept from step to step, in weights": kept / each, "peak over dense, in weights": (kept + more) / each}

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
        return seconds_of(parts, synchronize)

    def gradient_share(self) -> dict[str, float]:
        """Note how many of the blocks get a gradient."""
        chosen = [tensor.backward for tensor in self.sparsifier._masks.tensors]
        share = sum(int(mask.sum()) for mask in chosen) / sum(mask.numel() for mask in chosen)
        return {"blocks with a gradient": share}

    def check_loss(self, loss: Tensor) -> None:
        """Check that the loss is finite."""
        if not bool(loss.isfinite()):
            raise AssertionError(f"the loss is {float(loss)}")

    def check_restricted(self, loss: Tensor) -> None:
        """Check that the gradient is that of the same model without a restriction, on the blocks that get one."""
        self.check_loss(loss)
        tensors = self.sparsifier._masks.tensors
        blocks = [tensor.backward for tensor in tensors]
        self.forward_backward()
        found = [tensor.gradient.clone() for tensor in tensors]
        for tensor in tensors:
            tensor.carrier.mask_backward = None
        self.forward_backward()
        for tensor, mask, grad in zip(tensors, blocks, found, strict=True):
            torch.testing.assert_close(grad, tensor.gradient * tensor.expand(mask), rtol=1e-4, atol=1e-7)
            tensor.carrier.mask_backward = mask

    def check(self, loss: Tensor) -> None:
        """Check that the loss is finite and the masks are those of the weights, under each budget."""
        self.check_loss(loss)
        masks = self.sparsifier.masks()
        for group in self.sparsifier._masks.groups:
            names = [tensor.name for tensor in group.tensors]
            # m = sigmoid(beta sqrt(a) v / a + mu), v the sum of |theta| over a block of a weights, all blocks whole
            weights = [self.model.get_parameter(name).detach() for name in names]
            sums = [w.abs() if self.block == 1 else block_scores(w, self.block) for w in weights]
            scores = torch.cat([v.flatten() / self.block for v in sums])
            soft = torch.cat([masks[name].soft.flatten() for name in names])
            kept = sum(int(masks[name].hard.sum()) for name in names)
            budget = float(soft.double().sum())
            check_budget_mask(soft, budget, values=scores, beta=float(self.sparsifier.beta))
            if abs(kept - budget) > 1 + 1e-6 * budget:
                raise AssertionError(f"the hard masks keep {kept} blocks, the soft ones {budget:.1f}")


@case("training_step", "mlp-9M-batch-512")
def training_step(s: Settings) -> Work:
    """MLP of 9.5 million weights at batch 512, Spartan at 90% unstructured against dense."""
    return _spartan_step(s, 1)


@case("training_step", "mlp-9M-batch-512-95")
def training_step_of_few_weights(s: Settings) -> Work:
    """The same at 95%."""
    return _spartan_step(s, 1, sparsity=0.95)


@case("training_step", "mlp-9M-batch-512-block-32")
def training_step_in_blocks(s: Settings) -> Work:
    """The same at 90% of each layer in blocks of 32 x 32, with the gradient of every weight."""
    return _spartan_step(s, 32, distribution="uniform")


@case("training_step", "mlp-9M-batch-512-block-32-top-kast")
def training_step_of_top_kast(s: Settings) -> Work:
    """Top-KAST at 90% of each layer in blocks of 32 x 32, with the gradient of a fifth of the weights."""
    import spartan

    method = spartan.TopKAST(sparsity=0.9, backward_sparsity=0.8, block_size=32, distribution="uniform")
    ours, dense = _Trainer(s, method), _Trainer(s, None)
    ours.step()
    return Work(
        ours=ours.step,
        operands=[()],
        check=ours.check_restricted,
        bytes=0,
        flops=ours.flops,
        peers={"dense": dense.step},
        breakdown=lambda: ours.breakdown(_synchronize(s)),
        notes={**ours.gradient_share(), **ours.memory_over(dense, s.device)},
    )


def _tolerance_case(beta: float) -> None:
    @case("training_step", f"mlp-9M-batch-512-block-32-tolerance-1e-2-beta-{beta:g}")
    def training_step_with_tolerance(s: Settings) -> Work:
        return _tolerant_step(s, beta)

    training_step_with_tolerance.__doc__ = (
        f"The same with the gradient of weights where the soft mask is at least 0.01, at beta = {beta:g}."
    )


for _beta in (100.0, 400.0, 1600.0):  # on the initial weights: all blocks but few, half of them, twice those kept
    _tolerance_case(_beta)


def _tolerant_step(s: Settings, beta: float) -> Work:
    """A step at one sharpness, against dense and against the same with the gradient of every weight."""
    import spartan

    @dataclass(frozen=True, kw_only=True)
    class AtOneBeta(spartan.Spartan):
        def beta_at(self, step: int, total_steps: int) -> float:
            return self.beta

    settings: dict[str, Any] = {"sparsity": 0.9, "block_size": 32, "distribution": "uniform", "beta": beta, "ramp": 0.0}
    settings |= {"beta_units": "paper", "preserve_scale": False}
    many = 100 * _TOTAL_STEPS  # so that masks are never fixed here
    ours, whole, dense = (
        _Trainer(s, method, many)
        for method in (AtOneBeta(**settings, backward_tolerance=0.01), AtOneBeta(**settings), None)
    )
    for trainer in (ours, whole):
        trainer.step()
        trainer.step()
    return Work(
        ours=ours.step,
        operands=[()],
        check=ours.check_restricted,
        bytes=0,
        flops=ours.flops,
        peers={"dense": dense.step, "gradient of every weight": whole.step},
        notes=ours.gradient_share(),
    )


def _synchronize(s: Settings) -> Callable[[], None]:
    return torch.cuda.synchronize if torch.device(s.device).type == "cuda" else lambda: None


def _spartan_step(s: Settings, block: int, sparsity: float = 0.9, **settings: Any) -> Work:
    import spartan

    sparse = _Trainer(s, spartan.Spartan.paper(sparsity=sparsity, block_size=block, **settings))
    dense = _Trainer(s, None)
    for _ in range(_RAMP):
        sparse.step()
    return Work(
        ours=sparse.step,
        operands=[()],
        check=sparse.check,
        bytes=0,
        flops=sparse.flops,
        peers={"dense": dense.step},
        breakdown=lambda: sparse.breakdown(_synchronize(s)),
        notes={
            "weights": float(sparse.weights),
            "batch": float(len(sparse.x)),
            **sparse.memory_over(dense, s.device),
        },
    )
