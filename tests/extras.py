"""Print what an optional extra of the package needs: `python -m tests.extras integrations`."""

from __future__ import annotations

import re
import sys
from pathlib import Path


def needs(extra: str) -> list[str]:
    """The requirements of an extra, as `pyproject.toml` has them; read as text, as Python 3.10 has no TOML."""
    text = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    line = re.search(rf"^{re.escape(extra)} = \[(.*)\]$", text, re.M)
    if line is None:
        raise SystemExit(f"pyproject.toml has no extra {extra!r} in one line")
    return re.findall(r'"([^"]+)"', line[1])


if __name__ == "__main__":
    print(*needs(sys.argv[1]))
