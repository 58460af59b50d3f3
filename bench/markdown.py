"""Tables as Markdown, and the sentence that says where results come from."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from bench.run import Report

_NO_BREAK = re.compile(r"(?<=\d) (?=ms\b)|(?<=%) (?=zeros|FLOPs)| (?=±)|(?<=±) ")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts, in which a number and its unit stay on one line."""
    lines = [
        header,
        ["---"] * len(header),
        *[[_NO_BREAK.sub("\N{NO-BREAK SPACE}", text) for text in row] for row in rows],
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def named(machine: Mapping[str, Any]) -> str:
    """A machine by its device, of a CPU also its family and model, and the instruction set of the kernels."""
    model = f" ({machine['model']})" if machine.get("model") else ""
    kernels = machine.get("native", {}).get("instruction_set")
    return f"{machine['device']}{model}" + (f", kernels for {kernels.upper()}" if kernels else "")


def provenance(reports: Sequence[Report]) -> str:
    """Machine, instruction set, threads, dtype, PyTorch and date of results that one machine made."""
    machine = reports[0].machine
    days = sorted({r.machine["date"][:10] for r in reports})
    noise = " In some runs the machine was not quiet." if any(r.noise for r in reports) else ""
    return (
        f"{named(machine)}, {machine['threads']} threads, {reports[0].dtype},"
        f" PyTorch {machine['torch']}, {' to '.join(dict.fromkeys((days[0], days[-1])))}.{noise}\n"
    )
