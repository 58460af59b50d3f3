"""A sparse autoencoder whose codes keep exactly k features a row, or a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from spartan.functional import hard_topk
from spartan.layers.selection import kept_indices

__all__ = ["AutoencoderLoss", "TopKAutoencoder", "downstream_gradient"]

THRESHOLD_DECAY = 0.95  # of the running mean of the least code kept of a batch


class AutoencoderLoss(NamedTuple):
    """Parts of a training loss, 0-dim; `total` is the reconstruction plus the others times their weights."""

    total: torch.Tensor
    reconstruction: torch.Tensor
    auxiliary: torch.Tensor
    divergence: torch.Tensor


class _Codes(NamedTuple):
    """Kept codes and their features, row after row, and where each row begins: what `embedding_bag` takes."""

    values: torch.Tensor
    features: torch.Tensor
    starts: torch.Tensor


class TopKAutoencoder(nn.Module):
    """Reconstructs activations from few features of a large dictionary.

    z = relu(E (x - c) + b), and c + sum over kept i of z_i d_i, with rows d_i of length 1. By "row" the k features of
    largest z_i are kept; by "batch" k times the number of rows over all of them, in training, and in evaluation those
    above a running mean of the least z that was kept. A `gradient` g of a downstream loss for x makes the score
    z_i |d_i g|, with which training keeps features of small codes that matter to the loss.

    Args:
        width: of x.
        features: of the dictionary.
        k: features kept, on average with by="batch".
        by: what shares the budget.
        sampled: in training z = relu(mean + deviation noise), one learned deviation for each feature, before the
            selection; `loss` then adds its divergence from a standard normal.
        dead_after: rows that pass without a feature being kept before it counts as dead.
        revive: dead features that reconstruct the error of the others in `loss`; 0 for none, None for width / 2.

    Attributes:
        decoder: d, `[features, width]`; call `normalize_decoder` after each step of the optimizer.
        idle: rows that passed since each feature was kept, int64 `[features]`.
        threshold: what evaluation keeps codes above, with by="batch".

    Raises:
        ValueError: sizes below 1, k or revive above the features, another `by`.

    Source: Gao et al., "Scaling and evaluating sparse autoencoders", arXiv 2406.04093 (k by row, reviving dead
        features); Bussmann et al., "BatchTopK Sparse Autoencoders", arXiv 2412.06410; Olmo et al., "Features that Make
        a Difference", arXiv 2411.10397 (gradient); Baker and Li, arXiv 2509.22994 (sampled codes).
    """

    idle: torch.Tensor
    threshold: torch.Tensor

    def __init__(
        self,
        width: int,
        features: int,
        k: int,
        *,
        by: Literal["row", "batch"] = "row",
        sampled: bool = False,
        dead_after: int = 10_000,
        revive: int | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("width", width), ("features", features), ("k", k), ("dead_after", dead_after)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1; got {size}")
        revive = min(features, max(1, width // 2)) if revive is None else revive
        if k > features or not 0 <= revive <= features:
            raise ValueError(f"k and revive must be at most the {features} features; got {k} and {revive}")
        if by not in ("row", "batch"):
            raise ValueError(f"by must be 'row' or 'batch'; got {by!r}")
        self.width, self.features, self.k, self.by = width, features, k, by
        self.sampled, self.dead_after, self.revive = sampled, dead_after, revive
        directions = functional.normalize(torch.randn(features, width), dim=1)
        self.center = nn.Parameter(torch.zeros(width))
        self.encoder = nn.Parameter(directions.clone())
        self.bias = nn.Parameter(torch.zeros(features))
        self.decoder = nn.Parameter(directions)
        self.log_deviation = nn.Parameter(torch.full((features,), -2.0)) if sampled else None
        self.register_buffer("idle", torch.zeros(features, dtype=torch.int64))
        self.register_buffer("threshold", torch.zeros(()))

    def forward(self, x: torch.Tensor, gradient: torch.Tensor | None = None) -> torch.Tensor:
        """Reconstruction of x `[..., width]`, of its shape.

        Args:
            x: activations, floating point.
            gradient: of a downstream loss for x, of its shape; `downstream_gradient` computes it.

        Raises:
            ValueError: a last dimension that is not `width`, a gradient of another shape.
        """
        rows, slopes = self._rows(x, gradient)
        if self.by == "batch" and not self.training:
            return self.decode(self._above_threshold(self._codes(rows)[1])).reshape(x.shape)
        return self._decoded(self._kept(self._codes(rows)[1], slopes)).reshape(x.shape)

    def encode(self, x: torch.Tensor, gradient: torch.Tensor | None = None) -> torch.Tensor:
        """The codes of x as `[..., features]`, zero where not kept; arguments and errors as `forward`."""
        rows, slopes = self._rows(x, gradient)
        z = self._codes(rows)[1]
        if self.by == "batch" and not self.training:
            kept = self._above_threshold(z)
        else:
            kept = z * self._selected(z, slopes)[0]
        return kept.reshape(*x.shape[:-1], self.features)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """c + codes d, for codes `[..., features]`."""
        return codes @ self.decoder + self.center

    def loss(
        self,
        x: torch.Tensor,
        gradient: torch.Tensor | None = None,
        *,
        auxiliary: float = 1 / 32,
        divergence: float = 1e-4,
    ) -> AutoencoderLoss:
        """The loss to train with; arguments and errors as `forward`, and a ValueError below two rows.

        Reconstruction is the squared error of x over the variance of x in the batch. Auxiliary is the same for the
        error, reconstructed from the `revive` dead features of largest z; their gradient revives them. Divergence is
        KL(N(mean, deviation^2) | N(0, 1)) for each row.
        """
        rows, slopes = self._rows(x, gradient)
        if len(rows) < 2:
            raise ValueError(f"the loss needs two rows at least, for their variance; got x {tuple(x.shape)}")
        mean, z = self._codes(rows)
        found = self._decoded(self._kept(z, slopes))
        error = rows - found
        variance = (rows - rows.mean(0)).square().sum().clamp_min(torch.finfo(rows.dtype).tiny)
        reconstruction = error.square().sum() / variance
        revival = self._revival(z, error.detach())
        spread = self._divergence(mean)
        total = reconstruction + auxiliary * revival + divergence * spread
        return AutoencoderLoss(total, reconstruction, revival, spread)

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Bring the rows of the decoder back to length 1."""
        self.decoder.copy_(functional.normalize(self.decoder, dim=1))

    def dead(self) -> torch.Tensor:
        """Which features were not kept for `dead_after` rows, bool `[features]`."""
        return self.idle >= self.dead_after

    def extra_repr(self) -> str:
        """Settings, for printing."""
        return f"{self.width}, {self.features}, k={self.k}, by={self.by!r}, sampled={self.sampled}"

    def _rows(self, x: torch.Tensor, gradient: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x as rows in the parameters' dtype, and |d g| for each."""
        if x.dim() < 1 or x.shape[-1] != self.width:
            raise ValueError(f"x must be [..., {self.width}]; got {tuple(x.shape)}")
        rows = x.reshape(x.shape[:-1].numel(), self.width).to(self.decoder.dtype)
        if gradient is None:
            return rows, None
        if gradient.shape != x.shape:
            raise ValueError(f"gradient must be {tuple(x.shape)}, as x is; got {tuple(gradient.shape)}")
        with torch.no_grad():
            return rows, (gradient.reshape(rows.shape).to(rows.dtype) @ self.decoder.T).abs()

    def _codes(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Means of the codes, and z: sampled in training."""
        mean = functional.linear(rows - self.center, self.encoder, self.bias).to(self.decoder.dtype)
        if self.log_deviation is None or not self.training:
            return mean, mean.relu()
        return mean, (mean + self.log_deviation.exp() * torch.randn_like(mean)).relu()

    def _selected(self, z: torch.Tensor, slopes: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The mask of z, and the indices that it keeps: of features for each row, or of all of z."""
        scores = z.detach() if slopes is None else z.detach() * slopes
        if self.by == "row":
            return hard_topk(scores, self.k, return_indices=True)
        mask, places = hard_topk(scores.flatten(), self.k * len(z), return_indices=True)
        return mask.view_as(z), places

    def _kept(self, z: torch.Tensor, slopes: torch.Tensor | None) -> _Codes:
        indices = self._selected(z, slopes)[1]
        if self.by == "row":
            codes = _Codes(z.gather(1, indices).flatten(), indices.flatten(), _starts(z, self.k))
        else:
            starts = torch.searchsorted(indices, _starts(z, self.features))
            codes = _Codes(z.flatten()[indices], indices % self.features, starts)
        if self.training:
            self._note(codes, len(z))
            if self.by == "batch":
                self._note_threshold(codes.values if slopes is None else z.flatten()[self._selected(z, None)[1]])
        return codes

    @torch.no_grad()
    def _note(self, codes: _Codes, rows: int) -> None:
        """Count the rows that features were not kept for."""
        used = torch.zeros_like(self.idle).scatter_add_(0, codes.features, (codes.values > 0).long())
        self.idle.add_(rows).masked_fill_(used > 0, 0)

    @torch.no_grad()
    def _note_threshold(self, largest: torch.Tensor) -> None:
        """Follow the least code above zero of those that a batch keeps."""
        ends = largest.new_full((1,), torch.inf)
        least = torch.cat([largest.masked_fill(largest <= 0, torch.inf), ends]).amin()
        moved = torch.where(self.threshold > 0, self.threshold.lerp(least, 1 - THRESHOLD_DECAY), least)
        self.threshold.copy_(torch.where(least.isfinite(), moved, self.threshold))

    def _above_threshold(self, z: torch.Tensor) -> torch.Tensor:
        return z * (z >= self.threshold)

    def _decoded(self, codes: _Codes) -> torch.Tensor:
        """The product of sparse codes with the decoder: k rows of it for each row, not all features."""
        found = functional.embedding_bag(
            codes.features, self.decoder, codes.starts, mode="sum", per_sample_weights=codes.values
        )
        return found + self.center

    def _revival(self, z: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
        """What the dead features of largest z leave of the error, as a share of it; zero where none is dead."""
        if not self.revive:
            return error.new_zeros(())
        dead = self.dead()
        chosen = kept_indices(z.detach().masked_fill(~dead, -torch.inf), self.revive)
        values = z.gather(1, chosen) * dead[chosen]
        found = self._decoded(_Codes(values.flatten(), chosen.flatten(), _starts(z, self.revive)))
        left = (error - (found - self.center)).square().sum()
        share = left / error.square().sum().clamp_min(torch.finfo(error.dtype).tiny)
        return torch.where(dead.any(), share, 0.0)

    def _divergence(self, mean: torch.Tensor) -> torch.Tensor:
        if self.log_deviation is None:
            return mean.new_zeros(())
        of_deviation = (2 * self.log_deviation).exp() - 1 - 2 * self.log_deviation
        return (mean.square().sum() / max(1, len(mean)) + of_deviation.sum()) / 2


def _starts(z: torch.Tensor, step: int) -> torch.Tensor:
    """Where each row of z begins, at so many entries a row."""
    return torch.arange(len(z), device=z.device) * step


def downstream_gradient(loss: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Gradient of `loss(x)`, summed, for activations x: what `TopKAutoencoder` weighs features by."""
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        (found,) = torch.autograd.grad(loss(leaf).sum(), leaf)
    return found
