"""Layers whose activations are sparse, on the operators: one file each, `nn.Module`s to put into any model."""

from __future__ import annotations

from spartan.layers.topk_autoencoder import AutoencoderLoss, TopKAutoencoder, downstream_gradient

__all__ = ["AutoencoderLoss", "TopKAutoencoder", "downstream_gradient"]
