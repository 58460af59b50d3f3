"""The sparsifier: masks the weights of a model, hooks an optimizer, and gives a plain sparse model back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from spartan.budgets import distribute, shares
from spartan.costs import CostModel, LayerCost, PricePerBlock
from spartan.groups import Group, Part, kept_by_part, parts_of, price_parts
from spartan.masks import Mask, MaskedTensor, MaskGroup, MaskSet
from spartan.methods.base import Method, SparseMethod
from spartan.pattern_group import PatternGroup
from spartan.selection import Selector, common_kind

__all__ = ["Sparsifier"]

_VERSION = 1
_COUNTS = ("model", "masked")
_ENTRIES = ("soft", "hard", "beta", "scale", "backward", "straight_through")


class Sparsifier:
    """Trains `model` to a sparsity chosen beforehand, with the training loop unchanged.

    Masked by default: the weights of Linear and Conv layers (exact types), of MultiheadAttention and of the `Conv1D`
    of Hugging Face's transformers, except the classifier head, which is the last Linear in definition order.
    Embeddings, norms, biases and the head stay dense; `skipped` says why, for each. A weight that several modules
    have gets one mask, and is masked by default if all its uses are. Modules are changed in place: names and identity
    of parameters stay, so an optimizer may be made before or after. (Other modules get a torch parametrization, and so
    do those inside MultiheadAttention and TransformerEncoderLayer and tied weights; their parameter is renamed, not
    replaced.) Blocks are of (outputs, inputs), also where a weight is stored transposed.

    Args:
        model: any module; masked weights that share a budget must share a dtype and a device.
        method: one of `spartan.methods`: `Spartan`, `TopKAST`, `RigL` and their relatives, or `Dense`.
        total_steps: optimizer steps of the whole training.
        include: weights to mask instead of the default: a pattern for names ("blocks.*.weight"), a type (all in modules
            of that type), a function of (name, module), or several of these. Any floating-point parameter of at least
            two dimensions can be chosen, unless it is a bias.
        exclude: the same, taken from the choice, and from that of `groups`.
        groups: weights with a sparsity, block size or distribution of their own, see `spartan.Group`; what they
            choose is masked besides `include`, whose weights in no group have the method's settings.
        count: what `sparsity` is a fraction of. "model": of all parameters of the model, so masked weights
            are sparser to make up for dense ones; "masked": of the masked weights alone. Weights of groups that
            have a sparsity of their own are not counted in either.
        costs: what a block costs: a `spartan.CostModel` such as `FLOPs(example_input)` or `LatencyTable.load(file)`, or
            a function (name, module, shape of the blocks) -> cost of each, a number or a tensor. `sparsity` then is
            the fraction of the masked weights' cost that is removed, whatever `count` says. Blocks are chosen by
            magnitude / cost, and what is kept never costs more than the budget. None: each weight costs 1.

    Attributes:
        skipped: why a parameter is not masked, by its name.

    Raises:
        TypeError: a model, method, selector or group of the wrong type.
        ValueError: no weight to mask, a budget over several dtypes or devices, a pattern or type that matches nothing,
            total_steps below 1, an unknown count, or a sparsity that cannot be reached (the message says which can).

    Example::

        sparsifier = Sparsifier(model, Spartan(sparsity=0.9), total_steps=1000)
        sparsifier.attach(optimizer)
        ...                      # train as ever
        sparsifier.finalize()    # plain modules with exact zeros
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        total_steps: int,
        *,
        include: Selector | None = None,
        exclude: Selector | None = None,
        groups: Sequence[Group] = (),
        count: str = "model",
        costs: CostModel | PricePerBlock | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
        if not isinstance(method, Method):
            raise TypeError(f"method must be a spartan method such as Spartan(sparsity=0.9); got {method!r}")
        if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
            raise ValueError(f"total_steps must be an int of at least 1; got {total_steps!r}")
        if count not in _COUNTS:
            raise ValueError(f"count must be one of {', '.join(_COUNTS)}; got {count!r}")
        self.model = model
        self.method = method
        self._handles: list[RemovableHandle] = []
        self._finalized = False
        self.skipped: dict[str, str] = {}
        parts: list[Part] = []
        if method.masking is not None:
            parts, self.skipped = parts_of(model, method.masking, include, exclude, groups)
        masked_alone = count == "masked" or (method.masking is not None and method.masking.pattern is not None)
        counted = (c.weight for part in parts for c in part.weights) if masked_alone else model.parameters()
        self._counted = sum(weight.numel() for weight in counted)
        self._cost_unit = 1.0
        self._final_costs: dict[str, LayerCost] = {}
        if costs is not None and parts:
            parts, self._cost_unit = self._price(parts, costs)
        budgets = [] if method.masking is None else self._make_groups(method.masking, parts)
        self._masks = MaskSet(budgets, total_steps)
        method.start(self._masks)

    def _price(self, parts: list[Part], costs: CostModel | PricePerBlock) -> tuple[list[Part], float]:
        masking = self.method.masking
        if masking is not None and masking.pattern is not None:
            raise ValueError(f"costs are not for a method with a pattern, got pattern {masking.pattern}")
        return price_parts(parts, costs, self.model)

    def _make_groups(self, method: SparseMethod, parts: list[Part]) -> list[MaskGroup]:
        """Mask the weights, grouped by budget; nothing is changed if the sparsity cannot be reached."""
        if method.pattern is not None:
            (part,) = parts
            return [PatternGroup(tensor, method.pattern) for tensor in part.masked_tensors(method)]
        costs = [size.cost for part in parts for size in part.sizes() if size.cost is not None]
        kept = kept_by_part(parts, method.sparsity, sum(costs) if costs else self._counted)
        targets = [distribute(p.sizes(), k, p.distribution) for p, k in zip(parts, kept, strict=True)]
        members = [shares(part.sizes(), part.distribution) for part in parts]
        for part, budgets in zip(parts, members, strict=True):
            for budget in budgets:
                common_kind([part.weights[i].weight for i in budget])
        groups = []
        for index, part in enumerate(parts):
            tensors = part.masked_tensors(method)
            lends = isinstance(part.distribution, str)  # the sparsity of a layer that was named is its own
            for budget, target in zip(members[index], targets[index], strict=True):
                groups.append(MaskGroup([tensors[i] for i in budget], target, index, lends))
        return groups

    @property
    def step_count(self) -> int:
        """Optimizer steps made so far."""
        return self._masks.step

    @property
    def frozen(self) -> bool:
        """Whether the masks are fixed from here on."""
        return self._masks.frozen

    @property
    def beta(self) -> float | None:
        """Sharpness of the soft masks now, in the method's own units; None for methods without soft masks."""
        return self.method.beta_at(self._masks.step, self._masks.total_steps)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros now, in the forward pass's weights, of the parameters counted (see `count`)."""
        if self._finalized:
            zeros = sum(
                int((tensor.module.get_parameter(tensor.parameter) == 0).sum()) for tensor in self._masks.tensors
            )
        else:
            zeros = sum(tensor.size.count - tensor.kept() for tensor in self._masks.tensors)
        return zeros / self._counted if self._counted else 0.0

    def masks(self) -> dict[str, Mask]:
        """The masks now, by name of the weight: soft m and hard h, one entry per block.

        Soft masks are ones for methods without them and once they are merged into the weights.
        """
        self._require_active()
        return {tensor.name: tensor.mask for tensor in self._masks.tensors}

    def kept_fractions(self) -> dict[str, float]:
        """Fraction of each masked weight that the hard mask keeps now, by name."""
        self._require_active()
        return {tensor.name: tensor.kept() / tensor.size.count for tensor in self._masks.tensors}

    def costs(self) -> dict[str, LayerCost]:
        """Cost of each masked weight, of all its blocks and of those kept now, by name; in the cost model's unit.

        Without a cost model these are numbers of weights. After `finalize` they are what they were then.
        """
        if self._finalized:
            return self._final_costs
        unit = self._cost_unit
        return {
            t.name: LayerCost((t.size.count if t.cost is None else t.cost) * unit, t.kept_cost() * unit)
            for t in self._masks.tensors
        }

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Call `correct_gradients` before and `step` after each step of `optimizer`, until `finalize`.

        A step that GradScaler skips does not happen, so masks do not move. Gradients are corrected as `.grad`
        stands when the optimizer reads it: accumulated, reduced, unscaled and clipped. (A fused optimizer under
        GradScaler skips inside its own step, which counts as made.)

        Raises:
            TypeError: not an optimizer. ValueError: it has none of the masked weights.
            RuntimeError: attached already, or finalized.
        """
        self._require_active()
        self._require_detached("attach")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer; got {type(optimizer).__name__}")
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        masked = [tensor.weight for tensor in self._masks.tensors]
        if masked and not any(id(weight) in held for weight in masked):
            raise ValueError("optimizer has none of the masked weights; attach the one that trains this model")
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        self._masks.optimizer = optimizer

    def correct_gradients(self) -> None:
        """Complete the final `.grad` of the masked weights; by hand, once before `optimizer.step()`.

        Raises:
            RuntimeError: an optimizer is attached, which does this itself, or the model is finalized.
        """
        self._require_active()
        self._require_detached("correct_gradients")
        self.method.correct_gradients(self._masks)

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Set the masks for the next forward pass; by hand, once after `optimizer.step()`, not after a skipped one.

        Args:
            optimizer: the one that made the step, for methods that reset its moments (`SET`, `RigL`, `GSE`).

        Raises:
            RuntimeError: an optimizer is attached, which does this itself, or the model is finalized.
            ValueError: a weight that is not finite, by name (on the CPU), or a method that needs the optimizer
                and has none.
        """
        self._require_active()
        self._require_detached("step")
        self._masks.optimizer = optimizer
        try:
            self._advance()
        finally:
            self._masks.optimizer = None

    def finalize(self) -> None:
        """Apply the masks for good: plain modules again, with exact zeros and exactly the sparsity asked for.

        Exact to one block. Masks that have not reached their sparsity, because training stopped early, are
        brought to it.

        Raises:
            RuntimeError: finalized already.
        """
        self._require_active()
        self.method.finish(self._masks)
        self._final_costs = self.costs()
        self._masks.project()
        self._masks.remove()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._masks.optimizer = None
        self._finalized = True

    def state_dict(self) -> dict[str, Any]:
        """All state, as tensors and plain types: `torch.load(..., weights_only=True)` reads it back.

        With the state of model and optimizer, training resumes bit for bit.
        """
        self._require_active()
        return {
            "version": _VERSION,
            "method": self.method.name,
            "settings": self.method.settings(),
            "total_steps": self._masks.total_steps,
            "step": self._masks.step,
            "frozen": self._masks.frozen,
            "costs": {tensor.name: tensor.cost for tensor in self._masks.tensors if tensor.cost is not None},
            "targets": [group.target for group in self._masks.groups],
            "solved": [group.solved for group in self._masks.groups],
            "solver": [group.state.clone() for group in self._masks.groups],
            "masks": {tensor.name: _tensor_state(tensor) for tensor in self._masks.tensors},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`, which is checked wholly before anything is changed.

        Raises:
            ValueError: state of another version, method, setting or model, or incomplete; what differs is
                named.
            RuntimeError: finalized.
        """
        self._require_active()
        own = self.state_dict()
        if not isinstance(state, dict) or set(state) != set(own):
            found = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"state must have the entries {sorted(own)}; got {found}")
        for key in ("version", "method", "settings", "total_steps", "costs"):
            if state[key] != own[key]:
                raise ValueError(f"state is of another training: its {key} is {state[key]!r}, here it is {own[key]!r}")
        _require_same_model(state, own)
        self._masks.step, self._masks.frozen = int(state["step"]), bool(state["frozen"])
        for group, solved, solver in zip(self._masks.groups, state["solved"], state["solver"], strict=True):
            group.solved = bool(solved)
            group.state = solver.to(device=group.device, copy=True)
        for tensor in self._masks.tensors:
            _load_tensor(tensor, state["masks"][tensor.name])
        self.method.resume(self._masks)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get("closure") is not None or any(callable(argument) for argument in args[1:]):
            raise ValueError(
                "optimizer.step(closure) computes gradients after they would be corrected; call backward before step()"
            )
        self.method.correct_gradients(self._masks)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._advance()

    def _advance(self) -> None:
        self._masks.step += 1
        with torch.no_grad():
            self.method.update(self._masks)

    def _require_active(self) -> None:
        if self._finalized:
            raise RuntimeError("this sparsifier is finalized: its model is plain again; make a new one to go on")

    def _require_detached(self, what: str) -> None:
        if self._handles:
            raise RuntimeError(
                f"{what}: an optimizer is attached, whose step() corrects gradients and moves masks itself"
            )


def _tensor_state(tensor: MaskedTensor) -> dict[str, torch.Tensor]:
    """Masks and their numbers; what a merged mask no longer has is absent."""
    carrier = tensor.carrier
    state = {
        "soft": carrier.mask_soft,
        "hard": carrier.mask_hard,
        "beta": carrier.mask_beta,
        "scale": carrier.mask_scale,
        "backward": carrier.mask_backward,
        "straight_through": torch.tensor(carrier.mask_straight_through),
    }
    return {key: value.clone() for key, value in state.items() if value is not None}


def _require_same_model(state: dict[str, Any], own: dict[str, Any]) -> None:
    theirs, ours = state["masks"], own["masks"]
    if set(theirs) != set(ours):
        raise ValueError(f"state is of another model: it masks {sorted(theirs)}, here {sorted(ours)} are masked")
    for name, mask in ours.items():
        for key in {"hard", *theirs[name]}:
            wanted = () if key in ("beta", "scale", "straight_through") else tuple(mask["hard"].shape)
            other = theirs[name].get(key)
            if key not in _ENTRIES or not isinstance(other, torch.Tensor):
                raise ValueError(f"state of {name!r} has a wrong entry {key!r}")
            if tuple(other.shape) != wanted:
                raise ValueError(
                    f"state is of another model: {key} of {name!r} has shape {tuple(other.shape)}, here {wanted}"
                )
    if state["targets"] != own["targets"]:
        raise ValueError(f"state is of another model: budgets {state['targets']}, here {own['targets']}")
    for key in ("solved", "solver"):
        if len(state[key]) != len(own[key]):
            raise ValueError(f"state must have {len(own[key])} entries in {key!r}; got {len(state[key])}")
    for solver, wanted in zip(state["solver"], own["solver"], strict=True):
        if not isinstance(solver, torch.Tensor) or (solver.shape, solver.dtype) != (wanted.shape, wanted.dtype):
            raise ValueError(f"state has a wrong entry 'solver': {solver!r}; it must be {wanted.dtype} {wanted.shape}")


def _load_tensor(tensor: MaskedTensor, state: dict[str, torch.Tensor]) -> None:
    carrier = tensor.carrier
    weight = tensor.weight
    for key in ("soft", "scale"):
        value = state.get(key)
        setattr(carrier, f"mask_{key}", value if value is None else value.to(weight.device, weight.dtype, copy=True))
    backward = state.get("backward")
    carrier.mask_backward = backward if backward is None else backward.to(weight.device, copy=True)
    carrier.mask_hard.copy_(state["hard"])
    carrier.mask_beta.copy_(state["beta"])
    carrier.mask_straight_through = bool(state.get("straight_through", "soft" in state))
    carrier.masks_changed()
