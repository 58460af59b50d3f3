"""Results of the demonstration as a table, a figure and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spartan.saving.files import replacing

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["RunResult", "results_table", "save_figure", "save_json"]


@dataclass(frozen=True)
class RunResult:
    """What one training run came to.

    Attributes:
        sparsity: fraction of zeros asked for in the hidden matrices.
        measured_sparsity: fraction of zeros there in the model loaded back from its file.
        accuracy: of the trained model on the test images; `loaded_accuracy` of the model loaded back.
        step_ratio: step time over that of a dense twin stepping in between; None if the run was too short.
        step_seconds, mask_seconds: medians of a step, and of the sparsifier's part in one.
        inference_ratio: time of inference on packed blocks over that of the dense product; None without blocks.
        file_bytes: size of the saved model.
        kept: fraction of non-zeros by weight name.
        curve: test accuracy after each epoch.
    """

    model: str
    method: str
    sparsity: float
    block: int
    measured_sparsity: float
    accuracy: float
    loaded_accuracy: float
    step_ratio: float | None
    step_seconds: float
    mask_seconds: float
    inference_ratio: float | None
    file_bytes: int
    kept: dict[str, float]
    curve: list[float]

    @property
    def label(self) -> str:
        """Method, and the block size where it is not 1."""
        return self.method if self.block == 1 else f"{self.method} {self.block}x{self.block}"


def results_table(results: Sequence[RunResult], title: str) -> Table:
    """Make a rich table of one row per run; differences are to the dense run of the same model."""
    from rich import box
    from rich.table import Table

    caption = (
        "zeros: asked for, and counted in the saved file, over the hidden matrices\n"
        "(all linear layers but the last); test: accuracy; to dense: points;\n"
        "step/dense: beside a dense twin; masks: the sparsifier's part of a step;\n"
        "infer/dense: on packed blocks, beside the same weights multiplied densely"
    )
    table = Table(title=title, caption=caption, caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("model, method", no_wrap=True)
    for heading in COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    dense = {result.model: result.accuracy for result in results if result.method == "Dense"}
    for index, result in enumerate(results):
        last = index + 1 == len(results) or results[index + 1].model != result.model
        table.add_row(f"{result.model} {result.label}", *_cells(result, dense.get(result.model)), end_section=last)
    return table


COLUMNS = (
    "zeros\n%",
    "in\nfile",
    "test\n%",
    "to\ndense",
    "step/\ndense",
    "step\nms",
    "masks\nms",
    "infer/\ndense",
    "file\nKiB",
)


def _cells(result: RunResult, dense: float | None) -> tuple[str, ...]:
    compared = dense is not None and result.method != "Dense"
    return (
        f"{100 * result.sparsity:.0f}",
        f"{100 * result.measured_sparsity:.2f}",
        f"{100 * result.accuracy:.2f}",
        f"{100 * (result.accuracy - dense):+.2f}" if compared and dense is not None else "",
        "" if result.step_ratio is None else f"{result.step_ratio:.2f}",
        f"{1e3 * result.step_seconds:.1f}",
        f"{1e3 * result.mask_seconds:.2f}",
        "" if result.inference_ratio is None else f"{result.inference_ratio:.2f}",
        f"{result.file_bytes / 1024:.0f}",
    )


def save_json(path: Path, content: dict[str, Any], results: Sequence[RunResult]) -> None:
    """Write `content` with the results as JSON."""
    document = {**content, "results": [asdict(result) for result in results]}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(document, indent=1) + "\n")


def save_figure(path: Path, results: Sequence[RunResult], title: str) -> None:
    """Save a PNG: for each model accuracy against sparsity, and the kept fraction of each layer.

    Raises:
        ValueError: `results` is empty.
        ImportError: matplotlib is not installed.
    """
    if not results:
        raise ValueError("results must hold at least one run; got none")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(result.model for result in results))
    figure = Figure(figsize=(12, 4.2 * len(models)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    axes = figure.subplots(len(models), 2, squeeze=False)
    for (left, right), model in zip(axes, models, strict=True):
        own = [result for result in results if result.model == model]
        _draw_accuracy(left, model, own)
        _draw_kept(right, model, own)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def _draw_accuracy(axes: Any, model: str, results: Sequence[RunResult]) -> None:
    for result in results:
        if result.method == "Dense":
            axes.axhline(100 * result.accuracy, color="black", linestyle="--", linewidth=1, label="Dense")
    labels = dict.fromkeys(result.label for result in results if result.method != "Dense")
    for label in labels:
        points = sorted((100 * r.sparsity, 100 * r.accuracy) for r in results if r.label == label)
        marker = "o" if len(points) > 1 else "s"
        axes.plot(*zip(*points, strict=True), marker=marker, label=label)
    axes.set(xlabel="sparsity of the hidden matrices, %", ylabel="test accuracy, %", title=f"{model}: accuracy")
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_kept(axes: Any, model: str, results: Sequence[RunResult]) -> None:
    sparse = [result for result in results if result.method == "Spartan"]
    height = 0.8 / max(1, len(sparse))
    for index, result in enumerate(sparse):
        places = [layer + (index - (len(sparse) - 1) / 2) * height for layer in range(len(result.kept))]
        axes.barh(
            places,
            [100 * kept for kept in result.kept.values()],
            height,
            label=f"{result.label}, {result.sparsity:.0%}",
        )
    names = [name.removesuffix(".weight") for name in results[0].kept]
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="weights kept, %", title=f"{model}: kept by layer")
    axes.invert_yaxis()
    axes.grid(alpha=0.3, axis="x")
    if sparse:
        axes.legend()
