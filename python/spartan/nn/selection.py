"""Which weights of a model are masked, and why the others are not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.prune import BasePruningMethod

from spartan.distributed import own_class
from spartan.nn.heads import adapter_of, head_of
from spartan.nn.kinds import is_norm, is_transformers_linear, stored_by_inputs
from spartan.nn.stacks import Stack, stack_of
from spartan.nn.wrappers import is_wrapper, named_owners

__all__ = [
    "Candidate",
    "Selector",
    "Use",
    "common_kind",
    "find_weights",
    "select_linear_layers",
    "select_weights",
    "skipped_weights",
]

_One = str | type[nn.Module] | Callable[[str, nn.Module], bool]
Selector = _One | Sequence[_One]

_DEFAULT_TYPES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
# These read `.weight` of their children instead of calling them (the second in its inference fast path).
_READS_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


@dataclass(frozen=True)
class Use:
    """A parameter where a module has it: `module.<parameter>`, called `name` in the plain model, without wrappers.

    Attributes:
        owners: the modules that `module` is in, outermost first, and itself.
    """

    name: str
    parameter: str
    owners: tuple[nn.Module, ...]

    @property
    def module(self) -> nn.Module:
        """The module that has the parameter."""
        return self.owners[-1]

    @property
    def owner(self) -> nn.Module | None:
        """The module that has `module`, past wrappers; None for the model itself."""
        return next((owner for owner in reversed(self.owners[:-1]) if not is_wrapper(owner)), None)


@dataclass(frozen=True)
class Candidate:
    """A parameter of a model with everywhere it is used: more than one place if it is tied.

    Attributes:
        transposed: whether it is stored as [in, out]: blocks are then transposed too.
    """

    weight: nn.Parameter
    uses: tuple[Use, ...]
    transposed: bool = False

    @property
    def name(self) -> str:
        """Its first name, "layers.0.weight"."""
        return self.uses[0].name

    @property
    def read_elsewhere(self) -> bool:
        """Whether its masked value must be what the attribute gives, not only what the module's forward uses."""
        first = self.uses[0]
        return len(self.uses) > 1 or first.parameter != "weight" or isinstance(first.owner, _READS_WEIGHTS)

    def block_size(self, block_size: tuple[int, int]) -> tuple[int, int]:
        """The block (outputs, inputs) in the dimensions of the stored weight."""
        return block_size[::-1] if self.transposed else block_size

    def stack(self, block_size: tuple[int, int]) -> Stack | None:
        """How masks with these blocks (outputs, inputs) see it where it is several matrices."""
        return stack_of(self.uses[0].module, self.weight, self.block_size(block_size)[0])

    def masked_shape(self, block_size: tuple[int, int]) -> torch.Size:
        """Its shape as masks with these blocks see it."""
        stack = self.stack(block_size)
        return self.weight.shape if stack is None else stack.turned_shape

    def matches(self, selector: Selector) -> bool:
        """Whether a selector chooses it, at any of its uses."""
        return any(_matches(one, use) for one in _each(selector) for use in self.uses)

    @property
    def unfit(self) -> str | None:
        """Why it cannot be masked; None if it can."""
        return next((reason for use in self.uses if (reason := _unfit(use, self.weight))), None)


