"""The files of a saved model: what they say of each tensor, writing them as one step, reading only what is whole.

The JSON names the SHA-256 of the weights that it belongs to, so replacing it is the moment at which a save takes
effect. The new weights wait for it under a name of their own and take their place after it; whoever reads in between
finds them where they wait. Killed at any point, a folder holds what it held before or what was to be saved.

Files of others are left as they are: the JSON has a name that no other tool gives, and where a `model.safetensors` lies
that was not written here, the weights get a name of their own, which the JSON says.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from spartan.saving.encodings import ENCODINGS, Packed, expected_parts
from spartan.saving.files import require_regular, temporary_beside, to_disk

__all__ = [
    "CONFIG_FILE",
    "DTYPES",
    "MODEL_FILE",
    "Entry",
    "dtype_name",
    "read_config",
    "read_parts",
    "saved_weights",
    "write_files",
]

MODEL_FILE = "model.safetensors"
CONFIG_FILE = "spartan.json"
_EARLIER_CONFIG = "config.json"  # what folders of older versions have
_OWN_MODEL = "spartan.safetensors"  # beside a MODEL_FILE of others
_FORMAT = "spartan-pretrained"
_VERSION = 2
_STALE = 3600.0  # seconds after which a file that a killed save left behind is removed
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """What the JSON says of a tensor.

    Attributes:
        encoding: one of `packing.ENCODINGS`, or "tied".
        shape: of the dense tensor. dtype: its name. parameter: whether it is one, not a buffer.
        block_size: (rows, columns) for "blocks", "float8" and for what is packed, else None.
        packed: the module that it is the weight of ran on blocks of this size.
        tied_to: for "tied", the name of the tensor that it shares its memory with, else None.
    """

    encoding: str
    shape: tuple[int, ...]
    dtype: str
    parameter: bool
    block_size: tuple[int, int] | None = None
    packed: bool = False
    tied_to: str | None = None

    @staticmethod
    def read(found: Any) -> Entry:
        """The entry that JSON holds.

        Raises:
            ValueError: anything but that.
        """
        valid = isinstance(found, dict) and set(found) == set(Entry.__dataclass_fields__)
        if not (valid and _valid(found)):
            raise ValueError(f"is not valid: {found!r}")
        block = found["block_size"]
        sizes = {"shape": tuple(found["shape"]), "block_size": None if block is None else (block[0], block[1])}
        return Entry(**{**found, **sizes})

    def parts(self, name: str) -> dict[str, str]:
        """The names in the weights file of the encoding's parts; a dense tensor has its own."""
        if self.tied_to is not None:
            return {}
        return {part: _part_name(name, self.encoding, part) for part in expected_parts(self.encoding)}


def _valid(found: dict[str, Any]) -> bool:
    blocks, tied = found["encoding"] == "blocks", found["encoding"] == "tied"
    if not isinstance(found["shape"], list):
        return False
    size = found["block_size"]
    dims = len(found["shape"])
    sized = (blocks and dims >= 2) or (not tied and found["packed"] is True and dims in (2, 4))
    return (
        (tied or found["encoding"] in ENCODINGS)
        and found["dtype"] in DTYPES
        and isinstance(found["parameter"], bool)
        and isinstance(found["packed"], bool)
        and _whole_numbers(found["shape"], 0)
        and math.prod(found["shape"]) < 2**62
        and isinstance(found["tied_to"], str if tied else type(None))
        and (sized or not (blocks or found["packed"]))
        and (found["encoding"] != "float8" or (found["packed"] and dims == 2))
        and (_whole_numbers(size, 1) and len(size) == 2 if sized else size is None)
    )


def _whole_numbers(values: Any, least: int) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= least for value in values)


def _part_name(name: str, encoding: str, part: str) -> str:
    return name if encoding == "dense" else f"{name}:{part}"


def dtype_name(dtype: torch.dtype) -> str:
    """As "float32"."""
    return str(dtype).removeprefix("torch.")


