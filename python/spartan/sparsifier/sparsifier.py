"""The sparsifier: masks the weights of a model, hooks an optimizer, and gives a plain sparse model back."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from spartan.budgets import CostModel, LayerCost, PricePerBlock
from spartan.distributed import heed_in_ddp, ignore_in_ddp, reshard
from spartan.masks import Mask, MaskSet
from spartan.methods.base import Method, require_keeps_zeros
from spartan.nn.heads import why_no_head
from spartan.nn.selection import Selector
from spartan.sparsifier.attaching import Attachment, unwrapped_optimizers
from spartan.sparsifier.copies import PlacedMasks, disown, finalize_by, give_masks, kept, own, placed
from spartan.sparsifier.mask_making import mask_groups, require_takes_shards
from spartan.sparsifier.parts import Group, Part, parts_of, price_parts
from spartan.sparsifier.report import Report, dense_products, layer_reports
from spartan.sparsifier.state import check_state, load_state, mask_entries, state_of

__all__ = ["Sparsifier"]

_COUNTS = ("model", "masked")
_NEARLY_ALL = 0.9  # of the steps: to end a little early is no mistake


class Sparsifier:
    """Trains `model` to a sparsity chosen beforehand, with the training loop unchanged.

    Masked by default: the weights of Linear and Conv layers (exact types), of MultiheadAttention and of the `Conv1D`
    of Hugging Face's transformers, except the classifier head: the last Linear in definition order, unless that is in
    a layer that repeats or in a model without a head. Embeddings, norms, biases, the head, frozen weights
    (`requires_grad=False`) and low-rank adapters stay dense; `skipped` says why, for each. A weight that several
    modules have gets one mask, and is masked by default if all its uses are. Modules are changed in place; names, order
    and identity of parameters stay, so an optimizer may be made before or after, and what a trainer saves meanwhile is
    the state of the plain model. (Of modules other than Linear and Conv2d, of those inside MultiheadAttention and
    TransformerEncoderLayer and of tied weights, the attribute gives the masked weight; the parameter is in
    `parameters()`. So transformers' `tie_weights()` finds no parameter in a masked embedding: it is tied already, and
    `save_pretrained` needs no such call.) Blocks are of (outputs, inputs), also where a weight is stored transposed; of
    a stack of matrices [experts, out, in] each is masked as a matrix. Names of weights are those of the plain model,
    whether or not it, or a part, is in `DistributedDataParallel`, `torch.compile` or `checkpoint_wrapper`.

    Args:
        model: any module; masked weights that share a budget must share a dtype and a device.
        method: one of `spartan.methods`: `Spartan`, `TopKAST`, `RigL` and their relatives, or `Dense`.
        total_steps: optimizer steps of the whole training.
        include: weights to mask instead of the default: a pattern for names ("blocks.*.weight"), a type (all in modules
            of that type), a function of (name, module), or several of these. Any floating-point parameter of at least
            two dimensions can be chosen, unless it is a bias.
        exclude: the same, taken from the choice, and from that of `groups`.
        groups: weights with a sparsity, block size, distribution or pattern of their own, see `spartan.Group`; what
            they choose is masked besides `include`, whose weights in no group have the method's settings.
        count: what `sparsity` is a fraction of. "model": of all parameters of the model, so masked weights
            are sparser to make up for dense ones; "masked": of the masked weights alone. Weights of groups that
            have a sparsity or a pattern of their own are not counted in either.
        costs: what a block costs: a `spartan.CostModel` such as `FLOPs(example_input)` or `LatencyTable.load(file)`, or
            a function (name, module, shape of the blocks) -> cost of each, a number or a tensor. `sparsity` then is
            the fraction of the masked weights' cost that is removed, whatever `count` says. Blocks are chosen by
            magnitude / cost, and what is kept never costs more than the budget. None: each weight costs 1.
        keep_zeros: for a model that is sparse already: blocks of zeros are dropped from the first step on, and a budget
            that shrinks does so from what is left. With `GMP`, `OneShot`, `TopKAST` and `StaticRandom` they stay zero,
            also where that is sparser than asked. With `Spartan`, `DualAveraging`, `DPF`, `IHT` and `SRSTE`, whose
            gradients reach dropped weights, they come back if they grow; `RigL`, `SET` and `GSE` begin with the largest
            of what is not zero instead of random blocks, and grow others. Not for patterns, `MaskDecay`, `WGSEF`.
        compute_soft: with `Spartan` on a CPU, compute the soft masks of single weights from the weights wherever they
            are needed, instead of keeping them: 1 byte a weight instead of 5. Copies of the model then have the soft
            masks of their own weights, and cannot average buffers; other devices and divided weights keep theirs.

    Attributes:
        skipped: why a parameter is not masked, by its name.

    Raises:
        TypeError: a model, method, selector or group of the wrong type.
        ValueError: no weight to mask, a budget over several dtypes or devices, a pattern or type that matches nothing,
            total_steps below 1, an unknown count, or a sparsity that cannot be reached (the message says which can).

    Warns:
        UserWarning: the method cannot do what it is for in `total_steps`; the message says what to change.

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
        keep_zeros: bool = False,
        compute_soft: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
        if not isinstance(method, Method):
            raise TypeError(f"method must be a spartan method such as Spartan(sparsity=0.9); got {method!r}")
        if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
            raise ValueError(f"total_steps must be an int of at least 1; got {total_steps!r}")
        if count not in _COUNTS:
            raise ValueError(f"count must be one of {', '.join(_COUNTS)}; got {count!r}")
        reshard(model)
        self.model = model
        self.method = method
        self._attachment: Attachment | None = None
        self._finalized = False
        self.skipped: dict[str, str] = {}
        parts: list[Part] = []
        if method.masking is not None:
            parts, self.skipped = parts_of(model, method.masking, include, exclude, groups)
        if compute_soft and not (method.masking is not None and method.masking.solves_every_step):
            raise ValueError(
                "compute_soft is for a method that solves for soft masks after every step, such as Spartan;"
                f" got {method!r}"
            )
        if keep_zeros:
            require_keeps_zeros(method, (part.pattern for part in parts))
        masked_alone = count == "masked" or (method.masking is not None and method.masking.pattern is not None)
        counted = (c.weight for part in parts for c in part.weights) if masked_alone else model.parameters()
        self._counted = sum(weight.numel() for weight in counted)
        self._cost_unit = 1.0
        self._final_costs: dict[str, LayerCost] = {}
        self._final_report: Report | None = None
        self._final_masks: list[PlacedMasks] = []
        self._reported: dict[str, torch.Tensor] = {}
        if costs is not None and parts:
            parts, self._cost_unit = price_parts(parts, costs, model)
        budgets = (
            [] if method.masking is None else mask_groups(model, method.masking, parts, self._counted, compute_soft)
        )
        self._masks = MaskSet(budgets, total_steps)
        if keep_zeros:
            self._masks.start_from_zeros()
        method.start(self._masks)
        self._entries = mask_entries(method, self._masks)
        self._buffers = [name for name, _ in model.named_buffers() if name.rpartition(".")[2].startswith("mask_")]
        ignore_in_ddp(model, self._buffers)
        own(self, self._masks.tensors)
        if (shortfall := method.shortfall(total_steps)) is not None:
            warnings.warn(f"{method.name} with total_steps={total_steps}: {shortfall}", stacklevel=2)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole training."""
        return self._masks.total_steps

    @property
    def step_count(self) -> int:
        """Optimizer steps made so far."""
        return self._masks.step

    @property
    def finalized(self) -> bool:
        """Whether `finalize` has made the model plain."""
        return self._finalized

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
            zeros = sum(tensor.zeros() for tensor in self._masks.tensors)
        else:
            zeros = sum(tensor.size.count - tensor.kept() for tensor in self._masks.tensors)
        return zeros / self._counted if self._counted else 0.0

    def masks(self) -> dict[str, Mask]:
        """The masks now, by name of the weight: soft m and hard h, one entry per block.

        Soft masks are ones for methods without them and once they are merged into the weights.
        """
        self._require_active()
        return {tensor.name: tensor.shown_mask for tensor in self._masks.tensors}

    def masked_weights(self) -> list[nn.Parameter]:
        """The parameters under the masks, which optimizers train."""
        self._require_active()
        return [tensor.weight for tensor in self._masks.tensors]

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

    def report(self) -> Report:
        """The masked weights with their shape, blocks, zeros, share of the cost and change since the last call.

        `print` shows it as a table. With sharded weights all ranks call it, and under tensor parallelism the change is
        that of this rank's part. After `finalize` it is what it was then.
        """
        if self._final_report is not None:
            return self._final_report
        report = Report(
            self.method.name,
            self.step_count,
            self.total_steps,
            self.sparsity,
            self.beta,
            self.frozen,
            layer_reports(self._masks.tensors, self.costs(), self._reported),
            dict(self.skipped),
            why_no_head(self.model),
            dense_products(self._masks.tensors),
        )
        self._reported = {name: mask.hard.clone() for name, mask in self.masks().items()}
        return report

    def copy_masks(self, model: nn.Module) -> None:
        """Give another copy of the model, such as an average of its weights, the masks of now.

        `AveragedModel` brings masks along by itself, unless it averages buffers too (`use_buffers=True`), which makes
        no sense of masks: call this after its `update_parameters`. So do averages of other libraries.

        Args:
            model: a copy that was made while this one was masked, `average.module` for example.

        Raises:
            ValueError: it has no masks where this one has them.
        """
        give_masks(self._placed_masks(), model)

    def finalize_copy(self, model: nn.Module) -> None:
        """Make another copy of the model plain and sparse by the masks of now; after `finalize`, by the final ones.

        For averages of the weights, whether they have masks of their own, right or wrong, or none. A copy that is to
        keep the masks it has, such as one from earlier in training, is finalized by `spartan.finalize(model)`.

        Raises:
            ValueError: it has no weight of the same name and shape where this one has a masked one.
        """
        finalize_by(self._placed_masks(), model)

    def _placed_masks(self) -> list[PlacedMasks]:
        return self._final_masks if self._finalized else placed(self.model, self._masks.tensors)

    def attach(self, *optimizers: torch.optim.Optimizer) -> None:
        """Call `correct_gradients` before and `step` after each step of `optimizers`, until `finalize`.

        Gradients are corrected as `.grad` stands when the optimizer reads it: accumulated, reduced, unscaled and
        clipped; where `step` is given a closure, when that has run. A step that GradScaler skips does not happen, so
        masks do not move; where a fused optimizer skips inside its own step, that is read from the device, unless a
        CUDA graph is captured.

        Several optimizers, up to one for each parameter, each step once after a common backward pass: gradients are
        corrected before the first step and masks move after the last one, in any order. A round in which one is skipped
        moves no masks.

        Args:
            *optimizers: all that train masked weights. Wrappers by Accelerate, Lightning and their like are looked
                into.

        Raises:
            TypeError: not an optimizer. ValueError: it has none of the masked weights; a masked weight that is trained
                is in none of them; an optimizer with many gradients in a step (LBFGS), or steps during backward;
                several, for a method that takes one.
            RuntimeError: attached already, or finalized.
        """
        self._require_active()
        self._require_detached("attach")
        found = unwrapped_optimizers(optimizers)
        if len(found) > 1 and self.method.one_optimizer:
            raise ValueError(
                f"{self.method.name} changes weights for one optimizer's step; got {len(found)} optimizers"
            )
        self._attachment = Attachment(found, self._masks, self._correct, self._advance, self._ready)
        self._masks.optimizers = found

    def correct_gradients(self) -> None:
        """Complete the final `.grad` of the masked weights; by hand, once before `optimizer.step()`.

        Raises:
            RuntimeError: an optimizer is attached, which does this itself, or the model is finalized.
        """
        self._require_active()
        self._require_detached("correct_gradients")
        self._correct()

    def step(self, *optimizers: torch.optim.Optimizer | None) -> None:
        """Set the masks for the next forward pass; by hand, once after `optimizer.step()`, not after a skipped one.

        Args:
            *optimizers: those that made the step, for methods that reset their moments (`SET`, `RigL`, `GSE`) or
                read their learning rates (`WGSEF`).

        Raises:
            RuntimeError: an optimizer is attached, which does this itself, or the model is finalized.
            ValueError: a weight that is not finite, by name (on the CPU), or a method that needs the optimizer
                and has none.
        """
        self._require_active()
        self._require_detached("step")
        known = [optimizer for optimizer in optimizers if optimizer is not None]
        self._masks.optimizers = unwrapped_optimizers(known) if known else ()
        try:
            self._advance()
        finally:
            self._masks.optimizers = ()

    def freeze(self) -> None:
        """Bring the masks to exactly the sparsity asked for and fix them: dropped weights are zero from here on.

        What training does by itself near its end; for a last checkpoint with exact zeros, or an early end.

        Raises:
            ValueError: a weight that is not finite, by name. RuntimeError: finalized already.
        """
        self._require_active()
        self._masks.require_finite()
        self.method.finish(self._masks)

    def finalize(self, *, complete: bool = True) -> None:
        """Apply the masks for good: plain modules again, with exact zeros and exactly the sparsity asked for.

        Exact to one block. Masks that have not reached their sparsity, because training stopped early, are
        brought to it. Copies of the model, such as averages, are finalized by `finalize_copy` or `spartan.finalize`.

        Args:
            complete: False: apply the masks as they are, also where they have not reached their sparsity.

        Raises:
            ValueError: a weight that is not finite, by name. RuntimeError: finalized already.

        Warns:
            UserWarning: no step was made, or too few of `total_steps` for the method to have fixed its masks; a weight
                of which nothing is kept.
        """
        self._require_active()
        self._masks.require_finite()
        if complete:
            self._warn_if_early()
            self.method.finish(self._masks)
        self._final_costs, self._final_report = self.costs(), self.report()
        if emptied := ", ".join(self._final_report.emptied):
            warnings.warn(
                f"finalize() keeps nothing of {emptied}: such a layer is its bias alone. One budget over all layers may"
                " empty some; distribution='uniform' or 'erk' keeps a part of each",
                stacklevel=2,
            )
        self._masks.project()
        self._final_masks = kept(self._placed_masks())
        disown(self._masks.tensors)
        self._masks.remove()
        heed_in_ddp(self.model, self._buffers)
        if self._attachment is not None:
            self._attachment.remove()
        self._attachment = None
        self._masks.optimizers = ()
        self._finalized = True

    def state_dict(self) -> dict[str, Any]:
        """All state, as tensors and plain types: `torch.load(..., weights_only=True)` reads it back.

        With the state of model and optimizer, training resumes bit for bit. Over ranks it is the same on each of them,
        and can be restored on any number; masks that tensor parallelism divides are DTensors, which
        `torch.distributed.checkpoint` saves and loads: it takes a sparsifier as it is.
        """
        self._require_active()
        return state_of(self.method, self._masks, self._entries)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`, which is checked wholly before anything is changed.

        Load the model's weights after the sparsifier is made: some methods begin by zeroing weights.

        Raises:
            ValueError: state of another version, method, setting or model, or incomplete; what differs is
                named.
            RuntimeError: finalized.
        """
        self._require_active()
        capacities = [group.capacity for group in self._masks.groups]
        load_state(check_state(state, self.state_dict(), self._entries, capacities), self._masks)
        self.method.resume(self._masks)

    def _correct(self) -> None:
        self.method.correct_gradients(self._masks)

    def _advance(self) -> None:
        self._masks.step += 1
        try:
            with torch.no_grad():
                self.method.update(self._masks)
        except BaseException:  # also Ctrl-C: a step whose masks were not made is not counted
            self._masks.step -= 1
            raise

    def _warn_if_early(self) -> None:
        masks, name = self._masks, self.method.name
        if masks.frozen or not masks.tensors or masks.step >= _NEARLY_ALL * masks.total_steps:
            return
        if masks.step == 0:
            what = (
                f"finalize() before the first step that {name} knows of prunes the weights as they are; to train with"
                " it, attach(optimizer) before the loop; to prune alone, OneShot(sparsity=..., prune_at=0)"
            )
        else:
            what = (
                f"finalize() after {masks.step} of total_steps={masks.total_steps} steps, when {name} has not fixed its"
                " masks, prunes to the full sparsity at once, without the training that would have made up for it"
            )
        warnings.warn(what, stacklevel=3)

    def _require_active(self) -> None:
        if self._finalized:
            raise RuntimeError("this sparsifier is finalized: its model is plain again; make a new one to go on")
        self._ready()

    def _ready(self) -> None:
        """Work on the parameters that are trained, and only with methods that can."""
        reshard(self.model)
        require_takes_shards(self.method, {tensor.name: tensor.weight for tensor in self._masks.tensors})

    def _require_detached(self, what: str) -> None:
        if self._attachment is not None:
            raise RuntimeError(
                f"{what}: an optimizer is attached, whose step() corrects gradients and moves masks itself"
            )
