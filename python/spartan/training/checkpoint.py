"""A checkpoint in one file that is either whole or refused."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import torch

from spartan.saving.files import replacing

__all__ = ["load_checkpoint", "save_checkpoint"]

_MAGIC = b"spartan checkpoint 1\n"
_DIGEST_BYTES = 32


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write tensors and plain types with a SHA-256 in front; what was there stays until this is whole."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    payload = buffer.getbuffer()
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(_MAGIC + hashlib.sha256(payload).digest())
        file.write(payload)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is not a checkpoint or is damaged; the message names it.
    """
    content = path.read_bytes()
    if not content.startswith(_MAGIC):
        raise ValueError(f"{path}: is not a checkpoint of this version")
    digest, payload = content[len(_MAGIC) :][:_DIGEST_BYTES], content[len(_MAGIC) + _DIGEST_BYTES :]
    if hashlib.sha256(payload).digest() != digest:
        raise ValueError(f"{path}: is damaged (its checksum does not match); remove it and start again")
    state: dict[str, Any] = torch.load(io.BytesIO(payload), weights_only=True)
    return state
