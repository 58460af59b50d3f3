"""Text as bytes: the files of a folder, some held out."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["TextData", "load_text", "standard_library"]

HOLD_OUT_EVERY = 20
_NOT_SOURCE = {"site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class TextData:
    """Bytes to train on and bytes held out, each uint8 `[n]`."""

    source: str
    train: Tensor
    held_out: Tensor


def standard_library() -> Path:
    """Where the running Python has the source of its standard library."""
    return Path(sysconfig.get_path("stdlib"))


def load_text(
    folder: Path | None = None, pattern: str = "*.py", limit: int | None = None, held_out_limit: int | None = None
) -> TextData:
    """Read the files of a folder and those under it in the order of their names; every twentieth file is held out.

    Args:
        folder: None: the standard library of the running Python, without packages installed into it.
        pattern: names of the files.
        limit: only so many bytes to train on.
        held_out_limit: only so many bytes held out.

    Raises:
        ValueError: there is no such folder, or it has fewer than two such files.
    """
    root = standard_library() if folder is None else folder
    if not root.is_dir():
        raise ValueError(f"{root}: is not a folder")
    files = list(_files(root, pattern))
    # The first of each twenty is trained on, so that two files are enough for both parts.
    held_out = [file for index, file in enumerate(files) if index % HOLD_OUT_EVERY == 1]
    train = [file for index, file in enumerate(files) if index % HOLD_OUT_EVERY != 1]
    if not held_out:
        raise ValueError(f"{root}: has {len(files)} files named {pattern}; two are needed, one to evaluate on")
    return TextData(str(root), _read(train, limit), _read(held_out, held_out_limit))


def _files(root: Path, pattern: str) -> Iterator[Path]:
    for path in sorted(root.rglob(pattern)):
        if path.is_file() and not _NOT_SOURCE & set(path.relative_to(root).parts):
            yield path


def _read(files: list[Path], limit: int | None) -> Tensor:
    content = bytearray()
    for file in files:
        content += file.read_bytes()
        if limit is not None and len(content) >= limit:
            del content[limit:]
            break
    return torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8, device="cpu")
