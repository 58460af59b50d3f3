"""Tables as Markdown, and the sentence that says where results come from."""

from __future__ import annotations

import re
from collections.abc import Sequence

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


def provenance(reports: Sequence[Report]) -> str:
    """Machine, instruction set, threads, dtype, PyTorch and date of results that one machine made."""
    machine = reports[0].machine
    kernels = machine["native"].get("instruction_set")
    with_kernels = f"kernels for {kernels.upper()}, " if kernels else ""
    days = sorted({r.machine["date"][:10] for r in reports})
    noise = " In some runs the machine was not quiet." if any(r.noise for r in reports) else ""
    return (
        f"{machine['device']}, {with_kernels}{machine['threads']} threads, {reports[0].dtype},"
        f" PyTorch {machine['torch']}, {' to '.join(dict.fromkeys((days[0], days[-1])))}.{noise}\n"
    )
