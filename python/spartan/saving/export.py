"""Saved models whose size shrinks with their sparsity: one safetensors file and one JSON beside it."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from spartan.nn import BlockSparseLinear, PackedLayer
from spartan.nn.kinds import is_transformers_linear
from spartan.nn.wrappers import unwrapped
from spartan.saving.encodings import Packed, pack, pack_blocks, unpack, unpack_blocks
from spartan.saving.folder import (
    CONFIG_FILE,
    DTYPES,
    MODEL_FILE,
    Entry,
    dtype_name,
    read_config,
    read_parts,
    saved_weights,
    write_files,
)
from spartan.saving.packing import PackedWeight, can_be_packed, packed_layer, packed_weight, replace_modules
from spartan_kernels import BlockSparseFilter, BlockSparseWeight

__all__ = [
    "CONFIG_FILE",
    "MODEL_FILE",
    "SavedTensor",
    "describe_pretrained",
    "load_pretrained",
    "save_pretrained",
    "sparsity_of",
]

_Value: TypeAlias = "torch.Tensor | PackedWeight"


@dataclass(frozen=True)
class SavedTensor:
    """A tensor of a saved model.

    Attributes:
        name: in the model's `state_dict`, with the weight of a packed layer as its "weight".
        shape, dtype: of the dense tensor; the dtype as "float32".
        parameter: whether it is a parameter, not a buffer.
        encoding: "dense", "bitmap", "index", "blocks", "float8" or "tied".
        block_size: (rows, columns) for "blocks", "float8" and for packed layers, else None.
        packed: whether its layer runs on packed blocks.
        tied_to: for "tied", the name of the tensor that it shares its memory with, else None.
        zeros: how many of its entries are zero. stored_bytes: what it takes in the file; 0 for "tied".
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    parameter: bool
    encoding: str
    block_size: tuple[int, int] | None
    packed: bool
    tied_to: str | None
    zeros: int
    stored_bytes: int


def save_pretrained(
    model: nn.Module,
    directory: str | os.PathLike[str],
    block_size: int | tuple[int, int] | None = None,
    *,
    dense: bool = False,
) -> None:
    """Save a finalized model's parameters and buffers, each tensor in the smallest of its encodings.

    Encodings: "dense"; "bitmap" (one bit per weight and the nonzero values); "index" (flat int32 or int64
    positions and values); "blocks" (one bit per block and the blocks that are not zero). Layers on packed blocks
    (`to_block_sparse`) are saved under the name of their weight, and run on blocks when they are loaded; those in 8
    bits as "float8" (one bit per block, the blocks, and a scale for each output). Tied tensors are saved once.

    The save takes effect in one step: killed at any moment, the folder holds the model that it held before or this
    one. One process at a time may save into a folder. Files of others there, such as Hugging Face's `config.json` and
    `model.safetensors`, stay as they are.

    Args:
        model: plain modules, after `Sparsifier.finalize()`, or packed ones; saved under the names that it has without
            what wraps it (`torch.compile`, data parallelism).
        directory: made if it is missing; gets `spartan.json` and `model.safetensors`, or `spartan.safetensors` where
            another tool's `model.safetensors` lies.
        block_size: an int or (rows, columns) to try for "blocks"; None tries squares of 4 to 128.
        dense: for tools that know nothing of this package: every tensor dense and under its own name, tied ones
            repeated, so that `safetensors.torch.load_file` reads `model.safetensors` as the state of the plain model.

    Raises:
        ValueError: a model that is still masked, or a tensor that cannot be saved (a dtype, a shard, no data, state
            that is not a tensor), by name.
    """
    model = unwrapped(model)
    for name, module in model.named_modules():
        if hasattr(module, "mask_hard"):
            raise ValueError(f"model is still masked at {name!r}: call Sparsifier.finalize() first")
    state = _state(model)
    for name, value in state.items():
        _require_savable(name, value)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    saved: dict[str, tuple[Entry, Packed | None]] = {}
    first: dict[Any, str] = {}
    for name, value in state.items():
        tied_to = None if dense else first.setdefault(_memory(value), name)
        packed = _encoded(value, block_size, dense) if tied_to in (None, name) else None
        packed_before = not isinstance(value, torch.Tensor)
        is_parameter = name in parameters or packed_before
        entry = Entry("tied", tuple(value.shape), dtype_name(value.dtype), is_parameter, tied_to=tied_to)
        if packed is not None:
            runs_packed = packed_before and not dense
            size = value.block_size if not isinstance(value, torch.Tensor) and not dense else packed.block_size
            entry = Entry(packed.encoding, entry.shape, entry.dtype, is_parameter, size, runs_packed)
        saved[name] = entry, packed
    write_files(Path(directory), saved)


