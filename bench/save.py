"""Results as files: one JSON for each op, and a CSV of the medians, under bench/results/<device>/."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from bench.machine import ROOT
from bench.run import PeerResult, Report, Result
from bench.timing import Sample

RESULTS = ROOT / "bench" / "results"
VERSION = 1


def _plain(value: Any) -> Any:
    if isinstance(value, Sample):
        # four digits: a committed file need not carry those that mean nothing
        return [float(f"{v:.4g}") for v in value.values]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def to_json(report: Report) -> str:
    """Write a report as text that `from_json` reads back."""
    return json.dumps({"version": VERSION, **_plain(report)}, indent=1) + "\n"


def from_json(text: str, source: str) -> Report:
    """Read a report.

    Raises:
        ValueError: the text is not a report of this version; the message names `source`.
    """
    try:
        data = json.loads(text)
        if data.pop("version") != VERSION:
            raise ValueError("another version")
        results = [_result(r) for r in data.pop("results")]
        copy, matmul = (Sample(tuple(data.pop(name))) for name in ("copy", "matmul"))
        fma = data.pop("fma", None)  # results of before it was measured have none
        return Report(
            copy=copy, matmul=matmul, results=results, fma=None if fma is None else Sample(tuple(fma)), **data
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{source} is not a benchmark result of version {VERSION}: {error}") from error


def _result(data: dict[str, Any]) -> Result:
    peers = {
        name: PeerResult(Sample(tuple(p["time"])), Sample(tuple(p["ratio"]))) for name, p in data.pop("peers").items()
    }
    time = data.pop("time")
    return Result(time=None if time is None else Sample(tuple(time)), peers=peers, **data)


def write(report: Report, folder: Path) -> list[Path]:
    """Write one JSON and one CSV per op into `folder`, each to a temporary name and renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    suffix = "-quick" if report.quick else ""
    written = []
    for op in dict.fromkeys(r.op for r in report.results):
        part = dataclasses.replace(report, results=[r for r in report.results if r.op == op])
        path = folder / f"{op}{suffix}.json"
        _replace(path, to_json(part))
        _replace(path.with_suffix(".csv"), _table(part))
        written += [path, path.with_suffix(".csv")]
    return written


def _replace(path: Path, text: str) -> None:
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text, encoding="utf-8", newline="")
    os.replace(temporary, path)


def _table(report: Report) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["case", "implementation", "median_seconds", "spread", "samples", "ratio_to_ours"])
    for r in report.results:
        if r.time is None:
            continue
        writer.writerow([r.case, "ours", f"{r.time.median:.4g}", f"{r.time.spread:.3f}", len(r.time.values), 1])
        for name, p in r.peers.items():
            row = [
                f"{p.time.median:.4g}",
                f"{p.time.spread:.3f}",
                len(p.time.values),
                f"{p.ratio.median:.4g}",
            ]
            writer.writerow([r.case, name, *row])
    return out.getvalue()


def load(reference: str, folder: Path, report: Report) -> list[Report]:
    """Earlier reports of the same ops: a file, a folder, or a git revision of this device's folder.

    Raises:
        ValueError: no such file or revision, or no result of the same ops in it.
    """
    path = Path(reference)
    suffix = "-quick" if report.quick else ""
    names = [f"{op}{suffix}.json" for op in dict.fromkeys(r.op for r in report.results)]
    if path.is_dir() or path.is_file():
        files = [path] if path.is_file() else [path / name for name in names if (path / name).exists()]
        found = [from_json(f.read_text(encoding="utf-8"), str(f)) for f in files]
    else:
        found = [r for name in names if (r := _from_git(reference, folder / name))]
    if not found:
        raise ValueError(
            f"{reference!r} is no result file, and no git revision that holds {', '.join(names)} in {folder}"
        )
    return found


def _from_git(revision: str, path: Path) -> Report | None:
    relative = path.resolve().relative_to(ROOT) if path.resolve().is_relative_to(ROOT) else path
    command = ["git", "-C", str(ROOT), "show", f"{revision}:{relative.as_posix()}"]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    return from_json(shown.stdout, f"{revision}:{relative}") if shown.returncode == 0 else None
