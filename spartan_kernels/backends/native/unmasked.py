"""Lists without the entries that are masked by -inf, for kernels that know none."""

from __future__ import annotations

import torch


class Unmasked:
    """What is left of a list.

    The kernels of a list refuse them; a call then tries once more with this, and lists without any pay nothing for it.
    """

    def __init__(self, values: list[torch.Tensor], costs: list[torch.Tensor]) -> None:
        self.where = [v != -torch.inf for v in values]
        self.values = self.parts(values)
        self.costs = [c[w] if c.dim() else c for c, w in zip(costs, self.where, strict=True)] if costs else []

    def parts(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """What belongs to the entries that are left, of what belongs to all."""
        return [t[w] for t, w in zip(tensors, self.where, strict=True)]

    def whole(self, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        """The inverse: 0, or False, where entries are masked."""
        return [p.new_zeros(w.shape).masked_scatter_(w, p) for p, w in zip(parts, self.where, strict=True)]
