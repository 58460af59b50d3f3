"""The models of the demonstration and of the accuracy table: perceptrons and a small vision transformer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def multilayer_perceptron(
    side: int, classes: int, hidden: tuple[int, ...] = (512, 256), normalise: bool = True
) -> nn.Sequential:
    """Linear, batch normalisation (if `normalise`) and ReLU for each width in `hidden`, then a linear classifier.

    Input `[n, 1, side, side]`, output `[n, classes]`.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    width = side * side
    for number, following in enumerate(hidden, 1):
        layers[f"hidden{number}"] = nn.Linear(width, following)
        if normalise:
            layers[f"norm{number}"] = nn.BatchNorm1d(following)
        layers[f"relu{number}"] = nn.ReLU()
        width = following
    layers["head"] = nn.Linear(width, classes)
    return nn.Sequential(layers)


class Attention(nn.Module):
    """Multi-head self-attention over `[n, tokens, dim]`, of plain linear layers that can be sparse."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.projection = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attend: softmax(Q K^T / sqrt(d)) V by head, then the output projection."""
        n, tokens, dim = x.shape
        heads = self.query_key_value(x).view(n, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind(0)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.projection(attended.transpose(1, 2).reshape(n, tokens, dim))


class TransformerLayer(nn.Module):
    """Pre-normalised attention and a two-layer perceptron, each on a residual path."""

    def __init__(self, dim: int, heads: int, expansion: int) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.norm_mlp = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, expansion * dim)
        self.contract = nn.Linear(expansion * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[n, tokens, dim]` to the same shape."""
        x = x + self.attention(self.norm_attention(x))
        return x + self.contract(F.gelu(self.expand(self.norm_mlp(x))))


class VisionTransformer(nn.Module):
    """A vision transformer with square patches, learned positions and mean pooling.

    Input `[n, 1, side, side]`, output `[n, classes]`; `side` must be a multiple of `patch`.

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021.
    """

    def __init__(
        self,
        side: int,
        classes: int,
        patch: int | None = None,
        dim: int = 64,
        depth: int = 2,
        heads: int = 4,
        expansion: int = 2,
    ) -> None:
        super().__init__()
        self.patch = patch or side // 4
        if side % self.patch:
            raise ValueError(f"side must be a multiple of patch; got side {side}, patch {self.patch}")
        tokens = (side // self.patch) ** 2
        self.embed = nn.Linear(self.patch**2, dim)
        self.positions = nn.Parameter(0.02 * torch.randn(tokens, dim))
        self.layers = nn.ModuleList(TransformerLayer(dim, heads, expansion) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Classify: patches to tokens, the layers, mean over tokens, linear classifier."""
        patches = F.pixel_unshuffle(images, self.patch).flatten(2).transpose(1, 2)
        x = self.embed(patches) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


MODELS: dict[str, Callable[..., nn.Module]] = {
    "MLP": multilayer_perceptron,
    "MLP without normalisation": partial(multilayer_perceptron, normalise=False),
    "ViT": VisionTransformer,
}
