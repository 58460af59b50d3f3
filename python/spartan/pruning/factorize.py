"""Replace trained linear layers by a dictionary and sparse coefficients, layer by layer, with calibration batches."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from spartan.nn.selection import Candidate, Selector, find_weights, select_linear_layers, skipped_weights
from spartan.pruning.cospadi import CoSpaDi, Factors
from spartan.pruning.forwards import Call, Forwards, call_with, list_of
from spartan.pruning.layers import Layer, require_plain
from spartan.pruning.statistics import collected
from spartan.saving.packing import replace_modules
from spartan.saving.tables import text_table
from spartan.training.progress import Progress

__all__ = ["FactorizationResult", "FactorizedLayer", "FactorizedLinear", "factorize", "to_factorized"]


class FactorizedLinear(nn.Sequential):
    """y = C (D x) + b: two `nn.Linear`, `dictionary` D [atoms, in] and `coefficients` C [out, atoms], mostly zeros.

    The coefficients are an ordinary sparse weight: `to_block_sparse` packs them, a file leaves their zeros out, and
    `Sparsifier` trains what is left of them with `keep_zeros=True`.
    """

    dictionary: nn.Linear
    coefficients: nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        atoms: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        self.add_module("dictionary", nn.Linear(in_features, atoms, bias=False, **kind))
        self.add_module("coefficients", nn.Linear(atoms, out_features, bias=bias, **kind))
        self.in_features, self.out_features, self.atoms = in_features, out_features, atoms

    @property
    def weight(self) -> torch.Tensor:
        """C D [out, in], differentiable."""
        return self.coefficients.weight @ self.dictionary.weight


@dataclass(frozen=True)
class FactorizedLayer:
    """A layer that was replaced.

    Attributes:
        name: of the layer. shape: of its weight. atoms: of the dictionary. nonzeros: coefficients of each output.
        remains: numbers that are stored, as a fraction of those of the weight.
        error: squared error of its outputs on the calibration inputs, as a fraction of their squares.
        seconds: that it took, with the runs of the model up to it.
    """

    name: str
    shape: tuple[int, int]
    atoms: int
    nonzeros: int
    remains: float
    error: float
    seconds: float


@dataclass(frozen=True, repr=False)
class FactorizationResult:
    """The model and its replaced layers in the order in which the model calls them; `print` shows a table.

    Attributes:
        model: the one given, or what replaces it where it is a linear layer itself.
        rows: one for each replaced layer. skipped: why the other parameters are as they were, by name.
    """

    model: nn.Module
    rows: tuple[FactorizedLayer, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def remains(self) -> float:
        """Numbers that are stored, as a fraction of those of the weights."""
        numbers = [row.shape[0] * row.shape[1] for row in self.rows]
        return sum(row.remains * number for row, number in zip(self.rows, numbers, strict=True)) / sum(numbers)

    @property
    def atoms(self) -> dict[str, int]:
        """Of each replaced layer, by name: what `to_factorized` needs to make the same structure."""
        return {row.name: row.atoms for row in self.rows}

    def __str__(self) -> str:
        rows = [
            (
                row.name,
                "x".join(map(str, row.shape)),
                str(row.atoms),
                str(row.nonzeros),
                f"{row.remains:.1%}",
                f"{row.error:.2%}",
                f"{row.seconds:.2f}",
            )
            for row in self.rows
        ]
        title = f"CoSpaDi: {self.remains:.1%} of the numbers of {len(rows)} weights remain"
        return text_table(title, ("layer", "shape", "atoms", "nonzeros", "remains", "error", "seconds"), rows)

    __repr__ = __str__


def factorize(
    model: nn.Module,
    method: CoSpaDi,
    batches: Iterable[Any],
    *,
    include: Selector | None = None,
    exclude: Selector | None = None,
    call: Call | None = None,
    progress: bool | None = None,
) -> FactorizationResult:
    """Replace linear layers of a trained model by `FactorizedLinear`, in place, in one pass over them.

    Layers are taken in the order in which the model calls them, and later ones see the outputs of those before as they
    are now, as in `prune`. The products of a layer's inputs are in memory for one layer at a time, in float32 at least.

    Args:
        model: with layers of the exact type `nn.Linear`.
        method: how much, and how.
        batches: calibration inputs, as in `prune`.
        include: names of weights, types or functions of (name, module), as for `Sparsifier`; by default every
            `nn.Linear` but the last, the head, that shares its weight with nothing and is called by its owner.
        exclude: the same, taken from the choice.
        call: a function (model, batch) that runs the model, for batches that it does not take as they are.
        progress: show how far it is; None: where a person watches.

    Raises:
        TypeError: a model, method or batch of the wrong type. ValueError: nothing to replace, a layer too small for the
            compression, no batches, a layer that is never called, weights or inputs that are not finite. The model is
            as it was then, but for inputs that are no longer finite by what was replaced before.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    if not isinstance(method, CoSpaDi):
        raise TypeError(f"method must be one such as spartan.CoSpaDi(compression=0.4); got {method!r}")
    given = list_of(batches)
    weights = find_weights(model)
    chosen = select_linear_layers(model, weights, include, exclude)
    skipped = skipped_weights(model, weights, chosen, include, exclude)
    for candidate in chosen:
        method.sizes(*candidate.weight.shape)
    layers = [Layer(candidate, (1, 1)) for candidate in chosen]
    require_plain(layers)
    shown = sys.stdout.isatty() if progress is None else progress
    found: dict[int, tuple[Factors, float]] = {}
    before = [layer.values().clone() for layer in layers]
    with (
        Forwards(model, given, layers, call or call_with) as forwards,
        Progress(len(layers), 0, shown=shown, label="factorizing") as bar,
    ):
        if forwards.unseen:
            unseen = {layers[index].name: reason for index, reason in forwards.unseen.items()}
            raise ValueError(f"the inputs of some weights are not seen: {unseen}; leave them out with exclude=")
        try:
            _factor_all(method, layers, forwards, found, bar)
        except BaseException:
            for layer, values in zip(layers, before, strict=True):
                layer.write(values)
            raise
    rows = [_row(layers[index], factors, seconds) for index, (factors, seconds) in found.items()]
    replacements = {
        id(layers[index].candidate.uses[0].module): _replacing(layers[index].candidate, factors)
        for index, (factors, _) in found.items()
    }
    return FactorizationResult(replace_modules(model, replacements), tuple(rows), skipped)


