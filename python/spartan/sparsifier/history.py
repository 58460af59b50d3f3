"""How the masks of a training developed: a recorder, its figure, and the way to any logger."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from spartan.nn.wrappers import same_names
from spartan.saving.files import replacing
from spartan.sparsifier.report import stability
from spartan.sparsifier.sparsifier import Sparsifier

__all__ = ["History", "OnStep", "ScalarWriter", "scalars_to"]

OnStep = Callable[[int, dict[str, float]], None]


class ScalarWriter(Protocol):
    """What `scalars_to` writes to: TensorBoard's `SummaryWriter`, for one."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Take a value of a step."""


class History:
    """Records, every `interval` optimizer steps, where the masks of a sparsifier stand.

    Call `record` once after each step. What is recorded, as a row of `rows` and as scalars for `on_step`:
    "step"; "sparsity", as `Sparsifier.sparsity`; "beta", if there is one; "budget", the fraction of the masked weights'
    cost that is kept; by weight "kept", the fraction of it, and "stability", (blocks kept in both) / (blocks kept in
    either) of the masks of this record and the one before; and what `record` is given. As scalars the last two are
    "kept/NAME" and "stability/NAME".

    Args:
        sparsifier: not finalized.
        interval: steps between two records, at least 1. A record waits for the device and reads the masks; with
            sharded weights all ranks make it.
        on_step: called with the step and the scalars of each record, such as `scalars_to(SummaryWriter())`.

    Raises:
        TypeError: not a sparsifier. ValueError: an interval below 1.

    Example::

        history = spartan.History(sparsifier, interval=100)
        for ...:
            ...
            optimizer.step()
            history.record(loss=loss)
        history.save_figure("masks.png")
    """

    def __init__(self, sparsifier: Sparsifier, interval: int = 1, on_step: OnStep | None = None) -> None:
        if not isinstance(sparsifier, Sparsifier):
            raise TypeError(f"sparsifier must be a spartan.Sparsifier; got {type(sparsifier).__name__}")
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
            raise ValueError(f"interval must be an int of at least 1; got {interval!r}")
        self.sparsifier, self.interval, self.on_step = sparsifier, interval, on_step
        self.rows: list[dict[str, Any]] = []
        self._masks: dict[str, torch.Tensor] = {}

    def record(self, **scalars: float | torch.Tensor) -> None:
        """Record the masks with `scalars` of your own, such as the loss, if it is time to.

        Raises:
            RuntimeError: the sparsifier is finalized.
        """
        sparsifier = self.sparsifier
        if sparsifier.step_count % self.interval:
            return
        masks = {name: mask.hard for name, mask in sparsifier.masks().items()}
        costs = sparsifier.costs().values()
        own = {name: float(torch.as_tensor(value, device="cpu").detach()) for name, value in scalars.items()}
        row: dict[str, Any] = {"step": sparsifier.step_count, **own, "sparsity": sparsifier.sparsity}
        if sparsifier.beta is not None:
            row["beta"] = sparsifier.beta
        if costs:
            row["budget"] = sum(cost.kept for cost in costs) / sum(cost.dense for cost in costs)
        row["kept"] = sparsifier.kept_fractions()
        row["stability"] = {name: stability(self._masks[name], masks[name]) for name in masks if name in self._masks}
        self._masks = {name: mask.clone() for name, mask in masks.items()}
        self.rows.append(row)
        if self.on_step is not None:
            self.on_step(row["step"], _scalars(row))

    def state_dict(self) -> dict[str, Any]:
        """The rows and the masks of the last one, for a checkpoint."""
        return {"rows": [dict(row) for row in self.rows], "masks": dict(self._masks)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        current = self.sparsifier.masks()
        names = same_names(state["masks"], current)

        def renamed(parts: dict[str, Any]) -> dict[str, Any]:
            return {names.get(name, name): part for name, part in parts.items()}

        self.rows = [{**row, **{key: renamed(row[key]) for key in ("kept", "stability")}} for row in state["rows"]]
        self._masks = {n: mask.to(current[n].hard.device) for n, mask in renamed(state["masks"]).items()}

    def save_figure(self, path: str | Path) -> None:
        """Save a PNG: by step the kept fraction and the stability of each weight, and beta and budget.

        Raises:
            ValueError: nothing is recorded. ImportError: matplotlib is not installed.
        """
        if not self.rows:
            raise ValueError("history must hold at least one record for a figure; got none")
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 8), layout="constrained")
        FigureCanvasAgg(figure)
        (kept, stable), (beta, budget) = figure.subplots(2, 2, sharex=True)
        for axes, key, title in ((kept, "kept", "fraction kept"), (stable, "stability", "stability of the mask")):
            for name in self.rows[-1][key]:
                axes.plot(*self._curve(key, name), label=name)
            axes.set(title=title, ylim=(-0.02, 1.02))
        if 0 < len(self.rows[-1]["kept"]) <= _MOST_NAMES:
            kept.legend(fontsize="x-small")
        beta.plot(*self._curve("beta"))
        beta.set(title="beta", xlabel="step")
        budget.plot(*self._curve("budget"))
        budget.set(title="cost kept, of that of all masked weights", xlabel="step", ylim=(-0.02, 1.02))
        for axes in (kept, stable, beta, budget):
            axes.grid(alpha=0.3)
        with replacing(Path(path)) as temporary:
            figure.savefig(temporary, dpi=120, format="png")

    def _curve(self, key: str, name: str | None = None) -> tuple[list[int], list[float]]:
        """Steps and values of an entry, of a weight's part of it, where there is one."""
        found = [(row["step"], row.get(key) if name is None else row[key].get(name)) for row in self.rows]
        points = [(step, value) for step, value in found if value is not None]
        return [step for step, _ in points], [value for _, value in points]


_MOST_NAMES = 16  # of which a legend is still a help


def scalars_to(writer: ScalarWriter) -> OnStep:
    """An `on_step` that calls `writer.add_scalar(name, value, step)`, as TensorBoard's takes it, for each scalar."""

    def on_step(step: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)

    return on_step


def _scalars(row: dict[str, Any]) -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat.update({f"{key}/{name}": part for name, part in value.items()})
        elif key != "step":
            flat[key] = value
    return flat
