"""The calibration forwards: in which order layers are called, and what goes into one of them, again and again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from spartan.budgets import one_forward
from spartan.pruning.layers import Layer
from spartan.pruning.outputs import Outputs
from spartan.pruning.watches import Watch, watch_of

__all__ = ["Call", "Forwards", "call_with", "list_of"]

Call = Callable[[nn.Module, Any], Any]
_UNIT = 8  # stops in a module that is run as one: fewer outputs are kept, and it is cheap enough to begin again


class _Reached(BaseException):
    """The last call that was waited for is made: no error, and no `except Exception` of a model may take it for one."""


def call_with(model: nn.Module, batch: Any) -> Any:
    """Call a model with a batch: a mapping by name, a tuple or list by position, anything else as the only argument.

    Raises:
        TypeError: the model does not take so many arguments.
    """
    if isinstance(batch, Mapping):
        return model(**batch)
    if not isinstance(batch, (tuple, list)):
        return model(batch)
    try:
        inspect.signature(model.forward).bind(*batch)
    except TypeError as error:
        raise TypeError(
            f"batches: the model does not take {len(batch)} arguments, as a batch has ({error}); say how it is called,"
            " call=lambda model, batch: model(batch[0]) for example"
        ) from None
    return model(*batch)


class _Arrival(NamedTuple):
    """A call of a layer: which, how its inputs are read, and the tensor."""

    layer: int
    watch: Watch
    tensor: torch.Tensor


def list_of(batches: Iterable[Any]) -> list[Any]:
    """All batches of an iterable.

    Raises:
        TypeError: something else. ValueError: there is none.
    """
    if isinstance(batches, (str, Mapping)) or not isinstance(batches, Iterable):
        kind = type(batches).__name__
        raise TypeError(f"batches must be an iterable of batches, such as a list or a loader; got {kind}")
    found = list(batches)
    if not found:
        raise ValueError("batches must have at least one batch; got none (an iterator that was used before is empty)")
    return found


class Forwards:
    """Runs a model on its calibration batches up to one layer after another, in the order in which it calls them.

    A module whose layers are all done is not run again: it gives the output of its last run, of which a copy is kept
    for each batch as long as something reads it (`Outputs`). A model of blocks so runs each block about as often as
    that has stops, and none of those before.
    Modules with up to eight stops are run as a whole. Layers that are called with the same tensor, such as the
    projections of an attention, are one stop.

    Attributes:
        stops: indices of the layers that are reached together, in order. unseen: why others never are, by index.
        outputs: of modules that are done.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Any], layers: Sequence[Layer], call: Call) -> None:
        self._model, self._batches, self._layers, self._call = model, batches, layers, call
        self.stops: list[list[int]] = []
        self.unseen: dict[int, str] = {}
        self._watches: dict[int, list[Watch]] = {}
        self._calls: list[dict[int, int]] = []  # of each batch: how often each layer is called
        self._inner: dict[nn.Module, set[int]] = {}  # the layers in a module
        self._outer: dict[nn.Module, set[nn.Module]] = {}  # the modules that a module is in
        self._repeated: set[nn.Module] = set()  # called more than once in a forward
        self._done: set[int] = set()
        self._reading: set[nn.Module] = set()
        self._open = ExitStack()
        self.outputs = Outputs(self._outer)

    def __enter__(self) -> Forwards:
        with self._open:
            self._open.enter_context(one_forward(self._model))
            self._open.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code calls no hooks
            self._place()
            self._find_order()
            self._open = self._open.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self.restart()
        self._open.close()

    def restart(self) -> None:
        """Take no layer as done any more."""
        self.outputs.clear()
        self._done.clear()

    def inputs(self, stop: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
        """What the layers of a stop are called with now: number of the batch, inputs [groups, rows, kernel * in]."""
        for batch, calls in enumerate(self._calls):
            missing = calls.get(stop[0], 0)
            arrived: list[_Arrival] = []

            def take(arrival: _Arrival, missing: int = missing, arrived: list[_Arrival] = arrived) -> None:
                arrived.append(arrival if missing == 1 else arrival._replace(tensor=arrival.tensor.clone()))
                if len(arrived) == missing:
                    raise _Reached

            if missing:
                self._run(batch, stop[:1], take)
            for arrival in arrived:
                for rows in arrival.watch.rows(arrival.tensor):
                    yield batch, rows

    def finish(self, stop: Sequence[int]) -> None:
        """Take the layers of a stop as done: modules that have no others are not run again."""
        self._done.update(stop)
        for module, inner in self._inner.items():
            if module not in self.outputs and inner <= self._done and self._worth_keeping(module):
                self.outputs.replay(module)

    def _place(self) -> None:
        """Where the layers are, and how their inputs are seen."""
        for index, layer in enumerate(self._layers):
            watches = [watch_of(use) for use in layer.candidate.uses]
            kinds = [type(use.module).__name__ for use, w in zip(layer.candidate.uses, watches, strict=True) if not w]
            if kinds:
                self.unseen[index] = f"the inputs of {kinds[0]} cannot be seen"
                continue
            self._watches[index] = [watch for watch in watches if watch]
            for use in layer.candidate.uses:
                for depth, module in enumerate(use.owners):
                    self._inner.setdefault(module, set()).add(index)
                    self._outer.setdefault(module, set()).update(use.owners[:depth])

    def _find_order(self) -> None:
        """Run every batch once, and see which layers are called, how often, and with the same tensors."""
        order: dict[int, None] = {}
        together: dict[int, int] = {}  # a layer and the one before it that had the same tensor
        for batch in range(len(self._batches)):
            calls: dict[int, int] = {}
            last: list[tuple[_Arrival, int]] = []

            def take(now: _Arrival, batch: int = batch, calls: Any = calls, last: Any = last) -> None:
                self._require_finite(now, batch)
                if last and now.layer not in order and _same_inputs(last[0], now):
                    together[now.layer] = last[0][0].layer
                order[now.layer] = None
                calls[now.layer] = calls.get(now.layer, 0) + 1
                last[:] = [(now, now.tensor._version)]

            with self._counting(), nullcontext() if batch else self.outputs.watching():
                self._run(batch, list(self._watches), take)
            self._calls.append(calls)
        repeated = {layer for calls in self._calls for layer, count in calls.items() if count > 1}
        for layer in order:
            before = together.get(layer)
            if before is not None and before in self.stops[-1] and not {layer, before} & repeated:
                self.stops[-1].append(layer)
            else:
                self.stops.append([layer])
        for index in self._watches:
            if index not in order:
                self.unseen[index] = "no batch reaches it"

    def _require_finite(self, now: _Arrival, batch: int) -> None:
        if not bool(now.tensor.isfinite().all()):
            raise ValueError(
                f"batches must make finite inputs; batches[{batch}] makes some of {self._layers[now.layer].name!r} NaN"
                " or infinite"
            )

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """Note the modules that are called more than once."""
        counts: dict[nn.Module, int] = {}

        def count(module: nn.Module, _: Any) -> None:
            if module not in self._reading:
                counts[module] = counts.get(module, 0) + 1

        handles = [module.register_forward_pre_hook(count) for module in self._inner]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        self._repeated |= {module for module, number in counts.items() if number > 1}

    def _run(self, batch: int, layers: Sequence[int], take: Callable[[_Arrival], None]) -> None:
        """Run a batch and `take` what these layers are called with."""
        self.outputs.batch = batch
        with ExitStack() as hooks:
            for index in layers:
                for watch in self._watches[index]:
                    hook = self._hook(index, watch, take)
                    hooks.callback(watch.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            try:
                self._call(self._model, self._batches[batch])
            except _Reached:
                pass

    def _hook(self, index: int, watch: Watch, take: Callable[[_Arrival], None]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module in self._reading:
                return
            self._reading.add(module)  # which may call it once more
            try:
                tensor = watch.read(args, kwargs)
            finally:
                self._reading.remove(module)
            take(_Arrival(index, watch, tensor.detach() if tensor.requires_grad else tensor))

        return hook

    def _worth_keeping(self, module: nn.Module) -> bool:
        """Whether it is called once, and neither the model nor in a module that is run as one."""
        return (
            module not in self._repeated
            and bool(self._outer[module])
            and all(self._stops_in(outer) > _UNIT for outer in self._outer[module] if outer not in self._repeated)
        )

    def _stops_in(self, module: nn.Module) -> int:
        """How many stops there are in a module; in one that is never called, as in no module at all."""
        if isinstance(module, nn.ModuleList):
            return _UNIT + 1
        return sum(not self._inner[module].isdisjoint(stop) for stop in self.stops)


def _same_inputs(before: tuple[_Arrival, int], now: _Arrival) -> bool:
    """Whether two calls have one tensor, which nothing wrote to in between, laid out alike."""
    then, version = before
    return then.tensor is now.tensor and now.tensor._version == version and then.watch.layout == now.watch.layout
