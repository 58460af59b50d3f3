"""The figures of the design pages: `python docs/draw.py` writes them beside the pages."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

plt.rcParams["svg.fonttype"] = "none"
plt.rcParams["svg.hashsalt"] = "spartan"  # the same bytes every time

DESIGN = Path(__file__).resolve().parent / "design"
_OURS, _OTHER, _MARK = "#1f6f8b", "#c9c9c9", "#c8553d"
_BETA, _DENSITY = 8.0, 0.1


def _write(figure: Figure, name: str) -> None:
    figure.savefig(DESIGN / f"{name}.svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)


def _box(axis: Axes, x: float, y: float, width: float, title: str, text: str, colour: str) -> None:
    axis.add_patch(FancyBboxPatch((x, y), width, 0.9, boxstyle="round,pad=0.04", fc=colour, ec="#444444", lw=0.8))
    axis.text(x + width / 2, y + 0.62, title, ha="center", va="center", fontsize=9, family="monospace")
    axis.text(x + width / 2, y + 0.26, text, ha="center", va="center", fontsize=7.5, color="#333333")


def _arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axis.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "#444444", "lw": 1})


def packages() -> None:
    """Draw which package imports which."""
    figure, axis = plt.subplots(figsize=(8.4, 3.6))
    _box(axis, 0, 1.5, 2.1, "spartan", "trains: autograd, methods", "#d7e8ee")
    _box(axis, 3, 1.5, 2.6, "spartan_kernels.ops", "what: contracts, schemas", "#eef3d9")
    _box(axis, 6.5, 1.5, 2.6, "...dispatch", "which: the support table", "#eef3d9")
    _arrow(axis, (2.15, 1.95), (2.95, 1.95))
    _arrow(axis, (5.65, 1.95), (6.45, 1.95))
    backends = (
        ("reference", "plain PyTorch"),
        ("native", "C++, CPU"),
        ("triton", "Triton, GPU"),
        ("cuda", "CUDA C++, GPU"),
    )
    for i, (name, text) in enumerate(backends):
        x = 2.4 * i
        _box(axis, x, 0, 2, name, text, "#f5e6dc")
        _arrow(axis, (7.8, 1.45), (x + 1, 1.0))
    axis.text(0, 2.75, "Imports go one way; no backend imports another.", fontsize=9)
    axis.set_xlim(-0.1, 9.4)
    axis.set_ylim(-0.2, 3)
    axis.axis("off")
    figure.tight_layout(pad=0.3)
    _write(figure, "packages")


def _moments(values: np.ndarray, threshold: float) -> tuple[float, float, float]:
    """Mean of m, of its slope s = m (1 - m) and of s (1 - 2 m) at a threshold."""
    mask = 1 / (1 + np.exp(-_BETA * (values - threshold)))
    slope = mask * (1 - mask)
    return float(mask.mean()), float(slope.mean()), float((slope * (1 - 2 * mask)).mean())


def _halley(values: np.ndarray, threshold: float) -> float:
    """One step of Halley's method on logit(mean m) = logit(density)."""
    mass, slope, curve = _moments(values, threshold)
    odds = mass * (1 - mass)
    f = math.log(mass / (1 - mass)) - math.log(_DENSITY / (1 - _DENSITY))
    first = -_BETA * slope / odds
    second = _BETA**2 * (curve / odds - slope**2 * (1 - 2 * mass) / odds**2)
    return threshold - 2 * f * first / (2 * first**2 - f * second)


def solve() -> None:
    """Draw a solve over 4096 magnitudes: the start from a sample, the steps of the threshold, the mask."""
    values = np.abs(np.random.default_rng(0).standard_normal(4096))
    start = float(np.quantile(values[::64], 1 - _DENSITY))  # the hard threshold of a sample
    steps = [start]
    for _ in range(2):
        steps.append(_halley(values, steps[-1]))
    figure, axes = plt.subplots(1, 3, figsize=(10.2, 3.2))
    axes[0].hist(values, bins=60, color=_OTHER)
    axes[0].axvline(start, color=_MARK, lw=1.2)
    axes[0].annotate(
        "hard threshold\nof a sample", (start + 0.08, axes[0].get_ylim()[1] * 0.75), fontsize=7.5, color=_MARK
    )
    axes[0].set_title("1. start", fontsize=9, loc="left")
    axes[0].set_xlabel("v / a", fontsize=8)
    thresholds = np.linspace(0.6, 2.6, 100)
    axes[1].plot(thresholds, [_moments(values, t)[0] for t in thresholds], color=_OURS)
    axes[1].axhline(_DENSITY, color="k", lw=0.8, ls="--")
    axes[1].text(0.62, _DENSITY * 1.08, "budget", fontsize=7.5)
    for i, threshold in enumerate(steps):
        mass = _moments(values, threshold)[0]
        axes[1].plot(threshold, mass, "o", color=_MARK, ms=5)
        error = abs(mass / _DENSITY - 1)
        axes[1].annotate(
            f"{f'step {i}' if i else 'start'}: off by {error:.0e}",
            (threshold, mass),
            xytext=(1.75, 0.5 / 1.45**i),
            fontsize=7.5,
            arrowprops={"arrowstyle": "-", "lw": 0.5, "color": "#888888"},
        )
    axes[1].set_yscale("log")
    axes[1].set_title("2. survey and step", fontsize=9, loc="left")
    axes[1].set_xlabel("threshold t", fontsize=8)
    axes[1].set_ylabel("kept fraction", fontsize=8)
    ordered = np.sort(values)
    axes[2].plot(ordered, 1 / (1 + np.exp(-_BETA * (ordered - steps[-1]))), color=_OURS, label="soft m")
    hard = np.quantile(values, 1 - _DENSITY)
    axes[2].step([0, hard, ordered[-1]], [0, 1, 1], where="post", color="k", lw=0.8, ls="--", label="hard h")
    axes[2].legend(fontsize=7.5, frameon=False)
    axes[2].set_title("3. write", fontsize=9, loc="left")
    axes[2].set_xlabel("v / a", fontsize=8)
    for axis in axes:
        axis.tick_params(labelsize=7)
    figure.tight_layout()
    _write(figure, "solve")


if __name__ == "__main__":
    packages()
    solve()