def write_files(folder: Path, tensors: Mapping[str, tuple[Entry, Packed | None]]) -> None:
    """Save the parts of tensors and what is said of them; a tied one has no parts.

    Raises:
        ValueError: two tensors whose parts have the same name. OSError: the files cannot be written.
    """
    parts: dict[str, torch.Tensor] = {}
    for name, (entry, packed) in tensors.items():
        for part, key in entry.parts(name).items():
            if packed is None or key in parts:
                raise ValueError(f"tensor {name!r} cannot be saved: its part {key!r} has the name of another tensor")
            parts[key] = packed.parts[part]
    entries = {name: asdict(entry) for name, (entry, _) in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    _settle(folder)
    place = folder / (MODEL_FILE if _may_write_model(folder) else _OWN_MODEL)
    with temporary_beside(folder / MODEL_FILE) as weights, temporary_beside(folder / CONFIG_FILE) as config:
        save_file(parts, weights, metadata={"format": "pt", "tensors": _digest(entries)})
        _sort_metadata(weights)
        sha256 = _sha256(weights)
        document = {"format": _FORMAT, "version": _VERSION, "sha256": sha256, "tensors": entries}
        if place.name != MODEL_FILE:
            document["weights"] = place.name
        config.write_text(json.dumps(document, indent=1) + "\n")
        for file in (weights, config):
            to_disk(file)
        waiting = _waiting(folder / CONFIG_FILE, sha256)
        os.replace(weights, waiting)
        try:
            os.replace(config, folder / CONFIG_FILE)
        except BaseException:
            waiting.unlink(missing_ok=True)
            raise
        os.replace(waiting, place)
    if _is_ours(folder / _EARLIER_CONFIG):  # of the model that lay here before
        (folder / _EARLIER_CONFIG).unlink()


def _may_write_model(folder: Path) -> bool:
    """Whether there is no MODEL_FILE of others in a folder, whole or, where our own JSON names it, damaged."""
    path = folder / MODEL_FILE
    if not os.path.lexists(path):
        return True
    if not path.is_file():
        return False
    try:
        return _described(path) is not None
    except ValueError:
        config = _config_of(folder)
        return _is_ours(config) and json.loads(config.read_text()).get("weights") is None


def _config_of(folder: Path) -> Path:
    """The JSON of a folder: an older one where there is none of this version."""
    old = folder / _EARLIER_CONFIG
    return old if not os.path.lexists(folder / CONFIG_FILE) and _is_ours(old) else folder / CONFIG_FILE


def _is_ours(config: Path) -> bool:
    """Whether a JSON is of a saved model, of any version, and not another tool's."""
    with suppress(OSError, ValueError, RecursionError):
        document = json.loads(config.read_text()) if config.is_file() else None
        return isinstance(document, dict) and document.get("format") == _FORMAT
    return False


def saved_weights(path: Path) -> Path | None:
    """Where the weights of the model saved in a folder are, given it or one of its two files; None for other places."""
    folder = path if path.is_dir() else path.parent
    config = _config_of(folder)
    if not (config.is_file() if config.name == CONFIG_FILE else _is_ours(config)):
        return None
    weights = folder / MODEL_FILE
    with suppress(OSError, ValueError, RecursionError, TypeError, AttributeError):
        weights = folder / json.loads(config.read_text()).get("weights", MODEL_FILE)
    return weights if path in (folder, config, weights) else None


def _sort_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file in order, which is left to chance: equal models have equal files."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= length:  # as long as it was, but for a foreign way of escaping
            file.seek(8)
            file.write(text.ljust(length))


def read_config(folder: Path) -> tuple[dict[str, Entry], Path]:
    """What is said of each tensor, and the file with its weights, whose bytes are those that were saved.

    Raises:
        ValueError: files that are missing, damaged, of another format or that do not belong together, by name.
    """
    path = _config_of(folder)
    require_regular(path)
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict) or config.get("format") != _FORMAT:
        raise ValueError(f"{path} is not a {_FORMAT} file")
    if type(config.get("version")) is not int or config["version"] != _VERSION:
        raise ValueError(f"{path} has version {config.get('version')!r}; this package reads version {_VERSION}")
    if set(config) - {"weights"} != {"format", "version", "sha256", "tensors"} or not isinstance(
        config["tensors"], dict
    ):
        raise ValueError(f"{path} has unknown or missing entries: {sorted(config)}")
    if config.get("weights", _OWN_MODEL) != _OWN_MODEL:
        raise ValueError(f"{path} names weights {config['weights']!r}; they are {MODEL_FILE} or {_OWN_MODEL}")
    entries = {}
    for name, found in config["tensors"].items():
        try:
            entries[name] = Entry.read(found)
        except ValueError as error:
            raise ValueError(f"{path}: the entry of {name!r} {error}") from None
    for name, entry in entries.items():
        other = None if entry.tied_to is None else entries.get(entry.tied_to)
        if entry.tied_to is not None and (other is None or (other.shape, other.dtype) != (entry.shape, entry.dtype)):
            raise ValueError(f"{path}: the entry of {name!r} is not valid: it is tied to {entry.tied_to!r}")
        if other is not None and other.tied_to is not None:
            raise ValueError(f"{path}: the entry of {name!r} is not valid: {entry.tied_to!r} is tied itself")
    weights = _weights(path, config.get("weights", MODEL_FILE), config["sha256"])
    if _described(weights) != _digest(config["tensors"]):
        raise ValueError(f"{path} is not what was saved with {weights}: its tensors differ")
    return entries, weights


