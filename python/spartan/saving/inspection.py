"""What a saved model holds: zeros, blocks and sizes, tensor by tensor."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from spartan.saving.encodings import pack
from spartan.saving.export import MODEL_FILE, SavedTensor, describe_pretrained
from spartan.saving.files import require_regular
from spartan.saving.folder import dtype_name, saved_weights
from spartan.saving.tables import text_table

__all__ = ["Inspection", "inspect_file"]


@dataclass(frozen=True, repr=False)
class Inspection:
    """A saved model; `print` shows it as a table.

    Attributes:
        path: the file with the tensors. tensors: what is in it. file_bytes: its size.
    """

    path: Path
    tensors: Sequence[SavedTensor]
    file_bytes: int

    @property
    def dense_bytes(self) -> int:
        """What the tensors take in memory, tied ones once."""
        own = [tensor for tensor in self.tensors if tensor.tied_to is None]
        return sum(math.prod(tensor.shape) * getattr(torch, tensor.dtype).itemsize for tensor in own)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros among the parameters, tied ones counted once."""
        parameters = [tensor for tensor in self.tensors if tensor.parameter and tensor.tied_to is None]
        total = sum(math.prod(tensor.shape) for tensor in parameters)
        return sum(tensor.zeros for tensor in parameters) / total if total else 0.0

    def __str__(self) -> str:
        rows = []
        for tensor in self.tensors:
            count = math.prod(tensor.shape)
            stored = f"= {tensor.tied_to}" if tensor.tied_to is not None else f"{tensor.stored_bytes:,}"
            rows.append(
                (
                    tensor.name,
                    "x".join(map(str, tensor.shape)) or "scalar",
                    tensor.dtype,
                    f"{tensor.zeros / count:.2%}" if count else "",
                    "" if tensor.block_size is None else "x".join(map(str, tensor.block_size)),
                    tensor.encoding,
                    stored,
                )
            )
        headings = ("tensor", "shape", "dtype", "zeros", "blocks", "stored as", "bytes")
        note = f"{self.sparsity:.2%} zeros among the parameters; {self.file_bytes:,} bytes, {self.dense_bytes:,} dense"
        return text_table(str(self.path), headings, rows, [note])

    __repr__ = __str__


def inspect_file(path: str | os.PathLike[str]) -> Inspection:
    """Read what `save_pretrained` saved, given its folder or one of its files, or any other safetensors file.

    Of tensors that are stored dense, blocks are the squares that would store them smallest, where blocks would.

    Raises:
        ValueError: files that are missing, damaged, truncated or of an unknown format, by name; a tensor whose zeros
            PyTorch cannot count, by its name.
    """
    place = Path(path)
    weights = saved_weights(place)
    if weights is not None and weights.exists():
        tensors = describe_pretrained(place)
        if any(tensor.encoding != "dense" for tensor in tensors):
            return Inspection(weights, tensors, weights.stat().st_size)
        parameters = {tensor.name for tensor in tensors if tensor.parameter}
        return Inspection(weights, _plain(weights, parameters), weights.stat().st_size)
    weights = place / MODEL_FILE if place.is_dir() else place
    return Inspection(weights, _plain(weights, None), weights.stat().st_size)


def _plain(path: Path, parameters: set[str] | None) -> list[SavedTensor]:
    """The tensors of a safetensors file as they lie there; all are parameters where nothing says which are."""
    tensors = []
    require_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                tensor = file.get_tensor(name)
                try:
                    # In eight bits nothing is added and zeros are not told from the smallest numbers.
                    wide = tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor
                    zeros = int((wide == 0).sum())
                except NotImplementedError as error:
                    raise ValueError(f"{path}: zeros of tensor {name!r} of {tensor.dtype} cannot be counted") from error
                packs = zeros and tensor.is_floating_point()
                blocks = (
                    pack((wide + 0).to(tensor.dtype)).block_size if packs else None
                )  # negative zeros are zeros, too
                is_parameter = parameters is None or name in parameters
                sizes = "dense", blocks, False, None, zeros, tensor.nbytes
                tensors.append(SavedTensor(name, tuple(tensor.shape), dtype_name(tensor.dtype), is_parameter, *sizes))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return tensors
