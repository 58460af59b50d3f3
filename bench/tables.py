"""The documentation's tables, from committed results: `python -m bench.tables` writes them, `--check` only compares.

A table stands between `<!-- results:NAME -->` and `<!-- /results -->`, in the README or a page of `docs`; nothing
between the two is written by hand.
"""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Annotated

import typer

from bench import save
from bench.accuracy_table import NOT_RUN, accuracy_tables
from bench.machine import ROOT
from bench.markdown import markdown_table, provenance
from bench.pretrained import METHODS
from bench.product_table import products
from bench.pruned import tables as pruned_tables
from bench.pruned_trained import tables as pruned_trained_tables
from bench.run import Report, Result
from bench.short_tables import FAMILIES, accuracy_of, accuracy_short, speed_short, training_short
from examples.layers import study

_IN_FIGURES = ("masked_conv", "masked_matmul")  # ops whose many cases are read from a figure
_SECTION = re.compile(r"(<!-- results:([\w-]+) -->\n).*?(<!-- /results -->)", re.DOTALL)


def accuracy(results: Path) -> str:
    """Accuracy of each method at each sparsity over the seeds, one table for each model and block size."""
    data = json.loads((results / "accuracy.json").read_text(encoding="utf-8"))
    seeds = len({record["seed"] for record in data["results"]})
    parts = []
    for table in accuracy_tables(data["results"]):
        model = data["models"][table.model]
        blocks = "" if table.block == 1 else f", {table.block}×{table.block} blocks"
        steps = sorted({record["steps"] for record in data["results"] if record["model"] == table.model})
        what = model["what"][0].upper() + model["what"][1:]
        merit = "; bits per byte on files held out, lower is better" if "bits" in table.header[0] else ""
        parts.append(
            f"{markdown_table(table.header, table.cells)}\n{what}{blocks}{merit}; dense: {table.dense}."
            f" {', '.join(map(str, steps))} steps of {model['recipe']['batch_size']}.\n\n"
        )
    return (
        f"{''.join(parts)}{data['data']}: test accuracy in percent, mean and standard deviation of {seeds} seeds, at"
        f" the fraction of zeros in the masked weights, or of FLOPs removed from them; {NOT_RUN}: not run."
        f" {data['processor']}, PyTorch {data['versions']['torch']}, {data['date'][:10]}.\n"
    )


def pretrained(results: Path) -> str:
    """Fine-tuning of a trained encoder: cosine to its dense embeddings and recall, by method and sparsity."""
    data = json.loads((results / "pretrained.json").read_text(encoding="utf-8"))
    found = {(record["method"], record["sparsity"]): record for record in data["results"]}
    sparsities = sorted({sparsity for _, sparsity in found})

    def cell(record: dict[str, float] | None) -> str:
        return NOT_RUN if record is None else f"{record['cosine']:.3f}, {record['recall']:.3f}"

    methods = [method for method in METHODS if any((method, s) in found for s in sparsities)]
    rows = [[method, *(cell(found.get((method, s))) for s in sparsities)] for method in methods]
    recipe, recall = data["recipe"], data["dense"]["recall"]
    training = f"{recipe['steps']} steps of {recipe['batch_size']} texts of {recipe['tokens']} tokens at most"
    header = ["method", *(f"{100 * s:.0f}% zeros" for s in sparsities)]
    return (
        f"{markdown_table(header, rows)}\nCosine to the dense embeddings, and recall of the other half of a pair among"
        f" {data['held_out_pairs']} held out (dense: {recall:.3f}); {training}, AdamW at {recipe['learning_rate']:g},"
        f" one seed. {data['processor']}, PyTorch {data['versions']['torch']}, {data['date'][:10]}.\n"
    )


def pruned(results: Path) -> str:
    """Pruning of a trained encoder, by score and sparsity, and the time of packed weights."""
    return pruned_tables(json.loads((results / "pruned.json").read_text(encoding="utf-8")))


def pruned_trained(results: Path) -> str:
    """Pruning of a language model and a vision transformer, before and after some training."""
    return pruned_trained_tables(json.loads((results / "pruned-trained.json").read_text(encoding="utf-8")))


def _reports(folder: Path) -> list[Report]:
    names = [p for p in sorted(folder.glob("*.json")) if p.stem not in _IN_FIGURES and not p.stem.endswith("-quick")]
    return [save.from_json(p.read_text(encoding="utf-8"), str(p)) for p in names]


