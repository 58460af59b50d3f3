"""Memories behind the layers of a frozen model: put in, saved alone, taken out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from spartan.layers.hierarchical_memory import HierarchicalMemory

__all__ = ["add_memory", "load_memory_state_dict", "memory_state_dict", "remove_memory"]

_CHILD = "memory"  # the name of a memory in the layer that it is behind
_RECORD = "spartan_added_memory"


@dataclass(frozen=True)
class _Added:
    """What `add_memory` did to a model; a copy of the model has one of its own.

    Attributes:
        layers: names of those that have a memory. handles: of their hooks.
        trained: names of the parameters that were trained before. head: of those trained now, without the memories'.
        nested: names of encoders that would have passed nested tensors.
    """

    layers: tuple[str, ...]
    handles: tuple[RemovableHandle, ...]
    trained: frozenset[str]
    head: frozenset[str]
    nested: tuple[str, ...]


def add_memory(
    model: nn.Module,
    *,
    layers: str | Sequence[str] | None = None,
    train: str | Sequence[str] = (),
    parents: int = 32,
    children: int = 4,
    kept: int = 4,
    width: int | None = None,
) -> list[nn.Parameter]:
    """Freeze a model and put a `HierarchicalMemory` behind each of its layers: what the layer gives reads it.

    The model's output does not change until the memories are trained (`nn.TransformerEncoder` no longer sets padded
    tokens to 0 in inference: its nested tensors exclude hooks). Layers give a tensor, or a tuple that begins
    with one, such as those of Hugging Face's transformers and of `nn.TransformerEncoder`. A memory is the child
    "memory" of its layer; the names of all other parameters stay.

    Args:
        model: changed in place.
        layers: patterns for the names of modules, "encoder.layer.*"; of modules in one another the outermost counts.
            None: the children of the `nn.ModuleList` or `nn.Sequential` with the most parameters of those whose (two
            or more) children are all of one class.
        train: patterns for the names of parameters that are trained and saved too, "classifier.*". Buffers, such as
            the statistics of a BatchNorm in training, are saved only of modules that have such a parameter.
        parents: as `HierarchicalMemory` takes it.
        children: likewise.
        kept: likewise.
        width: of the hidden states. None: that of the largest norm in a layer.

    Returns:
        The parameters to train: the memories', then those of `train`.

    Raises:
        TypeError: not a module. ValueError: a model that has memories, a pattern that matches nothing, no repeated
            layers, a layer without a norm and no `width`, a layer that has a child "memory" already.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    if _RECORD in vars(model):
        raise ValueError("model has memories already: call remove_memory(model) first")
    chosen = _repeated(model) if layers is None else _outermost(model, "layers", layers)
    parameters = dict(model.named_parameters())
    first = {parameter: name for name, parameter in parameters.items()}  # a tied one goes by its first name
    every = dict(model.named_parameters(remove_duplicate=False))
    head = frozenset(first[every[name]] for name in _matches("train", train, every))
    memories = {name: _memory_for(name, layer, width, (parents, children, kept)) for name, layer in chosen.items()}
    trained = frozenset(name for name, parameter in parameters.items() if parameter.requires_grad)
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in head)
    for name, layer in chosen.items():
        layer.add_module(_CHILD, memories[name])
    handles = tuple(layer.register_forward_hook(_read) for layer in chosen.values())
    nested = tuple(name for name, module in model.named_modules() if getattr(module, "use_nested_tensor", False))
    _pass_nested(model, nested, False)  # hooks exclude it
    setattr(model, _RECORD, _Added(tuple(chosen), handles, trained, head, nested))
    return [*nn.ModuleList(memories.values()).parameters(), *(parameters[name] for name in parameters if name in head)]


