"""The compiled extension: tensors to pointers, shapes and strides. The only file that calls `_native`."""

from __future__ import annotations

from typing import Any


def unavailable() -> str | None:
    """Why the extension cannot be used, or None."""
    return "not built"


def build_info() -> dict[str, Any]:
    """How the extension was built."""
    return {"available": False, "reason": unavailable()}