def load_pretrained(model: nn.Module, directory: str | os.PathLike[str]) -> nn.Module:
    """Load what `save_pretrained` saved into a model of the same architecture, bit for bit.

    A layer that ran on packed blocks when it was saved does so again, whether it is plain in `model` or packed itself;
    a packed layer of `model` that was saved dense is packed anew, in its own block size and bits. Everything is read
    and checked before the model is touched.

    Returns:
        `model`, or its replacement where it is a layer itself and was saved packed.

    Raises:
        ValueError: a file that is missing, damaged, truncated or of an unknown format, or of another model;
            the message names the file.
    """
    given, model = model, unwrapped(model)
    entries, path = read_config(Path(directory))
    own = _state(model)
    _require_same_model(entries, own, path)
    layers = {_weight_name(name): module for name, module in model.named_modules(remove_duplicate=False)}
    tensors: dict[str, torch.Tensor] = {}
    replacements: dict[int, nn.Module] = {}
    renewed: list[tuple[PackedLayer, BlockSparseWeight]] = []
    for name, value in _decoded(entries, path).items():
        mine = own[name]
        if isinstance(value, torch.Tensor) and isinstance(mine, torch.Tensor):
            tensors[name] = value
            continue
        layer, anew = layers.get(name), isinstance(value, torch.Tensor)
        if isinstance(value, torch.Tensor):
            assert not isinstance(mine, torch.Tensor)
            value = packed_weight(value, mine.block_size)
        by_inputs = is_transformers_linear(layer) or (isinstance(layer, BlockSparseLinear) and layer.by_inputs)
        if by_inputs and isinstance(value, BlockSparseWeight):
            value = value.transposed()
        if anew and isinstance(layer, PackedLayer) and layer.scales is not None:
            assert isinstance(value, BlockSparseWeight)
            value = value.to_float8()
        if isinstance(layer, PackedLayer) and _alike(layer.values, value.values):
            matrix = value.matrix if isinstance(value, BlockSparseFilter) else value
            renewed.append((layer, matrix))  # the parameter stays the one that an optimizer may have
        elif layer is not None and can_be_packed(layer, value):
            replacements[id(layer)] = packed_layer(layer, value)
        else:
            raise ValueError(f"{path} is of another model: {name!r} is packed, the model has no layer that can be")
    for packed, matrix in renewed:
        packed.load_packed(matrix)
    loaded = replace_modules(model, replacements)
    loaded.load_state_dict(tensors, strict=False)  # names and shapes are those of the model: checked above
    return given if loaded is model else loaded


def describe_pretrained(directory: str | os.PathLike[str]) -> list[SavedTensor]:
    """What a saved model holds, tensor by tensor; `directory` may also be one of its two files.

    Raises:
        ValueError: files that are missing, damaged, truncated or of an unknown format, by name.
    """
    folder = Path(directory)
    entries, weights = read_config(folder.parent if saved_weights(folder) and not folder.is_dir() else folder)
    parts = read_parts(entries, weights)
    described = []
    for name, entry in entries.items():
        held = parts[name if entry.tied_to is None else entry.tied_to].parts
        zeros = math.prod(entry.shape) - int((held["values"] != 0).sum())
        stored = sum(part.nbytes for part in held.values()) if entry.tied_to is None else 0
        sizes = entry.encoding, entry.block_size, entry.packed, entry.tied_to, zeros, stored
        described.append(SavedTensor(name, entry.shape, entry.dtype, entry.parameter, *sizes))
    return described


