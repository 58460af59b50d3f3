"""Masked weights, and the groups of them that share a budget."""

from __future__ import annotations

from spartan.masks.mask_set import Mask, MaskedTensor, MaskGroup, MaskSet
from spartan.masks.pattern_group import PatternGroup, require_divisible

__all__ = ["Mask", "MaskGroup", "MaskSet", "MaskedTensor", "PatternGroup", "require_divisible"]
