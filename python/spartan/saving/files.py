"""Files that are either the old ones or the new ones, whatever happens while they are written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replacing", "require_regular", "temporary_beside", "to_disk"]


def require_regular(path: Path) -> None:
    """Refuse what is there under the name of a file and is none: opening a named pipe would wait for ever.

    Raises:
        ValueError: not a regular file.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a regular file")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block succeeds and is removed when it fails.

    Its bytes are on the disk before it gets the name, so neither a killed process nor a power failure leaves half
    a file under `path`.
    """
    with temporary_beside(path) as temporary:
        yield temporary
        to_disk(temporary)
        os.replace(temporary, path)
        to_disk(path.parent)


@contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """A name beside `path` that no other process uses; the file is removed in the end if it is still there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def to_disk(path: Path) -> None:
    """Write back what the system holds of a file, or of a folder's names, that a power failure would lose."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
