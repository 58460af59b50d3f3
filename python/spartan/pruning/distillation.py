"""Train a sparse model to give what the dense one gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from spartan.methods.base import require_number
from spartan.nn.wrappers import named_owners
from spartan.pruning.forwards import Call, call_with

__all__ = ["Distillation", "Distilled", "distill"]

_OUTPUTS = ("logits", "last_hidden_state")  # of what Hugging Face's models return, in this order


class Distilled(NamedTuple):
    """The loss of a batch, and what the student returned for it."""

    loss: Tensor
    output: Any


def distill(
    student: nn.Module,
    teacher: nn.Module,
    *,
    loss: str | Callable[[Tensor, Tensor], Tensor] = "mse",
    temperature: float = 1.0,
    hidden: str | Sequence[str] = (),
    hidden_weight: float = 1.0,
    of: Callable[[Any], Tensor] | None = None,
    call: Call | None = None,
) -> Distillation:
    """The loss of a sparse model against the outputs of the dense one, and its hidden states where they are named.

        loss = d(s, t) + hidden_weight * mean over modules of ||s_l - t_l||^2 / ||t_l||^2

    with s and t what student and teacher give, and d one of

        "mse":      ||s - t||^2 / ||t||^2
        "cosine":   mean of 1 - <s, t> / (||s|| ||t||), along the last dimension
        "kl":       T^2 * mean of KL(softmax(t / T) || softmax(s / T)), along the last dimension

    The student runs as it is, so masks of a `Sparsifier` are in the loss; the teacher runs in evaluation mode and
    without gradients.

    Args:
        student: what is trained.
        teacher: the dense model, such as a `copy.deepcopy` from before the pruning.
        loss: d, by name, or a function (of the student's, of the teacher's) -> loss.
        temperature: T, of "kl".
        hidden: names of modules, or patterns ("encoder.layer.*"), whose first output counts too.
        hidden_weight: of these.
        of: which tensor of an output counts, a function; None: the tensor, `logits` or `last_hidden_state` of an
            output with names, else the first tensor.
        call: a function (model, batch) that runs a model, for batches that it does not take as they are; as in `prune`.

    Returns:
        A function of a batch that gives `loss` and the student's `output`.

    Raises:
        TypeError, ValueError: an argument of the wrong type or outside its range, named; a student and a teacher that
            share parameters; a pattern that names no module of both.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, for "kl".

    Example::

        teacher = copy.deepcopy(model)
        spartan.prune(model, spartan.OBS(sparsity=0.8), batches)
        distillation = spartan.distill(model, teacher)
        for batch in batches:
            distillation(batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    """
    return Distillation(student, teacher, loss, temperature, hidden, hidden_weight, of, call or call_with)


class Distillation:
    """Call it with a batch, see `distill`."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        loss: str | Callable[[Tensor, Tensor], Tensor],
        temperature: float,
        hidden: str | Sequence[str],
        hidden_weight: float,
        of: Callable[[Any], Tensor] | None,
        call: Call,
    ) -> None:
        for name, model in (("student", student), ("teacher", teacher)):
            if not isinstance(model, nn.Module):
                raise TypeError(f"{name} must be a torch.nn.Module; got {type(model).__name__}")
        own = {id(parameter) for parameter in student.parameters()}
        shared = [name for name, parameter in teacher.named_parameters() if id(parameter) in own]
        if shared:
            raise ValueError(
                f"teacher must have parameters of its own; it shares {shared[0]!r} with the student: take a"
                " copy.deepcopy of the dense model before it is pruned"
            )
        if not callable(loss) and loss not in _LOSSES:
            raise ValueError(f"loss must be one of {', '.join(_LOSSES)}, or a function of two tensors; got {loss!r}")
        require_number("temperature", temperature, 0.0)
        require_number("hidden_weight", hidden_weight, 0.0)
        if temperature == 0:
            raise ValueError("temperature must be above 0; got 0")
        self.student, self.teacher = student, teacher
        self.hidden = _chosen([hidden] if isinstance(hidden, str) else list(hidden), student, teacher)
        self._loss = loss if callable(loss) else _LOSSES[loss]
        self._with_temperature = loss == "kl"
        self._temperature, self._hidden_weight = float(temperature), float(hidden_weight)
        self._of, self._call = of or _main_tensor, call

    def __call__(self, batch: Any) -> Distilled:
        """Run both models on a batch."""
        with _evaluation(self.teacher), torch.no_grad(), _recorded(self.teacher, self.hidden) as wanted:
            target = self._of(self._call(self.teacher, batch))
        with _recorded(self.student, self.hidden) as found:
            output = self._call(self.student, batch)
        given = self._of(output)
        if self._with_temperature:
            loss = self._temperature**2 * self._loss(given / self._temperature, target / self._temperature)
        else:
            loss = self._loss(given, target)
        if self.hidden:
            each = [_relative(found[name], wanted[name]) for name in self.hidden]
            loss = loss + self._hidden_weight * torch.stack(each).mean()
        return Distilled(loss, output)


def _relative(found: Tensor, wanted: Tensor) -> Tensor:
    wide = torch.promote_types(found.dtype, torch.float32)
    energy = wanted.to(wide).square().sum()
    return (found.to(wide) - wanted.to(wide)).square().sum() / energy.clamp(min=torch.finfo(wide).tiny)


def _cosine(found: Tensor, wanted: Tensor) -> Tensor:
    return (1 - functional.cosine_similarity(found.float(), wanted.float(), dim=-1)).mean()


def _divergence(found: Tensor, wanted: Tensor) -> Tensor:
    logs = functional.log_softmax(found.float(), -1), functional.log_softmax(wanted.float(), -1)
    return functional.kl_div(*logs, log_target=True, reduction="none").sum(-1).mean()


_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": _relative, "cosine": _cosine, "kl": _divergence}


def _main_tensor(output: Any) -> Tensor:
    """The tensor of an output that counts."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        name = next((name for name in _OUTPUTS if name in output), None)
        if name is not None:
            return output[name]
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    raise TypeError(f"of must say which tensor of the output counts; the model gives {type(output).__name__}")


def _chosen(patterns: Sequence[str], student: nn.Module, teacher: nn.Module) -> list[str]:
    """Names of modules, of the plain models, that match and that both have."""
    both = [name for name in _modules(teacher) if name in _modules(student)]
    chosen: dict[str, None] = {}
    for pattern in patterns:
        found = [name for name in both if fnmatchcase(name, pattern)]
        if not found:
            raise ValueError(f"hidden names {pattern!r}, which is no module of both models")
        chosen.update(dict.fromkeys(found))
    return list(chosen)


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """By name in the plain model; of a wrapper and what it wraps, the latter."""
    return {name: owners[-1] for name, owners in named_owners(model) if name}


@contextmanager
def _recorded(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """The last output of each of these modules."""
    found: dict[str, Tensor] = {}
    modules = _modules(model) if names else {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[name] = _main_tensor(output)

        return hook

    handles = [modules[name].register_forward_hook(keep(name)) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"hidden names {missing[0]!r}, which the model does not call")


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