def find_weights(model: nn.Module) -> list[Candidate]:
    """All parameters of a model, in definition order, tied ones once, by their names in the plain model.

    Raises:
        TypeError: not a module. ValueError: a module that is masked already, a lazy one without its weights, one on the
            meta device.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    uses: dict[int, list[Use]] = {}
    weights: dict[int, nn.Parameter] = {}
    for path, owners in named_owners(model):
        if hasattr(owners[-1], "mask_hard"):
            raise ValueError(f"model has a masked module already: {path!r}; finalize it first")
        for parameter, weight in owners[-1]._parameters.items():
            if weight is not None:
                name = f"{path}.{parameter}" if path else parameter
                _require_values(name, weight)
                weights[id(weight)] = weight
                uses.setdefault(id(weight), []).append(Use(name, parameter, owners))
    return [Candidate(weights[key], tuple(places), stored_by_inputs(places[0].module)) for key, places in uses.items()]


def select_weights(
    model: nn.Module, found: list[Candidate], include: Selector | None, exclude: Selector | None
) -> list[Candidate]:
    """The weights to mask, in definition order.

    By default those of exact types Linear, Conv1d, Conv2d and Conv3d, of MultiheadAttention and of the `Conv1D` of
    Hugging Face's transformers, except the classifier head (`heads.head_of`), frozen weights and low-rank adapters; a
    tied weight if all its uses are. `include` replaces that choice (any floating-point parameter of at least two
    dimensions that is no bias, the head and frozen ones too) and `exclude` takes from it. Both are patterns for names
    of weights ("blocks.*.weight"), types (all in modules of that type), functions of the weight's name and the module,
    or several of these.

    Raises:
        ValueError: a pattern or type that matches no weight. TypeError: something else than a selector.
    """
    fit = [candidate for candidate in found if candidate.unfit is None]
    if include is None:
        head = head_of(model)
        chosen = [candidate for candidate in fit if _why_dense(candidate, head) is None]
    else:
        require_used("include", include, found)
        chosen = [candidate for candidate in fit if candidate.matches(include)]
    if exclude is not None:
        require_used("exclude", exclude, found)
        chosen = [candidate for candidate in chosen if not candidate.matches(exclude)]
    return chosen


def select_linear_layers(
    model: nn.Module, found: list[Candidate], include: Selector | None, exclude: Selector | None
) -> list[Candidate]:
    """The weights of layers that can be replaced as a whole, chosen as `select_weights` does.

    Those are of the exact type `nn.Linear`, called by their owner, and share their weight with nothing.

    Raises:
        TypeError, ValueError: as `select_weights`; nothing to replace, or `include` chooses what cannot be.
    """
    chosen = select_weights(model, found, include, exclude)
    if include is None:
        chosen = [candidate for candidate in chosen if _replaceable(candidate)]
    for candidate in chosen:
        if not _replaceable(candidate):
            raise ValueError(
                f"include chooses {candidate.name!r}, which is not the weight of an nn.Linear (of that exact type) that"
                " its owner calls and that shares it with nothing"
            )
    if not chosen:
        raise ValueError(f"model has no linear layer to replace; its parameters are {[c.name for c in found]}")
    return chosen


def _replaceable(candidate: Candidate) -> bool:
    return type(candidate.uses[0].module) is nn.Linear and not candidate.read_elsewhere


def skipped_weights(
    model: nn.Module,
    found: list[Candidate],
    chosen: Sequence[Candidate],
    include: Selector | None,
    exclude: Selector | None,
) -> dict[str, str]:
    """Why each parameter that is not in `chosen` is not, by its first name."""
    head, masked = head_of(model), {candidate.name for candidate in chosen}
    reasons = {}
    for candidate in found:
        if candidate.name in masked:
            continue
        by_default = candidate.unfit or _why_dense(candidate, head)
        if by_default is None and exclude is not None and candidate.matches(exclude):
            by_default = "excluded"
        reasons[candidate.name] = by_default or "not included"
    return reasons


def require_used(argument: str, selector: Selector, found: Sequence[Candidate]) -> None:
    """Raise unless each pattern and type of `selector` matches a weight that can be masked."""
    fit = [candidate for candidate in found if candidate.unfit is None]
    for one in _each(selector):
        if isinstance(one, (str, type)) and not any(candidate.matches(one) for candidate in fit):
            shown = repr(one) if isinstance(one, str) else one.__name__
            unfit = {c.name: c.unfit for c in found if c.matches(one)}
            raise ValueError(
                f"{argument} {'pattern' if isinstance(one, str) else 'type'} {shown} matches no weight that can be"
                f" masked{f', only {unfit}' if unfit else ''}; the model has {[c.name for c in fit]}"
            )


def common_kind(weights: Sequence[torch.Tensor]) -> None:
    """Raise ValueError unless all weights share a dtype and a device, which one solve over them needs."""
    kinds = {(weight.dtype, weight.device) for weight in weights}
    if len(kinds) > 1:
        raise ValueError(
            f"masked weights that share a budget must share a dtype and a device; got {sorted(map(str, kinds))}:"
            " groups= gives them budgets of their own, as do the distributions uniform and erk"
        )


def _each(selector: Selector) -> list[_One]:
    several = [selector] if isinstance(selector, (str, type)) or callable(selector) else selector
    if not isinstance(several, Sequence) or not all(isinstance(one, (str, type)) or callable(one) for one in several):
        raise TypeError(f"include and exclude take names, patterns, types of modules or functions; got {selector!r}")
    return list(several)


def _matches(one: _One, use: Use) -> bool:
    if isinstance(one, str):
        return fnmatchcase(use.name, one)
    if isinstance(one, type):
        return any(isinstance(owner, one) for owner in use.owners)
    return bool(one(use.name, use.module))


def _require_values(name: str, weight: nn.Parameter) -> None:
    if isinstance(weight, nn.UninitializedParameter):
        raise ValueError(f"parameter {name!r} is not initialised yet: run the model once")
    if weight.is_meta:
        raise ValueError(
            f"model must have values to choose masks by; its parameter {name!r} is on the meta device: call"
            " model.to_empty(device=...) and initialise or load the weights first, then mask it"
        )


def _unfit(use: Use, weight: nn.Parameter) -> str | None:
    """Why a parameter cannot be masked."""
    module = use.module
    if "bias" in use.parameter:
        return "bias"
    if not weight.is_floating_point():
        return "not floating point"
    if weight.element_size() == 1:
        return f"quantised: {str(weight.dtype).removeprefix('torch.')}"
    if any(isinstance(owner, ParametrizationList) for owner in use.owners):
        return "parametrized already"
    if (hook := _recomputed_by(use)) is not None:
        return hook
    if weight.dim() < 2:
        return "norm" if is_norm(module) else "fewer than two dimensions"
    if not weight.numel():
        return "empty"
    if isinstance(module, _EMBEDDINGS) and (module.sparse or module.max_norm is not None):
        return "embedding with sparse gradients" if module.sparse else "embedding that renormalises its rows"
    return None


def _recomputed_by(use: Use) -> str | None:
    """Which hook of the module's forward pass makes its weight anew of this parameter; None: no such hook."""
    weight, _, suffix = use.parameter.rpartition("_")
    for hook in use.module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod) and (hook._tensor_name, suffix) == (weight, "orig"):
            return (
                f"pruned by torch.nn.utils.prune: prune.remove(module, {weight!r}) makes it plain, and keep_zeros=True"
                " keeps its zeros"
            )
        if getattr(hook, "name", None) == weight and suffix in ("orig", "g", "v"):  # spectral_norm, weight_norm
            return f"{weight} is made of it by {type(hook).__name__}"
    return None


def _why_dense(candidate: Candidate, head: nn.Module | None) -> str | None:
    """Why a weight that can be masked is not, by default; None if it is."""
    reasons = dict.fromkeys(reason for use in candidate.uses if (reason := _dense_use(use, head)))
    return ", ".join(reasons) or None


def _dense_use(use: Use, head: nn.Module | None) -> str | None:
    module = use.module
    if isinstance(module, _EMBEDDINGS):
        return "embedding"
    if is_norm(module):
        return "norm"
    if module is head:
        return "head: the last Linear"
    if (adapter := adapter_of(use.name, use.owners)) is not None:
        return f"adapter: {adapter}"
    if not getattr(module, use.parameter).requires_grad:
        return "frozen: its requires_grad is False"
    linear = use.parameter == "weight" and (
        own_class(module) in _DEFAULT_TYPES
        or is_transformers_linear(module)
        or (isinstance(module, NonDynamicallyQuantizableLinear) and isinstance(use.owner, nn.MultiheadAttention))
    )
    projection = own_class(module) is nn.MultiheadAttention and use.parameter.endswith("proj_weight")
    return None if linear or projection else f"{own_class(module).__name__} is dense by default"