def _milliseconds(result: Result) -> str:
    assert result.time is not None
    return f"{1e3 * result.time.median:.3g} ms"


def speed(results: Path) -> str:
    """Every case of every device, and how many times as long as ours its peers take."""
    parts = []
    for folder in sorted(p for p in results.iterdir() if p.is_dir()):
        reports = _reports(folder)
        if not reports:
            continue
        rows = []
        for report in reports:
            for result in report.results:
                if result.time is None:
                    continue
                copies = result.peers.get("copy")
                others = [f"{n} {p.ratio.median:.3g}×" for n, p in result.peers.items() if n != "copy"]
                in_copies = f"{1 / copies.ratio.median:.2f}" if copies else ""
                rows.append([f"`{result.case}`", _milliseconds(result), in_copies, ", ".join(others)])
        header = ["case", "time", "in copies of its tensor", "peers, as a multiple of our time"]
        parts.append(f"{markdown_table(header, rows)}\n{provenance(reports)}")
    return "\n".join(parts)


def plans(results: Path) -> str:
    """What the launch plans of the products allow on a GPU, from gpu-plan.csv."""
    with (results / "gpu-plan.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["direction"].startswith("forward")]

    def line(row: dict[str, str]) -> list[str]:
        part = float(row["plan"]) / float(row["bound"])
        return [
            *(row[key] for key in ("shape", "block", "direction", "tile", "l2_megabytes", "plan", "bound")),
            f"{part:.2f}",
        ]

    header = ["in to out", "block", "product", "tile", "MB from L2", "TFLOP/s it allows", "TFLOP/s, bound", "part"]
    return (
        f"{markdown_table(header, [line(row) for row in rows])}\nComputed from the launch plans, not measured: an H100"
        " with 800 TFLOP/s in bfloat16, 1600 in float8, and 5.5 TB/s from its L2 cache; 8192 tokens of bfloat16, a"
        " tenth of the blocks active. The pass that rounds them to float8 is not in it: 31.5 µs at 4096 columns. The"
        " bound counts the bytes of x alone, which one line of blocks after the other reads.\n"
    )


def _cells(path: Path, columns: dict[str, str]) -> str:
    """A table of a CSV file: its columns by name, under other headers."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return markdown_table(list(columns.values()), [[row[name] for name in columns] for row in rows])


def counts(results: Path) -> str:
    """Instructions and bytes for each entry of the GPU kernels, from gpu-counts.csv and its companions."""
    kernels = {
        "kernel": "kernel", "configuration": "configuration", "note": "entries", "registers": "registers",
        "instructions": "instructions", "cycles": "cycles", "pipe": "busiest pipe", "bytes": "bytes",
        "memory_microseconds": "µs of memory", "microseconds": "µs", "bound": "bound by",
    }  # fmt: skip
    calls = {
        "operation": "call", "launches": "launches", "working": "that work", "bytes": "bytes",
        "limit_microseconds": "µs of memory", "microseconds": "µs",
    }  # fmt: skip
    return (
        f"{_cells(results / 'gpu-operations.csv', calls)}\n"
        f"{_cells(results / 'gpu-counts.csv', kernels)}\n"
        "Counted from machine code for sm_90 and from launch plans, not measured: an H100 with 3.35 TB/s and 132"
        " processors of 4 schedulers at 1.755 GHz. Instructions, cycles of a scheduler and bytes are for each entry,"
        " times for 25.6 million entries; a launch takes 1.5 µs.\n"
    )


def predicted(results: Path) -> str:
    """What the products reach by their counts on a GPU, from gpu-counts-products.csv."""
    columns = {
        "shape": "in to out", "block": "block", "product": "product", "tile": "tile", "registers": "registers",
        "instructions": "instructions", "issue": "TFLOP/s by them", "plan": "by L2", "predicted": "predicted",
        "bound": "bound", "part": "part",
    }  # fmt: skip
    return (
        f"{_cells(results / 'gpu-counts-products.csv', columns)}\n"
        "Counted from machine code for sm_90 and from launch plans, not measured: the H100 above, with 132 processors"
        " of 4 schedulers at 1.755 GHz. Instructions of a scheduler are for each clock of the tensor cores. Forward"
        " passes and input gradients first multiply the weights by their gates, in float8 round x, at 3.35 TB/s.\n"
    )


def few_tokens(results: Path) -> str:
    """Few tokens and packed single weights on a GPU, from gpu-few-tokens.csv."""
    columns = {
        "dtype": "dtype", "tokens": "tokens", "zeros": "zeros", "instructions": "instructions", "lines": "lines",
        "memory": "µs of memory", "gather": "µs of lines", "issue": "µs of instructions", "microseconds": "µs",
        "dense": "µs, dense", "ratio": "times as fast",
    }  # fmt: skip
    return (
        f"{_cells(results / 'gpu-few-tokens.csv', columns)}\n"
        "Counted from machine code for sm_90, not measured: the H100 above. Instructions of a warp and lines of the L1"
        " cache, one in a clock of a processor, are for 32 kept weights; µs and µs, dense hold a launch of 1.5 µs.\n"
    )


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def compiled(results: Path) -> str:
    """What the GPU kernels need on each target, from gpu-compile.csv."""
    with (results / "gpu-compile.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    newest = max((row.get("triton", "") for row in rows), key=_version, default="")
    # other versions are compiled for one target, and edges of integers without optimisation
    rows = [row for row in rows if row.get("triton", "") in ("", newest) and int(row["registers"])]
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in rows:
        language = "CUDA C++" if row["label"].startswith("CUDA") else "Triton"
        groups.setdefault((language, row["target"]), []).append(row)

    def most(group: list[dict[str, str]], key: str) -> int:
        return max(int(row[key]) for row in group)

    lines = [
        [
            language,
            target,
            str(len(group)),
            str(most(group, "registers")),
            str(sum(int(row["spilled"]) for row in group)),
            f"{most(group, 'shared') / 1024:.1f} KiB",
        ]
        for (language, target), group in sorted(groups.items(), reverse=True)
    ]
    header = ["kernels", "target", "compiled", "most registers", "bytes spilled", "most shared memory"]
    return f"{markdown_table(header, lines)}\nCompiled only: not yet run on a GPU.\n"


def layer(path: Path) -> str:
    """What the example of a layer came to, from the file that it wrote."""
    data = json.loads(path.read_text(encoding="utf-8"))
    seeds = len({record["seed"] for record in data["results"]})
    spread = f" Mean and standard deviation of {seeds} seeds." if seeds > 1 else ""
    threads = f"{data['threads']} thread{'s' if data['threads'] > 1 else ''}"
    return (
        f"{markdown_table(*study.table(data))}\n{data['about']}{spread} {data['processor']}, {threads},"
        f" PyTorch {data['versions']['torch']}, {data['date'][:10]}.\n"
    )


LAYERS = ROOT / "examples" / "layers" / "results"
TABLES = {
    "accuracy": accuracy,
    "accuracy-short": accuracy_short,
    **{f"accuracy-{family}": accuracy_of(family) for family in FAMILIES},
    "pretrained": pretrained,
    "pruned": pruned,
    "pruned-trained": pruned_trained,
    "products": products,
    "speed": speed,
    "speed-short": speed_short,
    "training-short": training_short,
    "compiled": compiled,
    "plans": plans,
    "counts": counts,
    "few-tokens": few_tokens,
    "predicted": predicted,
    **{f"layer-{path.stem}": lambda _, path=path: layer(path) for path in sorted(LAYERS.glob("*.json"))},
}


def pages(root: Path) -> list[Path]:
    """The README and the pages of `docs` that have tables of results."""
    found = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    return [path for path in found if "_build" not in path.parts and "<!-- results:" in path.read_text("utf-8")]


def rendered(text: str, results: Path) -> str:
    """`text` with every table made anew.

    Raises:
        ValueError: a section whose name no table has.
    """

    def section(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"section results:{match[2]} is none of {', '.join(TABLES)}")
        return f"{match[1]}{TABLES[match[2]](results)}{match[3]}"

    return _SECTION.sub(section, text)


def main(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit 1 when a table differs.")] = False,
) -> None:
    """Write the tables of the README and of docs from bench/results."""
    differ = []
    for page in pages(ROOT):
        text = page.read_text(encoding="utf-8")
        new = rendered(text, save.RESULTS)
        if new != text:
            differ.append(str(page.relative_to(ROOT)))
            if not check:
                page.write_text(new, encoding="utf-8")
    if check and differ:
        print(f"{', '.join(differ)} differ from bench/results: run `python -m bench.tables`")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
