"""Texts as sparse weights over a vocabulary, for an inverted index."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from spartan.functional import hard_topk, soft_topk

if TYPE_CHECKING:
    from scipy.sparse import csr_array

__all__ = ["SparseEncoder", "flops_loss", "to_csr"]


class SparseEncoder(nn.Module):
    """A weight for each term of a vocabulary, from the logits of a text's tokens; most are zero after training.

    w_j = log(1 + relu(max over tokens t of logit_tj)); with `terms`, only the k largest of a text stay. The score of
    two texts is the dot product of their weights.

    Args:
        encoder: called as `encoder(tokens)`, or `encoder(tokens, attention_mask=...)` where a mask is given. It gives
            `[batch, tokens, n]`: as a tensor, the first of a tuple, or `.logits` or `.last_hidden_state`.
        head: module that makes logits `[..., vocabulary]` of what the encoder gives; None where these are the logits.
        terms: k, the most terms that a text keeps; None keeps all above zero.
        beta: None: only kept terms get a gradient. A number: the choice has the gradient of `soft_topk` at this
            sharpness, so terms that were dropped get one too.

    Raises:
        ValueError: terms below 1, or beta below 0, infinite, or without `terms`.

    Source: Formal et al., "SPLADE", SIGIR 2021, arXiv 2107.05720, and "SPLADE v2", arXiv 2109.10086 (the maximum). The
        exact number of terms is ours.
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: nn.Module | None = None,
        *,
        terms: int | None = None,
        beta: float | None = None,
    ) -> None:
        super().__init__()
        if terms is not None and terms < 1:
            raise ValueError(f"terms must be at least 1 or None; got {terms}")
        if beta is not None and (terms is None or not 0 <= beta < float("inf")):
            raise ValueError(f"beta must be at least 0 and finite, and needs terms; got {beta} and terms={terms}")
        self.encoder, self.head = encoder, head
        self.terms, self.beta = terms, beta

    def forward(self, tokens: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """The weights of texts.

        Args:
            tokens: what the encoder takes, `[batch, tokens, ...]`.
            attention_mask: `[batch, tokens]`, bool or numbers; tokens where it is 0 count for nothing.

        Returns:
            w `[batch, vocabulary]`, at least 0; a text without tokens has none.

        Raises:
            TypeError: an encoder that gives something else.
            ValueError: logits that are not `[batch, tokens, vocabulary]`, a mask of another shape, more terms than
                the vocabulary has.
        """
        found = self.encoder(tokens) if attention_mask is None else self.encoder(tokens, attention_mask=attention_mask)
        logits = _tensor_of(found)
        if self.head is not None:
            logits = self.head(logits)
        if logits.dim() != 3:
            raise ValueError(f"logits must be [batch, tokens, vocabulary]; got {tuple(logits.shape)}")
        if attention_mask is not None:
            if attention_mask.shape != logits.shape[:2]:
                expected, shape = tuple(logits.shape[:2]), tuple(attention_mask.shape)
                raise ValueError(f"attention_mask must be {expected}, as the tokens are; got {shape}")
            logits = logits.masked_fill(attention_mask[..., None] == 0, -torch.inf)
        # One logarithm for each text, not for each token: it keeps the order.
        return self.keep(logits.max(1).values.relu().log1p())

    def keep(self, weights: torch.Tensor) -> torch.Tensor:
        """The `terms` largest of each row of weights `[..., vocabulary]`, the others 0; all without `terms`."""
        if self.terms is None:
            return weights
        if self.terms > weights.shape[-1]:
            raise ValueError(f"terms must be at most the {weights.shape[-1]} of the vocabulary; got {self.terms}")
        if self.beta is None:
            return weights * hard_topk(weights, self.terms)
        return weights * soft_topk(weights, self.terms, beta=self.beta, straight_through=True).to(weights.dtype)

    def extra_repr(self) -> str:
        """Settings, for printing."""
        return f"terms={self.terms}, beta={self.beta}"


def flops_loss(weights: torch.Tensor, idf: torch.Tensor | None = None) -> torch.Tensor:
    """What a batch of texts costs an inverted index: sum over terms j of (mean over texts i of |w_ij|)^2.

    A term that many texts have costs most. With `idf` a term costs |w_ij| / idf_j: frequent words cost more, rare
    ones less.

    Args:
        weights: w, `[batch, vocabulary]`, floating point.
        idf: inverse document frequencies above 0, `[vocabulary]`; None: 1.

    Returns:
        A 0-dim tensor, float32 for half precision.

    Raises:
        ValueError: weights that are no matrix, or idf of another shape.

    Source: Paria et al., "Minimizing FLOPs to Learn Efficient Sparse Representations", ICLR 2020. The idea of the idf
        is from Geng et al., arXiv 2411.04403; dividing by it is our form.
    """
    if weights.dim() != 2:
        raise ValueError(f"weights must be [batch, vocabulary]; got {tuple(weights.shape)}")
    if idf is not None and idf.shape != weights.shape[1:]:
        raise ValueError(f"idf must be [{weights.shape[1]}], one for each term; got {tuple(idf.shape)}")
    dtype = torch.float64 if weights.dtype == torch.float64 else torch.float32
    means = weights.abs().mean(0, dtype=dtype)
    return ((means if idf is None else means / idf) ** 2).sum()


def to_csr(weights: torch.Tensor) -> csr_array:
    """Weights `[texts, vocabulary]` as a SciPy CSR array; `.T.tocsr()` of it has the texts of each term.

    Raises:
        ImportError: SciPy is not installed. ValueError: weights that are no matrix.
    """
    from scipy.sparse import csr_array

    if weights.dim() != 2:
        raise ValueError(f"weights must be [texts, vocabulary]; got {tuple(weights.shape)}")
    found = weights.detach().cpu()
    return csr_array((found if found.dtype == torch.float64 else found.float()).numpy())


def _tensor_of(found: Any) -> torch.Tensor:
    for name in ("logits", "last_hidden_state"):
        found = getattr(found, name, found)
    first = found[0] if isinstance(found, tuple) and found else found
    if not isinstance(first, torch.Tensor):
        raise TypeError(
            "encoder must give a tensor, a tuple that begins with one, .logits or .last_hidden_state; got"
            f" {type(found).__name__}"
        )
    return first
