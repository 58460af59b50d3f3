"""The settings of a training run: dataclasses read from YAML, in which every key and every type is checked."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

__all__ = [
    "Config",
    "DataConfig",
    "OptimizerConfig",
    "SparsifierConfig",
    "checked",
    "config_from",
    "known_keys",
    "read",
]

TASKS = ("images", "text")
PRECISIONS = ("float32", "bfloat16")
COSTS = ("parameters", "flops")
_LARGEST_SEED = 2**40  # seeds of steps and epochs are multiples of it, in 64 bits
_FLOAT = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+")
# What may differ between a checkpoint and the run that goes on from it: nothing that changes the result.
_FREE = ("out", "checkpoint_minutes", "log_every")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train on.

    Attributes:
        folder: images: the four idx files of a data set like Fashion-MNIST; text: any folder. None: Fashion-MNIST from
            wherever this machine has it; the running Python's standard library source.
        limit: only so many of the training images, or bytes of text.
        evaluation_limit: the same for what is evaluated on.
        pattern: names of the files that are text.
    """

    folder: str | None = None
    limit: int | None = None
    evaluation_limit: int | None = None
    pattern: str = "*.py"

    def __post_init__(self) -> None:
        for name in ("limit", "evaluation_limit"):
            value = getattr(self, name)
            if value is not None:
                _require_at_least(f"data.{name}", value, 1)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW: learning rate up over `warmup` of the steps, then down to zero along a cosine.

    Attributes:
        learning_rate, weight_decay: of AdamW. warmup: fraction of the steps.
        clip: largest norm of the gradient; None: as it is.
    """

    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    warmup: float = 0.1
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        _require_at_least("optimizer.learning_rate", self.learning_rate, 0)
        _require_at_least("optimizer.weight_decay", self.weight_decay, 0)
        if not 0 <= self.warmup < 1:
            raise ValueError(f"optimizer.warmup must be in [0, 1); got {self.warmup}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"optimizer.clip must be above 0, or null; got {self.clip}")


@dataclass(frozen=True, kw_only=True)
class SparsifierConfig:
    """Which weights are masked: `include`, `exclude` and `count` of `spartan.Sparsifier`, the first two by name.

    Attributes:
        costs: what `sparsity` is a fraction of: "parameters", or "flops" of the masked weights in a forward pass.
    """

    include: str | tuple[str, ...] | None = None
    exclude: str | tuple[str, ...] | None = None
    count: str = "masked"
    costs: str = "parameters"

    def __post_init__(self) -> None:
        _require_one_of("sparsifier.costs", self.costs, COSTS)


@dataclass(frozen=True, kw_only=True)
class Config:
    """A training run.

    Attributes:
        task: "images" or "text".
        model: its `name` ("mlp", "cnn" or "vit" for images, "gpt" for text) and its sizes.
        method: `name` of one of `spartan.methods` and its settings.
        steps: optimizer steps. batch_size: images or stretches of text in each, over all processes.
        seed: of the weights and the order of the data, in [-2**40, 2**40].
        precision: "float32", or "bfloat16" for autocast.
        device: "cpu", "cuda", ..., or "auto" for a GPU where there is one. threads: of PyTorch on the CPU.
        evaluate_every: steps; None: at the end only. log_every: steps between two records.
        checkpoint_minutes: between two checkpoints. out: the folder for everything that the run leaves.

    Raises:
        ValueError: a setting outside its range, named.
    """

    task: str
    model: dict[str, Any]
    method: dict[str, Any]
    steps: int
    batch_size: int
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sparsifier: SparsifierConfig = field(default_factory=SparsifierConfig)
    seed: int = 0
    precision: str = "float32"
    device: str = "auto"
    threads: int | None = None
    evaluate_every: int | None = None
    log_every: int = 10
    checkpoint_minutes: float = 5.0
    out: str = "spartan-run"

    def __post_init__(self) -> None:
        for name, allowed in (("task", TASKS), ("precision", PRECISIONS)):
            _require_one_of(name, getattr(self, name), allowed)
        for name in ("steps", "batch_size", "log_every", "threads", "evaluate_every"):
            value = getattr(self, name)
            if value is not None:
                _require_at_least(name, value, 1)
        _require_at_least("checkpoint_minutes", self.checkpoint_minutes, 0)
        if abs(self.seed) > _LARGEST_SEED:
            raise ValueError(f"seed must be in [-2**40, 2**40]; got {self.seed}")
        for name in ("model", "method"):
            if not isinstance(getattr(self, name).get("name"), str):
                raise ValueError(f"{name} must have a name; got {getattr(self, name)!r}")

    def result_settings(self) -> dict[str, Any]:
        """The settings that the result depends on, as plain types by dotted name: a checkpoint must agree on them."""
        return _flat({key: value for key, value in asdict(self).items() if key not in _FREE})


def read(path: Path, changes: Sequence[str] = ()) -> Config:
    """Read a YAML file, with `changes` such as "steps=20" and "data.limit=512" to it.

    Raises:
        ImportError: PyYAML is not installed. OSError: the file cannot be read.
        ValueError, TypeError: not YAML, an unknown key (the nearest known one is named), a value of the wrong type or
            outside its range; the message names the file.
    """
    text = path.read_text(encoding="utf-8")
    try:
        settings = _parse(text)
        if not isinstance(settings, dict):
            raise ValueError(f"must be a mapping of settings; got {settings!r}")
        for change in changes:
            _apply(settings, change)
        return config_from(settings)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{path}: {error}") from error


def config_from(settings: Mapping[str, Any]) -> Config:
    """Make a `Config` of plain types; raises as `read`."""
    return Config(**checked(Config, settings, ""))


def checked(maker: Callable[..., Any], settings: Any, path: str, skip: Collection[str] = ()) -> dict[str, Any]:
    """The keywords for a dataclass, class or function that `settings` give, each checked against its annotation.

    Args:
        maker: what the keywords are for.
        settings: values by name.
        path: dotted name of `settings` for messages.
        skip: parameters that are not settings.

    Raises:
        TypeError, ValueError: an unknown, missing or wrong setting, named.
    """
    if not isinstance(settings, Mapping):
        raise TypeError(f"{path or 'settings'} must be a mapping; got {settings!r}")
    if is_dataclass(maker):
        hints = get_type_hints(maker)
        for entry in fields(maker):
            if entry.default is entry.default_factory is MISSING and entry.name not in settings:
                raise ValueError(f"{_dotted(path, entry.name)} is missing")
    else:
        hints = get_type_hints(maker.__dict__["__init__"] if isinstance(maker, type) else maker)
    known_keys(settings, [name for name in hints if name not in (*skip, "return")], path)
    return {key: _convert(value, hints[key], _dotted(path, key)) for key, value in settings.items()}


def known_keys(settings: Mapping[str, Any], known: Collection[str], path: str) -> None:
    """Raise ValueError at the first key that is not known, with the nearest that is."""
    for key in settings:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1, 0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"unknown setting {_dotted(path, str(key))!r}; {hint}")


def _convert(value: Any, hint: Any, name: str) -> Any:
    """`value` as the annotation wants it: ints as floats, lists as tuples, mappings as dataclasses."""
    if get_origin(hint) in (Union, UnionType):
        options = get_args(hint)
        if value is None and NoneType in options:
            return None
        for option in options:
            try:
                return _convert(value, option, name)
            except (TypeError, ValueError):
                continue
        raise TypeError(f"{name} must be {_spoken(hint)}; got {value!r}")
    if get_origin(hint) is tuple and isinstance(value, (list, tuple)):
        inner = get_args(hint)
        each = [inner[0]] * len(value) if len(inner) == 2 and inner[1] is ... else list(inner)
        if len(each) == len(value):
            return tuple(_convert(v, h, f"{name}[{i}]") for i, (v, h) in enumerate(zip(value, each, strict=True)))
    elif isinstance(hint, type) and is_dataclass(hint):
        return hint(**checked(hint, value, name))
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif hint is Any or ((get_origin(hint) or hint) in (dict, Mapping) and isinstance(value, dict)):
        return value
    elif hint in (int, str, bool) and type(value) is hint:
        return value
    raise TypeError(f"{name} must be {_spoken(hint)}; got {value!r}")


def _spoken(hint: Any) -> str:
    names = {NoneType: "null", int: "an int", float: "a number", str: "a text", bool: "true or false"}
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_spoken(option) for option in get_args(hint))
    if get_origin(hint) is tuple:
        return f"a list, each {_spoken(get_args(hint)[0])}"
    return names.get(hint, "a mapping")


def _parse(text: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError(f"{error.name} is needed for YAML: pip install 'spartan-kernels[train]'") from error

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no annotations
        """Refuses a key given twice, and reads 2e-3 as a number, as YAML 1.2 does."""

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        loader.flatten_mapping(node)
        pairs = [(loader.construct_object(k, deep=True), loader.construct_object(v, deep=True)) for k, v in node.value]
        if len(dict(pairs)) < len(pairs):
            raise ValueError(f"a key is there twice among {', '.join(str(key) for key, _ in pairs)}")
        return dict(pairs)

    Loader.add_constructor("tag:yaml.org,2002:map", mapping)
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"is not YAML: {error}") from error


def _apply(settings: dict[str, Any], change: str) -> None:
    key, equals, value = change.partition("=")
    if not equals or not key:
        raise ValueError(f"a change must be KEY=VALUE, such as steps=20 or data.limit=512; got {change!r}")
    *parents, last = key.split(".")
    for parent in parents:
        settings = settings.setdefault(parent, {})
        if not isinstance(settings, dict):
            raise ValueError(f"{key!r} cannot be set: {parent!r} is not a mapping")
    try:
        settings[last] = _parse(value)
    except ValueError:
        settings[last] = value  # text such as *.md, which YAML wants in quotes


def _flat(settings: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, _dotted(path, key)))
        else:
            flat[_dotted(path, key)] = list(value) if isinstance(value, tuple) else value
    return flat


def _dotted(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _require_one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


def _require_at_least(name: str, value: float, low: float) -> None:
    if not (math.isfinite(value) and value >= low):
        raise ValueError(f"{name} must be at least {low}; got {value}")
