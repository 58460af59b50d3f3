"""Pages of documentation as tests read them: their blocks of code, what those print, their links and sentences."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted(p for p in (ROOT / "docs").rglob("*.md") if "_build" not in p.parts)]
# Shell commands are shown, not run; directives of Sphinx are run by `make docs`.
SHOWN = ("sh", "{toctree}", "{include}", "{eval-rst}")
_FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_SCRIPT = re.compile(r"\A# (\w+\.py)(?:, run by: (torchrun .*))?\n")


@dataclass(frozen=True)
class Block:
    """Python code of a page; `printed` is the block of text right below it, where `...` stands for anything."""

    code: str
    printed: str | None
    line: int

    @property
    def script(self) -> re.Match[str] | None:
        """The first line of a block that is a program of its own: `# NAME.py`, or `# NAME.py, run by: torchrun ...`."""
        return _SCRIPT.match(self.code)


def blocks(text: str) -> list[Block]:
    """The Python code of a page, in order.

    Raises:
        ValueError: a fence of a language that nobody runs, or text that no code above it prints.
    """
    found: list[Block] = []
    fences = list(_FENCE.finditer(text))
    for i, fence in enumerate(fences):
        language, line = fence[1], text[: fence.start()].count("\n") + 1
        if language == "python":
            below = fences[i + 1] if i + 1 < len(fences) and fences[i + 1][1] == "text" else None
            near = below is not None and not text[fence.end() : below.start()].strip()
            found.append(Block(fence[2], below[2] if below is not None and near else None, line))
        elif language == "text" and not (found and found[-1].printed == fence[2]):
            raise ValueError(f"line {line}: a block of text must stand right below the Python code that prints it")
        elif language != "text" and language.partition(" ")[0] not in SHOWN:
            known = ", ".join(("python", "text", *SHOWN))
            raise ValueError(f"line {line}: a block must be one of {known}; got {language!r}")
    return found


def matches(printed: str, wanted: str) -> bool:
    """Whether a program printed this text, in which `...` stands for anything."""
    pattern = ".*".join(re.escape(part) for part in wanted.split("..."))
    return re.fullmatch(pattern, printed, re.DOTALL) is not None


# A thread of gloo may release a tensor while the interpreter ends, with or without this package: 1 of 18 on busy cores.
_LATE_THREAD = "terminate called without an active exception"
_RESTARTS = 3


def run_script(block: Block, folder: Path) -> str:
    """Run a program as its first line says, in `folder`; what it prints."""
    assert block.script is not None
    name, launcher = block.script.groups()
    (folder / name).write_text(block.code, encoding="utf-8")
    command = [sys.executable, name]
    if launcher:
        options = [f"--{option}" for option in re.findall(r"--(\S+ \S+)", launcher)]
        words = [word for option in options for word in option.split()]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words, name]
    path = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def started() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)

    run = started()
    for _ in range(_RESTARTS):
        if not (launcher and run.returncode and _LATE_THREAD in run.stderr):
            break
        run = started()
    assert run.returncode == 0, run.stderr
    return run.stdout


def links(text: str) -> list[str]:
    """Targets of links and images to files of the repository, with their sections."""
    return re.findall(r"\]\((?!https?:)([^)]+)\)", _FENCE.sub("", text))


def sections(text: str) -> set[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", _FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def sentences(text: str) -> list[str]:
    """The prose of a page: no code, tables, equations, headings or generated results."""
    text = re.sub(r"<!-- results:.*?<!-- /results -->", "", _FENCE.sub("", text), flags=re.DOTALL)
    text = re.sub(r"\$\$.*?\$\$", "", text, flags=re.DOTALL)
    lines = [line for line in text.splitlines() if not line.lstrip().startswith(("|", "#", "![", "<!--", "("))]
    paragraphs = re.split(r"\n\s*\n|\n(?=\s*[-\d]+\.? )", "\n".join(lines))
    found = [s for p in paragraphs for s in re.split(r"(?<=[.!?:])\s+", p.strip()) if len(s.split()) > 2]
    return found
