"""Spartan: soft top-k masks that sharpen while the budget shrinks, projected to exact sparsity in the forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spartan.masks import MaskedTensor, MaskSet
from spartan.methods.base import SparseMethod, changes_in, require_number, require_order
from spartan.methods.schedules import Cosine, Linear

__all__ = ["Spartan"]

BETA_UNITS = ("paper", "mean", "threshold")
PUBLISHED: dict[str, Any] = {"beta": 10.0, "beta_units": "paper", "preserve_scale": False}
ANNEAL_SHAPES = {"linear": Linear, "cosine": Cosine}


@dataclass(frozen=True, kw_only=True)
class Spartan(SparseMethod):
    """Train with w = theta * m * h: m a soft top-k mask of block magnitudes, h the hard one, h straight through.

    m = sigmoid(beta v / a + mu) with sum a m = k over the weights of a budget; v = sum of |theta| over a
    block of a weights, and beta scaled by the square root of the block size. The kept fraction goes from 1 to
    the target linearly over the first `ramp` of the steps, beta from 1 to its target over the first
    `anneal`; then the soft mask is merged into the weights, the hard one fixed, and the rest of the steps
    fine-tunes. The defaults of `beta`, `beta_units` and `preserve_scale` work with weights of any scale, with and
    without normalisation layers; the published ones are `Spartan.paper(...)`.

    Attributes:
        beta: sharpness reached at the end of annealing. Published: 10 for ResNet-50, 20 for ViT-B/16, in "paper" units.
        beta_units: "threshold": beta is divided by the hard threshold of the last solve, "mean": by the mean of v / a
            now; both make the mask independent of the weights' scale. "paper": beta multiplies |theta| as it stands, so
            small weights make a flat mask.
        ramp: fraction of the steps over which the budget shrinks.
        anneal: fraction of the steps over which beta grows and after which masks are fixed; at least `ramp`.
        anneal_shape: "linear", the paper's, or "cosine": how beta grows.
        backward_tolerance: eps in [0, 1). The weight gradient G is computed only on the blocks B with m >= eps, and
            those that the forward pass uses; equation (2) then has G 1_B for G, which outside B lacks m G, at most
            eps |G|. As the mask sharpens B shrinks to the kept blocks, and the step of linear layers in blocks gets
            faster. 0: all of G, the paper.
        preserve_scale: divide each masked weight by the mean of its kept m, as a constant; without it the signal dies
            away in networks without normalisation layers.

    Source: Tai, Tian, Lim, "Spartan: Differentiable Sparsity via Regularized Transportation", NeurIPS 2022.
    """

    beta: float = 4.0
    beta_units: str = "threshold"
    ramp: float = 0.2
    anneal: float = 0.8
    preserve_scale: bool = True
    anneal_shape: str = "linear"
    backward_tolerance: float = 0.0

    soft = True
    solves_every_step = True
    takes_shards = True
    keeps_zeros = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("beta", self.beta, 0.0)
        if self.beta_units not in BETA_UNITS:
            raise ValueError(f"beta_units must be one of {', '.join(BETA_UNITS)}; got {self.beta_units!r}")
        if self.anneal_shape not in ANNEAL_SHAPES:
            raise ValueError(f"anneal_shape must be one of {', '.join(ANNEAL_SHAPES)}; got {self.anneal_shape!r}")
        require_number("backward_tolerance", self.backward_tolerance, 0.0, 1.0, open_end=True)
        require_number("ramp", self.ramp, 0.0, 1.0)
        require_number("anneal", self.anneal, 0.0, 1.0)
        require_order("ramp", self.ramp, "anneal", self.anneal)

    @classmethod
    def paper(cls, **settings: Any) -> Spartan:
        """The published settings: beta = 10 (ResNet-50) on |theta| as it stands, kept weights scaled by their m.

        Args:
            settings: as of the class, `sparsity` among them; they take precedence, such as `beta=20` (ViT-B/16).
        """
        return cls(**{**PUBLISHED, **settings})

    @property
    def backward_masks(self) -> bool:  # type: ignore[override]
        """With a tolerance, it says which blocks need a gradient."""
        return self.backward_tolerance > 0

    def beta_at(self, step: int, total_steps: int) -> float:
        """From 1 to `beta` over the first `anneal` of the steps."""
        return ANNEAL_SHAPES[self.anneal_shape](1.0, self.beta, 0, self.anneal * total_steps)(step)

    def shortfall(self, total_steps: int) -> str | None:
        """No step in which masks are soft."""
        if self.anneal == 0 or changes_in(1, total_steps, 0.0, self.anneal):
            return None
        return f"its masks are fixed before they are ever soft: anneal={self.anneal:g} of the steps is less than two"

    def start(self, masks: MaskSet) -> None:
        """Without a ramp, solve for the masks of the first step."""
        self.update(masks)

    def correct_gradients(self, masks: MaskSet) -> None:
        """Add the coupling term of the budget; while everything is kept, or once masks are fixed, there is none."""
        if masks.frozen or self._progress(masks) == 0.0:
            return
        for tensor in masks.tensors:
            _restrict(tensor)
        for group in masks.groups:
            group.correct_gradients()

    def update(self, masks: MaskSet) -> None:
        """Solve for the masks of the next step, or fix them at the end of annealing."""
        if masks.frozen:
            return
        if masks.step >= self.anneal * masks.total_steps:
            self.finish(masks)
        else:
            self._solve(masks, self._progress(masks))

    def finish(self, masks: MaskSet) -> None:
        """Solve at the target budget, make the hard masks exact over the model, and fix them."""
        if not masks.frozen:
            self._solve(masks, 1.0)
            masks.select(1.0)
            masks.freeze()

    def _progress(self, masks: MaskSet) -> float:
        return Linear(0.0, 1.0, 0, self.ramp * masks.total_steps)(masks.step)

    def _solve(self, masks: MaskSet, progress: float) -> None:
        beta = self.beta_at(masks.step, masks.total_steps)
        for group in masks.groups:
            if group.budget(progress) < group.capacity:  # else m = h = 1, which is how masks begin
                group.solve(progress, beta, self.beta_units)
        if self.backward_tolerance:
            for tensor in masks.tensors:
                tensor.set_backward((tensor.soft >= self.backward_tolerance) | tensor.hard)


def _restrict(tensor: MaskedTensor) -> None:
    """Leave the gradient to the blocks that need one, where it was computed for others."""
    chosen, grad = tensor.backward, tensor.gradient
    if chosen is not None and grad is not None and not tensor.carrier.computes_backward_alone:
        grad.masked_fill_(tensor.expand(~chosen), 0)
