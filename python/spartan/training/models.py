"""Models to train: a perceptron, a residual network and a vision transformer for images, a transformer for bytes."""

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
    """Multi-head self-attention over `[n, tokens, dim]`, of plain linear layers that can be sparse.

    With `causal`, a token attends to itself and those before it. Raises ValueError if `heads` does not divide `dim`.
    """

    def __init__(self, dim: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim must be a multiple of heads; got dim {dim}, heads {heads}")
        self.heads, self.causal = heads, causal
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.projection = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attend: softmax(Q K^T / sqrt(d)) V by head, then the output projection."""
        n, tokens, dim = x.shape
        heads = self.query_key_value(x).view(n, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind(0)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.projection(attended.transpose(1, 2).reshape(n, tokens, dim))


class TransformerLayer(nn.Module):
    """Pre-normalised attention and a two-layer perceptron, each on a residual path."""

    def __init__(self, dim: int, heads: int, expansion: int, causal: bool = False) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, causal)
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


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation, added to their input; where shapes differ, to its 1x1 convolution.

    Input `[n, channels, height, width]`, output `[n, width, height / stride, width / stride]`.

    Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016.
    """

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != width:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """relu(F(x) + shortcut(x))."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResidualNetwork(nn.Sequential):
    """A 3x3 stem and stages of `depth` residual blocks, each after the first at half the height and width; mean, head.

    Input `[n, 1, side, side]`, output `[n, classes]`.
    """

    def __init__(self, side: int, classes: int, widths: tuple[int, ...] = (16, 32, 64), depth: int = 1) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict(stem=nn.Conv2d(1, widths[0], 3, padding=1, bias=False))
        layers["norm"] = nn.BatchNorm2d(widths[0])
        layers["relu"] = nn.ReLU()
        channels = widths[0]
        for stage, width in enumerate(widths, 1):
            for block in range(1, depth + 1):
                stride = 2 if stage > 1 and block == 1 else 1
                layers[f"stage{stage}_block{block}"] = ResidualBlock(channels, width, stride)
                channels = width
        layers["pool"] = nn.AdaptiveAvgPool2d(1)
        layers["flatten"] = nn.Flatten()
        layers["head"] = nn.Linear(channels, classes)
        super().__init__(layers)


class ByteTransformer(nn.Module):
    """A language model of bytes: a causal transformer with learned positions.

    Input `[n, tokens]` int64 in [0, 256) with at most `context` tokens, output `[n, tokens, 256]`: logits of the next.

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
    """

    VOCABULARY = 256
    CONTEXT = 128

    def __init__(
        self, context: int = CONTEXT, dim: int = 128, depth: int = 4, heads: int = 4, expansion: int = 4
    ) -> None:
        super().__init__()
        self.context = context
        self.embed = nn.Embedding(self.VOCABULARY, dim)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.positions = nn.Parameter(0.02 * torch.randn(context, dim))
        self.layers = nn.ModuleList(TransformerLayer(dim, heads, expansion, causal=True) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, self.VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the byte after each."""
        x = self.embed(tokens) + self.positions[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


MODELS: dict[str, Callable[..., nn.Module]] = {
    "MLP": multilayer_perceptron,
    "MLP without normalisation": partial(multilayer_perceptron, normalise=False),
    "ViT": VisionTransformer,
    "ViT 128×4": partial(VisionTransformer, dim=128, depth=4),
}
