"""Cases of the layers with sparse activations, one file each."""

from __future__ import annotations

from bench.layers import topk_autoencoder

__all__ = ["topk_autoencoder"]
