"""Saved models whose size shrinks with their sparsity: one safetensors file and one JSON beside it."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from spartan.packing import ENCODINGS, Packed, expected_parts, pack, unpack

__all__ = ["CONFIG_FILE", "MODEL_FILE", "load_pretrained", "save_pretrained", "sparsity_of"]

MODEL_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
_FORMAT = "spartan-pretrained"
_VERSION = 1
_ENTRY = {"encoding", "shape", "dtype", "parameter"}
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip


def save_pretrained(
    model: nn.Module, directory: str | os.PathLike[str], block_size: int | tuple[int, int] | None = None
) -> None:
    """Save a finalized model's parameters and buffers, each tensor in the smallest of its encodings.

    Encodings: "dense"; "bitmap" (one bit per weight and the nonzero values); "index" (flat int32 or int64
    positions and values); "blocks" (one bit per block and the blocks that are not zero). Both files are
    written under temporary names in the same folder and renamed.

    Args:
        model: plain modules, after `Sparsifier.finalize()`.
        directory: made if it is missing; gets `model.safetensors` and `config.json`.
        block_size: an int or (rows, columns) to try for "blocks"; None tries squares of 4 to 128.

    Raises:
        ValueError: a model that is still masked, or a tensor of a dtype that cannot be saved, by name.
    """
    for name, module in model.named_modules():
        if hasattr(module, "mask_hard"):
            raise ValueError(f"model is still masked at {name!r}: call Sparsifier.finalize() first")
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    parts: dict[str, torch.Tensor] = {}
    tensors: dict[str, dict[str, Any]] = {}
    for name, tensor in model.state_dict().items():
        if _dtype_name(tensor) not in _DTYPES:
            raise ValueError(f"tensor {name!r} has dtype {tensor.dtype}; only {', '.join(_DTYPES)} can be saved")
        packed = pack(tensor.detach().cpu(), block_size)
        parts.update({_part_name(name, part): value for part, value in packed.parts.items()})
        tensors[name] = {
            "encoding": packed.encoding,
            "shape": list(tensor.shape),
            "dtype": _dtype_name(tensor),
            "parameter": name in parameters,
            **({"block_size": list(packed.block_size)} if packed.block_size else {}),
        }
    with _replacing(folder / MODEL_FILE) as weights, _replacing(folder / CONFIG_FILE) as config:
        save_file(parts, weights, metadata={"tensors": _description_digest(tensors)})
        document = {"format": _FORMAT, "version": _VERSION, "sha256": _sha256(weights), "tensors": tensors}
        config.write_text(json.dumps(document, indent=1) + "\n")


def load_pretrained(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Load what `save_pretrained` saved into a model of the same architecture, bit for bit.

    Everything is read and checked before the model is touched.

    Raises:
        ValueError: a file that is missing, damaged, truncated or of an unknown format, or of another model;
            the message names the file.
    """
    tensors, _ = _read(Path(directory))
    path = Path(directory) / MODEL_FILE
    own = model.state_dict()
    if set(own) != set(tensors):
        missing, unknown = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
        raise ValueError(f"{path} is of another model: it lacks {missing} and has {unknown}")
    for name, tensor in tensors.items():
        if (tensor.shape, tensor.dtype) != (own[name].shape, own[name].dtype):
            raise ValueError(
                f"{path} is of another model: {name!r} is {tensor.dtype} of shape {tuple(tensor.shape)}, the model's is"
                f" {own[name].dtype} of shape {tuple(own[name].shape)}"
            )
    model.load_state_dict(tensors)


def sparsity_of(directory: str | os.PathLike[str]) -> float:
    """Fraction of zeros among all parameters (not buffers) of a saved model, counted in the file.

    Raises:
        ValueError: as `load_pretrained`.
    """
    tensors, parameters = _read(Path(directory))
    total = sum(tensors[name].numel() for name in parameters)
    zeros = sum(int((tensors[name] == 0).sum()) for name in parameters)
    return zeros / total if total else 0.0


def _read(folder: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """All tensors of a saved model, and the names of those that are parameters."""
    entries = _read_config(folder)
    path = folder / MODEL_FILE
    parts: dict[str, torch.Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            described = (file.metadata() or {}).get("tensors")
            parts = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if described != _description_digest(entries):
        raise ValueError(f"{folder / CONFIG_FILE} is not what was saved with {path}: its tensors differ")
    wanted = {_part_name(name, part) for name, entry in entries.items() for part in expected_parts(entry["encoding"])}
    if set(parts) != wanted:
        raise ValueError(f"{path} does not hold what {CONFIG_FILE} says: {sorted(set(parts) ^ wanted)}")
    tensors = {}
    for name, entry in entries.items():
        own = {part: parts[_part_name(name, part)] for part in expected_parts(entry["encoding"])}
        block = tuple(entry["block_size"]) if "block_size" in entry else None
        try:
            tensors[name] = unpack(
                Packed(entry["encoding"], own, block), torch.Size(entry["shape"]), _DTYPES[entry["dtype"]]
            )
        except ValueError as error:
            raise ValueError(f"{path}: {name!r}: {error}") from error
    return tensors, [name for name, entry in entries.items() if entry["parameter"]]


def _read_config(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict) or config.get("format") != _FORMAT:
        raise ValueError(f"{path} is not a {_FORMAT} file")
    if config.get("version") != _VERSION:
        raise ValueError(f"{path} has version {config.get('version')!r}; this package reads version {_VERSION}")
    if set(config) != {"format", "version", "sha256", "tensors"} or not isinstance(config["tensors"], dict):
        raise ValueError(f"{path} has unknown or missing entries: {sorted(config)}")
    for name, entry in config["tensors"].items():
        if not _valid(entry):
            raise ValueError(f"{path}: the entry of {name!r} is not valid: {entry!r}")
    weights = folder / MODEL_FILE
    if not weights.is_file():
        raise ValueError(f"{weights} is missing")
    if _sha256(weights) != config["sha256"]:
        raise ValueError(f"{weights} is damaged or does not belong to {path}: its SHA-256 differs")
    return dict(config["tensors"])


def _valid(entry: Any) -> bool:
    if not isinstance(entry, dict):
        return False
    blocks = entry.get("encoding") == "blocks"
    return (
        set(entry) == (_ENTRY | {"block_size"} if blocks else _ENTRY)
        and entry["encoding"] in ENCODINGS
        and entry["dtype"] in _DTYPES
        and isinstance(entry["parameter"], bool)
        and _whole_numbers(entry["shape"], 0)
        and (not blocks or (len(entry["shape"]) >= 2 and len(entry["block_size"]) == 2))
        and (not blocks or _whole_numbers(entry["block_size"], 1))
        and math.prod(entry["shape"]) < 2**62
    )


def _whole_numbers(values: Any, least: int) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= least for value in values)


def _part_name(name: str, part: str) -> str:
    return f"{name}:{part}"


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _description_digest(tensors: dict[str, dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(tensors, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block succeeds and is removed when it fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