def read_parts(entries: Mapping[str, Entry], weights: Path) -> dict[str, Packed]:
    """The parts of each tensor that is not tied.

    Raises:
        ValueError: a file with other parts than the entries say, by name.
    """
    wanted = {key for name, entry in entries.items() for key in entry.parts(name).values()}
    with _opened(weights) as file:
        found = set(file.keys())
        if found != wanted:
            raise ValueError(f"{weights} does not hold what is said of it: {sorted(found ^ wanted)}")
        return {
            name: Packed(
                entry.encoding, {p: file.get_tensor(k) for p, k in entry.parts(name).items()}, entry.block_size
            )
            for name, entry in entries.items()
            if entry.tied_to is None
        }


def _weights(config: Path, name: str, sha256: Any) -> Path:
    """The weights whose digest this is: where they wait, if their save was interrupted, or in their place."""
    path = config.parent / name
    for file in (_waiting(config, sha256), path):
        if file.is_file() and _sha256(file) == sha256:
            return file
    if not path.is_file():
        raise ValueError(f"{path} is {'not a regular file' if path.exists() else 'missing'}")
    raise ValueError(f"{path} is damaged or does not belong to {config}: its SHA-256 differs")


def _described(weights: Path) -> str | None:
    with _opened(weights) as file:
        return (file.metadata() or {}).get("tensors")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _digest(tensors: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tensors, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    require_regular(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _waiting(config: Path, sha256: Any) -> Path:
    """Where weights wait for the JSON that names them; a name that the JSON gives must not lead elsewhere."""
    if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ValueError(f"{config} has no SHA-256: {sha256!r}")
    return config.parent / f".{MODEL_FILE}.{sha256}"


def _settle(folder: Path) -> None:
    """Finish a save that was interrupted after it took effect, and remove what older ones left behind."""
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        config = _config_of(folder)
        require_regular(config)
        document = json.loads(config.read_text())
        if document.get("weights", _OWN_MODEL) == _OWN_MODEL:
            os.replace(_waiting(config, document["sha256"]), folder / document.get("weights", MODEL_FILE))
    for file in (*folder.glob(f".{MODEL_FILE}.*"), *folder.glob(f".{CONFIG_FILE}.*")):
        with suppress(FileNotFoundError):
            if time.time() - file.stat().st_mtime > _STALE:
                file.unlink()
