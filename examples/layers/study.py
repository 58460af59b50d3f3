"""What every example of this folder does with its runs: options, a table over the seeds, a results file, a figure."""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

Record = dict[str, Any]
Draw = Callable[[Any, Sequence[Record]], None]


def options(description: str | None, **more: Mapping[str, Any]) -> argparse.Namespace:
    """Read the command line: `--out`, `--seeds`, `--quick`, and `more` by name, as `add_argument` takes them."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("spartan-layers"), help="folder of the results and the figure")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each setting")
    parser.add_argument("--quick", action="store_true", help="a trial of seconds: one seed, very few steps")
    for name, settings in more.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **settings)
    found = parser.parse_args()
    if found.seeds < 1:
        parser.error(f"--seeds must be at least 1; got {found.seeds}")
    found.seeds = range(1 if found.quick else found.seeds)
    return found


@dataclass
class Study:
    """Records of runs, and the table of their means over the seeds.

    Attributes:
        name: of the results file and the figure.
        by: the settings that make a row of the table, in its order: key of the record and heading.
        measures: the other columns: key of the record, then heading and format, as ("accuracy %", "{:.2f}").
        about: what was run, in a sentence or two: data, model, steps.
    """

    name: str
    by: Mapping[str, str]
    measures: Mapping[str, tuple[str, str]]
    about: str
    records: list[Record] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    def add(self, seed: int, **record: Any) -> None:
        """Keep the record of a run, which has every key of `by` and some of `measures`, and print it."""
        unknown = record.keys() - self.by.keys() - self.measures.keys()
        if unknown or self.by.keys() - record.keys():
            raise ValueError(f"a record has the keys {[*self.by]} and some of {[*self.measures]}; got {[*record]}")
        self.records.append({"seed": seed, **record})
        cells = [f"{key} {_cell(record[key])}" for key in self.by]
        found = {key: pattern for key, (_, pattern) in self.measures.items() if key in record}
        cells += [f"{key} {pattern.format(record[key])}" for key, pattern in found.items()]
        print(f"seed {seed}: {', '.join(cells)}", flush=True)

    def finish(self, out: Path, draw: Draw) -> None:
        """Print the table; write `out/NAME.json` and, as `draw(axes, records)` draws it, `out/NAME.png`."""
        import matplotlib
        from rich import box
        from rich.console import Console
        from rich.table import Table

        matplotlib.use("Agg")
        from matplotlib import pyplot

        content = {
            "about": self.about,
            "by": dict(self.by),
            "measures": {key: list(column) for key, column in self.measures.items()},
            "processor": _processor(),
            "threads": torch.get_num_threads(),
            "versions": {"torch": torch.__version__},
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - self.started, 1),
            "results": self.records,
        }
        header, rows = table(content)
        shown = Table(*header, box=box.SIMPLE_HEAD)
        for row in rows:
            shown.add_row(*row)
        Console().print(shown)
        out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, indent=1, ensure_ascii=False)
        (out / f"{self.name}.json").write_text(text + "\n", encoding="utf-8")
        figure, axes = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
        draw(axes, self.records)
        figure.savefig(out / f"{self.name}.png", dpi=120)
        pyplot.close(figure)
        print(f"{content['seconds']:.0f} s; wrote {self.name}.json and {self.name}.png to {out}")


def table(content: Record) -> tuple[list[str], list[list[str]]]:
    """Header and cells: a row for each setting, mean ± standard deviation where it has several seeds."""
    by, measures = content["by"], content["measures"]
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in content["results"]:
        groups.setdefault(tuple(record[key] for key in by), []).append(record)
    shown = {key: column for key, column in measures.items() if any(key in r for r in content["results"])}
    header = [*by.values(), *(heading for heading, _ in shown.values())]
    rows = [
        [*map(_cell, setting), *(_over_seeds(records, key, pattern) for key, (_, pattern) in shown.items())]
        for setting, records in groups.items()
    ]
    return header, rows


def means(records: Sequence[Record], measure: str, **setting: Any) -> float:
    """Mean of a measure over the records with this setting."""
    return statistics.mean(r[measure] for r in records if setting.items() <= r.items())


def _over_seeds(records: Sequence[Record], key: str, pattern: str) -> str:
    values = [record[key] for record in records if key in record]
    if not values:
        return "–"
    mean = pattern.format(statistics.mean(values))
    if len(values) == 1 or len(set(values)) == 1:
        return mean
    return f"{mean} ± {pattern.format(statistics.stdev(values))}"


def _cell(value: Any) -> str:
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M) if cpuinfo.exists() else None
    return match[1].strip() if match else platform.processor() or platform.machine()