def to_factorized(model: nn.Module, atoms: Mapping[str, int]) -> nn.Module:
    """Give linear layers the structure that `factorize` gave them, in place, so that a saved model can be loaded.

    Args:
        model: as it was before it was factorized.
        atoms: of each layer, by name: `FactorizationResult.atoms`.

    Returns:
        `model`, or its replacement where it is an `nn.Linear` itself. The new parameters are not those of the old.

    Raises:
        ValueError: a name that is no linear layer of the model.
    """
    modules = dict(model.named_modules())
    replacements: dict[int, nn.Module] = {}
    for name, number in atoms.items():
        layer: Any = modules.get(name)
        if type(layer) is not nn.Linear:
            raise ValueError(f"atoms has {name!r}, which is no nn.Linear of the model")
        replacements[id(layer)] = _empty(layer, number)
    return replace_modules(model, replacements)


def _factor_all(
    method: CoSpaDi, layers: list[Layer], forwards: Forwards, found: dict[int, tuple[Factors, float]], bar: Progress
) -> None:
    for stop in forwards.stops:
        begun = time.perf_counter()
        seen = collected(forwards.inputs(stop), layers[stop[0]].name, products=True)
        seen.settle()
        for index in stop:
            layer = layers[index]
            factors = method.factor(layer.values(), seen, layer.name)
            dtype = layer.values().dtype
            layer.write((factors.coefficients.to(dtype) @ factors.dictionary.to(dtype)).to(dtype))
            found[index] = factors, time.perf_counter() - begun
            begun = time.perf_counter()
            bar.update(len(found), lambda layer=layer: layer.name)  # type: ignore[misc]
        forwards.finish(stop)


def _row(layer: Layer, factors: Factors, seconds: float) -> FactorizedLayer:
    out, in_ = layer.shape
    atoms = len(factors.dictionary)
    nonzeros = int(factors.coefficients.count_nonzero(1).max())
    remains = (atoms * in_ + int(factors.coefficients.count_nonzero())) / (out * in_)
    name = layer.name.removesuffix("weight").removesuffix(".")
    return FactorizedLayer(name, (out, in_), atoms, nonzeros, remains, factors.error, seconds)


def _empty(layer: nn.Linear, atoms: int) -> FactorizedLinear:
    kind: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    made = FactorizedLinear(layer.in_features, layer.out_features, atoms, layer.bias is not None, **kind)
    return made.train(layer.training)


def _replacing(candidate: Candidate, factors: Factors) -> FactorizedLinear:
    layer: Any = candidate.uses[0].module
    made = _empty(layer, len(factors.dictionary))
    with torch.no_grad():
        made.dictionary.weight.copy_(factors.dictionary)
        made.coefficients.weight.copy_(factors.coefficients)
    if layer.bias is not None:
        made.coefficients.bias = layer.bias
    return made