def sparsity_of(directory: str | os.PathLike[str]) -> float:
    """Fraction of zeros among all parameters (not buffers) of a saved model, tied ones counted once.

    Raises:
        ValueError: as `describe_pretrained`.
    """
    parameters = [t for t in describe_pretrained(directory) if t.parameter and t.tied_to is None]
    total = sum(math.prod(tensor.shape) for tensor in parameters)
    return sum(tensor.zeros for tensor in parameters) / total if total else 0.0


def _state(model: nn.Module) -> dict[str, _Value]:
    """The model's state, where packed layers have a weight instead of blocks and their index."""
    state: dict[str, _Value] = model.state_dict()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PackedLayer):
            weight = _weight_name(name)
            for own in module.packed_names:
                del state[weight.removesuffix("weight") + own]
            state[weight] = module.stored
    return state


def _weight_name(module: str) -> str:
    return f"{module}.weight" if module else "weight"


def _alike(mine: torch.Tensor, new: torch.Tensor) -> bool:
    return mine.shape == new.shape and mine.dtype == new.dtype


def _values(value: _Value) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else value.values


def _memory(value: _Value) -> Any:
    """Equal for two tensors that are the same entries of memory; unique without entries."""
    tensor = _values(value)
    place = tensor.data_ptr() if tensor.numel() else id(tensor)
    return tensor.device, place, tensor.dtype, tensor.stride(), tuple(tensor.shape), tuple(value.shape)


def _require_savable(name: str, value: Any) -> None:
    if not isinstance(value, (torch.Tensor, BlockSparseWeight, BlockSparseFilter)):
        raise ValueError(f"state {name!r} is a {type(value).__name__}; only tensors can be saved")
    tensor = _values(value)
    if dtype_name(value.dtype) not in DTYPES:
        raise ValueError(f"tensor {name!r} has dtype {value.dtype}; only {', '.join(DTYPES)} can be saved")
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        raise ValueError(f"tensor {name!r} is {tensor.layout} on {tensor.device}; only strided ones with data can be")
    if hasattr(tensor, "full_tensor"):
        raise ValueError(f"tensor {name!r} is sharded over processes; save a model that holds it whole")


def _encoded(value: _Value, block_size: int | tuple[int, int] | None, dense: bool) -> Packed:
    if not isinstance(value, torch.Tensor):
        if not dense:
            return pack_blocks(value)
        value = value.to_dense()
    return pack(value.detach().cpu(), block_size, dense)


def _decoded(entries: dict[str, Entry], path: Path) -> dict[str, _Value]:
    """The tensors of a file; the weights of packed layers as their blocks."""
    parts = read_parts(entries, path)
    values: dict[str, _Value] = {}
    for name, packed in parts.items():
        entry = entries[name]
        shape, dtype = torch.Size(entry.shape), DTYPES[entry.dtype]
        try:
            if entry.packed and entry.encoding in ("blocks", "float8"):
                values[name] = unpack_blocks(packed, shape, dtype)
                continue
            values[name] = value = unpack(packed, shape, dtype)
            if entry.packed and entry.block_size is not None:
                values[name] = packed_weight(value, entry.block_size)
        except ValueError as error:
            raise ValueError(f"{path}: {name!r}: {error}") from error
    tied = {name: values[entry.tied_to] for name, entry in entries.items() if entry.tied_to is not None}
    return {**values, **tied}


def _require_same_model(entries: dict[str, Entry], own: dict[str, _Value], path: Path) -> None:
    if set(own) != set(entries):
        missing, unknown = sorted(set(own) - set(entries)), sorted(set(entries) - set(own))
        raise ValueError(f"{path} is of another model: it lacks {missing} and has {unknown}")
    for name, entry in entries.items():
        shape, dtype = tuple(own[name].shape), own[name].dtype
        if (entry.shape, DTYPES[entry.dtype]) != (shape, dtype):
            raise ValueError(
                f"{path} is of another model: {name!r} is {DTYPES[entry.dtype]} of shape {entry.shape}, the model's is"
                f" {dtype} of shape {shape}"
            )
