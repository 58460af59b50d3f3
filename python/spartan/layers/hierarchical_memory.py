"""A memory of two levels that each token reads sparsely."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import embedding, linear

from spartan.layers.selection import kept_indices

__all__ = ["HierarchicalMemory"]

_FEW = 1 / 32  # of the children: gathered for each token, they are read as often as there are tokens


class HierarchicalMemory(nn.Module):
    """Cells in groups; each token chooses k groups by their parents and reads their children.

    With parent keys p_i and the k parents S whose scores h . p_i are largest, a = softmax over S of h . p_i.
    With child keys q_ij and cells c_ij, b_i = softmax over j of h . q_ij, within each parent. The output is

        h + sum over i in S and j of a_i b_ij c_ij

    Cells start at zero: the output is then h. The gradient of the choice is that of a, over the parents kept; with one
    kept, a is 1 and the parents' keys learn nothing.

    Args:
        width: d, entries of a hidden state.
        parents: groups. children: cells in each. kept: k, groups that a token reads.
        gather: whether the children of kept parents are gathered for each token, which takes k / parents of the
            products, or all are multiplied and the others masked. None: gathered where that is `_FEW` of them or less.

    Attributes:
        parent_keys: `[parents, d]`. child_keys, cells: `[parents, children, d]`.

    Raises:
        ValueError: sizes below 1, or more groups kept than there are.

    Source: Deshpande et al., "SPARTAN: Sparse Hierarchical Memory for Parameter-Efficient Transformers", 2022,
        arXiv 2211.16634. Separate keys of the children are ours.
    """

    def __init__(
        self, width: int, parents: int = 32, children: int = 4, kept: int = 4, gather: bool | None = None
    ) -> None:
        super().__init__()
        for name, size in (("width", width), ("parents", parents), ("children", children)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1; got {size}")
        if not 1 <= kept <= parents:
            raise ValueError(f"kept must be from 1 to the {parents} parents; got {kept}")
        self.width, self.kept = width, kept
        self.gather = kept <= _FEW * parents if gather is None else gather
        scale = width**-0.5  # scores of entries of variance 1 then have variance 1
        self.parent_keys = nn.Parameter(scale * torch.randn(parents, width))
        self.child_keys = nn.Parameter(scale * torch.randn(parents, children, width))
        self.cells = nn.Parameter(torch.zeros(parents, children, width))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states and what they read.

        Args:
            hidden: h, `[..., d]`, floating point.

        Returns:
            Shape and dtype of `hidden`, differentiable once and more.

        Raises:
            ValueError: hidden states of another width.
        """
        if hidden.shape[-1:] != (self.width,):
            raise ValueError(f"hidden must be [..., {self.width}]; got {tuple(hidden.shape)}")
        tokens = hidden.reshape(-1, self.width).to(self.cells.dtype)
        scores = linear(tokens, self.parent_keys)
        kept = kept_indices(scores, self.kept)
        read = self._gathered(tokens, scores, kept) if self.gather else self._masked(tokens, scores, kept)
        return hidden + read.view_as(hidden).to(hidden.dtype)

    @property
    def multiply_adds(self) -> int:
        """Products for one token, of scores and of cells."""
        parents, children, _ = self.cells.shape
        return self.width * (parents + 2 * children * (self.kept if self.gather else parents))

    def extra_repr(self) -> str:
        """Settings, for printing."""
        parents, children, _ = self.cells.shape
        return f"{self.width}, parents={parents}, children={children}, kept={self.kept}, gather={self.gather}"

    def _gathered(self, tokens: torch.Tensor, scores: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        children = self.cells.shape[1]
        shares = scores.gather(-1, kept).softmax(-1)
        # An embedding, as its gradient adds rows in parallel; that of table[kept] does not on a CPU.
        keys, cells = (
            embedding(kept, table.flatten(1)).view(len(kept), self.kept * children, self.width)
            for table in (self.child_keys, self.cells)
        )
        within = torch.bmm(keys, tokens[..., None]).view(*kept.shape, children).softmax(-1)
        return torch.bmm((shares[..., None] * within).flatten(1)[:, None], cells)

    def _masked(self, tokens: torch.Tensor, scores: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        masked = torch.full_like(scores, -torch.inf).scatter(-1, kept, scores.gather(-1, kept))
        within = linear(tokens, self.child_keys.flatten(0, 1)).view(*scores.shape, self.cells.shape[1]).softmax(-1)
        weights = masked.softmax(-1)[..., None] * within
        return weights.flatten(1) @ self.cells.flatten(0, 1)
