"""One line of JSON for everything found, appended as it is found: what a killed run leaves is complete up to then."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

FILE = "SPARTAN_GPU_RECORDS"
UNTIL = "SPARTAN_GPU_UNTIL"
REHEARSE = "SPARTAN_REHEARSE"
Record = dict[str, Any]


def add(step: str, **found: Any) -> Record:
    """Append a record in one write, so that processes beside one another do not tear lines apart."""
    record = {"step": step, "at": round(time.time(), 2), **found}
    path = os.environ.get(FILE)
    if path:
        descriptor = os.open(path, os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o644)
        try:
            os.write(descriptor, (json.dumps(record) + "\n").encode())
        finally:
            os.close(descriptor)
    return record


def read(path: str | Path | None = None) -> list[Record]:
    """All records of the file (default: of this run); a line that a kill cut short is left out."""
    path = Path(path or os.environ.get(FILE, ""))
    found = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def seconds_left() -> float:
    """Until the step that this process belongs to is ended."""
    return float(os.environ.get(UNTIL, time.time() + 3600)) - time.time()


def rehearsing() -> bool:
    """Whether the CPU stands in for a GPU."""
    return os.environ.get(REHEARSE) == "1"


def device_name() -> str:
    """Where tensors go: "cuda", in a rehearsal "cpu"."""
    return "cpu" if rehearsing() else "cuda"