def memory_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The part of a model's state that `add_memory` trains: the memories, and the parameters that it was given.

    Buffers of modules that have such a parameter belong to it.

    Raises:
        ValueError: a model without memories.
    """
    added = _added(model)
    memories = tuple(f"{name}.{_CHILD}." for name in added.layers)
    owners = {name.rpartition(".")[0] for name in added.head}
    parameters = dict(model.named_parameters(remove_duplicate=False))

    def belongs(name: str) -> bool:
        buffer = name not in parameters and name.rpartition(".")[0] in owners
        return name in added.head or buffer or name.startswith(memories)

    return {name: value for name, value in model.state_dict().items() if belongs(name)}


def load_memory_state_dict(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Load what `memory_state_dict` gave into a model to which `add_memory` did the same.

    Raises:
        ValueError: a model without memories, or a state of other names or shapes; the model is then as it was.
    """
    own = memory_state_dict(model)
    if own.keys() != state.keys():
        raise ValueError(
            f"state must have the names of the model's memories; it lacks {sorted(own.keys() - state.keys())}"
            f" and has besides {sorted(state.keys() - own.keys())}"
        )
    for name, value in own.items():
        if value.shape != state[name].shape:
            raise ValueError(f"state[{name!r}] must be {tuple(value.shape)}; got {tuple(state[name].shape)}")
    model.load_state_dict(dict(state), strict=False)


def remove_memory(model: nn.Module) -> None:
    """Take the memories out, and train again what was trained before; what `train` named keeps its values.

    Raises:
        ValueError: a model without memories.
    """
    added = _added(model)
    for handle in added.handles:
        handle.remove()
    for name in added.layers:
        delattr(model.get_submodule(name), _CHILD)
    _pass_nested(model, added.nested, True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in added.trained)
    delattr(model, _RECORD)


def _read(layer: nn.Module, inputs: Any, output: Any) -> Any:
    """The hook: the layer's output, read from its memory."""
    hidden = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(hidden, torch.Tensor):
        kind = type(output).__name__
        raise TypeError(f"a layer with a memory must give a tensor or a tuple that begins with one; got {kind}")
    read = layer.get_submodule(_CHILD)(hidden)
    return (read, *output[1:]) if isinstance(output, tuple) else read


def _pass_nested(model: nn.Module, encoders: Sequence[str], wanted: bool) -> None:
    for name in encoders:
        encoder: Any = model.get_submodule(name)
        encoder.use_nested_tensor = wanted


def _added(model: nn.Module) -> _Added:
    if _RECORD not in vars(model):
        raise ValueError(
            "model must have memories: call add_memory(model) first, and pass that model, not what wraps it"
        )
    return getattr(model, _RECORD)


def _repeated(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of the largest stack, by name."""
    stacks = [
        (sum(parameter.numel() for parameter in module.parameters()), name, module)
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential))
        if len(module) > 1 and len({type(child) for child in module}) == 1
    ]
    if not stacks:
        raise ValueError("model has no stack of layers of one class: name them with layers=")
    _, name, stack = max(stacks, key=lambda stack: stack[0])
    return {f"{name}.{child}" if name else child: layer for child, layer in stack.named_children()}


def _outermost(model: nn.Module, argument: str, patterns: str | Sequence[str]) -> dict[str, nn.Module]:
    modules = {name: module for name, module in model.named_modules() if name}
    chosen: dict[str, nn.Module] = {}
    for name in _matches(argument, patterns, modules):
        if not any(name.startswith(f"{outer}.") for outer in chosen):
            chosen[name] = modules[name]
    return chosen


def _matches(argument: str, patterns: str | Sequence[str], names: Mapping[str, Any]) -> list[str]:
    """The names that one of the patterns matches, in their order."""
    several = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in several:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"{argument} pattern {pattern!r} matches nothing; the names are {[*names]}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in several)]


def _memory_for(name: str, layer: nn.Module, width: int | None, sizes: tuple[int, int, int]) -> HierarchicalMemory:
    if hasattr(layer, _CHILD):
        raise ValueError(f"layer {name!r} has an attribute {_CHILD!r} already")
    if width is None:
        norms = [module.weight for module in layer.modules() if "norm" in type(module).__name__.lower()]
        if not (widths := [weight.numel() for weight in norms if isinstance(weight, torch.Tensor)]):
            raise ValueError(f"layer {name!r} has no norm that shows its width: give width=")
        width = max(widths)
    memory = HierarchicalMemory(width, *sizes)
    like = next((parameter for parameter in layer.parameters() if parameter.is_floating_point()), None)
    if like is None:
        return memory
    # float32 beside a half-precision layer: what is trained keeps its small steps
    return memory.to(like.device, torch.promote_types(like.dtype, torch.float32))
