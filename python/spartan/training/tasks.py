"""What is trained: the data of a task, the models that fit it, its batches and its figures of merit."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spartan import methods
from spartan.methods import Method
from spartan.methods.base import SparseMethod
from spartan.training.config import Config, checked, known_keys
from spartan.training.images import ImageData, load_data
from spartan.training.models import ByteTransformer, ResidualNetwork, VisionTransformer, multilayer_perceptron
from spartan.training.text import TextData, load_text

__all__ = ["ImageTask", "Slice", "Task", "TextTask", "make_method", "make_model", "make_task"]

EVALUATION_BATCH = 500


@dataclass(frozen=True)
class Slice:
    """Which part of each batch is this process's: every `of`-th example from the `index`-th on."""

    index: int = 0
    of: int = 1


class Task(ABC):
    """A kind of model and data; its batches depend on seed and step alone, so a run can go on at any step."""

    models: dict[str, Callable[..., nn.Module]]

    @property
    def given(self) -> dict[str, Any]:
        """What the data says of the model."""
        return {}

    def model(self, settings: dict[str, Any]) -> nn.Module:
        """Make the model that the settings name.

        Raises:
            ValueError, TypeError: an unknown model or setting, with the nearest; a size that does not fit.
        """
        return make_model(self.models, settings, self.given)

    @property
    @abstractmethod
    def description(self) -> str:
        """One line on the data."""

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """All data, in an order that does not change."""

    def fingerprint(self) -> str:
        """SHA-256 of the data."""
        digest = hashlib.sha256()
        for tensor in self.tensors():
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()

    @abstractmethod
    def batch(self, step: int, size: int, seed: int, part: Slice) -> tuple[Tensor, Tensor]:
        """This process's part of the batch of a step: inputs and targets on the CPU."""

    @abstractmethod
    def held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches to evaluate on."""

    @abstractmethod
    def metrics(self, loss: float, accuracy: float) -> dict[str, float]:
        """Name the mean loss and the fraction of right predictions on `held_out`."""

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy."""
        return F.cross_entropy(model(inputs).flatten(0, -2).float(), targets.flatten())

    @torch.no_grad()
    def score(self, model: nn.Module, device: torch.device, part: Slice) -> Tensor:
        """Sum of losses, number of right predictions and number of all over this process's held-out batches."""
        total = torch.zeros(3, dtype=torch.float64, device="cpu")
        model.eval()
        for index, (inputs, targets) in enumerate(self.held_out()):
            if index % part.of != part.index:
                continue
            logits = model(inputs.to(device)).flatten(0, -2).float()
            wanted = targets.to(device).flatten()
            loss = F.cross_entropy(logits, wanted, reduction="sum")
            right = (logits.argmax(-1) == wanted).sum()
            total += total.new_tensor([float(loss), float(right), float(len(wanted))])
        return total


class ImageTask(Task):
    """Classification of images."""

    models = {"mlp": multilayer_perceptron, "cnn": ResidualNetwork, "vit": VisionTransformer}  # noqa: RUF012

    def __init__(self, data: ImageData, batch_size: int) -> None:
        self.data = data
        self.per_epoch = len(data.train_labels) // batch_size
        if self.per_epoch < 1:
            raise ValueError(f"batch_size {batch_size} is larger than the {len(data.train_labels)} training images")

    @property
    def given(self) -> dict[str, Any]:
        """Pixels on a side, classes."""
        return {"side": self.data.side, "classes": self.data.classes}

    @property
    def description(self) -> str:
        """Name, size and place."""
        data = self.data
        counts = f"{len(data.train_labels):,} training and {len(data.test_labels):,} test images"
        return f"{data.name}, {counts} of {data.side}x{data.side}, from {data.source}"

    def tensors(self) -> list[Tensor]:
        """Images and labels."""
        data = self.data
        return [data.train_images, data.train_labels, data.test_images, data.test_labels]

    def batch(self, step: int, size: int, seed: int, part: Slice) -> tuple[Tensor, Tensor]:
        """Images in an order that is drawn anew for each epoch; what does not fill a batch is left out."""
        epoch, position = divmod(step, self.per_epoch)
        chosen = self.data.order(seed, epoch)[position * size : (position + 1) * size][part.index :: part.of]
        return self.data.train_images[chosen], self.data.train_labels[chosen]

    def held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The test images."""
        images, labels = self.data.test_images, self.data.test_labels
        return zip(torch.split(images, EVALUATION_BATCH), torch.split(labels, EVALUATION_BATCH), strict=True)

    def metrics(self, loss: float, accuracy: float) -> dict[str, float]:
        """Loss in nats, accuracy."""
        return {"loss": loss, "accuracy": accuracy}


class TextTask(Task):
    """Prediction of the next byte of text."""

    models = {"gpt": ByteTransformer}  # noqa: RUF012

    def __init__(self, data: TextData, context: int) -> None:
        self.data, self.context = data, context
        if not isinstance(context, int):
            raise TypeError(f"model.context must be an int; got {context!r}")
        for name, part in (("training", data.train), ("held-out", data.held_out)):
            if len(part) <= context:
                raise ValueError(f"model.context {context} needs more {name} text than the {len(part)} bytes there are")

    @property
    def description(self) -> str:
        """Size and place."""
        return f"{len(self.data.train):,} bytes of text, {len(self.data.held_out):,} held out, from {self.data.source}"

    def tensors(self) -> list[Tensor]:
        """The bytes."""
        return [self.data.train, self.data.held_out]

    def batch(self, step: int, size: int, seed: int, part: Slice) -> tuple[Tensor, Tensor]:
        """Stretches of text from places drawn for this step."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        last, on_cpu = len(self.data.train) - self.context, generator.device
        begins = torch.randint(last, (size,), generator=generator, device=on_cpu)[part.index :: part.of]
        stretches = self.data.train[begins[:, None] + torch.arange(self.context + 1, device=on_cpu)].long()
        return stretches[:, :-1], stretches[:, 1:]

    def held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Stretches that follow one another."""
        whole = (len(self.data.held_out) - 1) // self.context * self.context
        inputs = self.data.held_out[:whole].long().view(-1, self.context)
        targets = self.data.held_out[1 : whole + 1].long().view(-1, self.context)
        rows = max(1, EVALUATION_BATCH * 16 // self.context)
        return zip(torch.split(inputs, rows), torch.split(targets, rows), strict=True)

    def metrics(self, loss: float, accuracy: float) -> dict[str, float]:
        """Loss in nats a byte, the same in bits, and accuracy."""
        return {"loss": loss, "bits_per_byte": loss / torch.log(torch.tensor(2.0)).item(), "accuracy": accuracy}


def make_model(
    makers: dict[str, Callable[..., nn.Module]], settings: dict[str, Any], given: dict[str, Any]
) -> nn.Module:
    """Make the model that the settings name, with the sizes in them and those `given`; raises as `Task.model`."""
    name = settings["name"]
    if name not in makers:
        raise ValueError(f"model.name must be one of {', '.join(makers)}; got {name!r}")
    sizes = {key: value for key, value in settings.items() if key != "name"}
    return makers[name](**given, **checked(makers[name], sizes, "model", skip=given))


def make_task(config: Config, notice: Callable[[str], None]) -> Task:
    """Load the data of a task; `notice` is told of sources that were refused.

    Raises:
        ValueError, FileNotFoundError, RuntimeError: data that is missing, damaged or too little.
    """
    data = config.data
    folder = None if data.folder is None else Path(data.folder)
    if config.task == "text":
        text = load_text(folder, data.pattern, data.limit, data.evaluation_limit)
        return TextTask(text, config.model.get("context", ByteTransformer.CONTEXT))
    images = load_data(folder, notice)
    return ImageTask(images.first(data.limit, data.evaluation_limit), config.batch_size)


def make_method(settings: dict[str, Any], path: str = "method") -> Method:
    """Make the training method that the settings name; one within another is a mapping with a name again.

    Raises:
        ValueError, TypeError: an unknown method or setting, with the nearest, or a value outside its range.
    """
    classes = {name: getattr(methods, name) for name in methods.__all__}
    classes = {name: c for name, c in classes.items() if c not in (Method, SparseMethod)}
    name = settings.get("name")
    known_keys({str(name): None}, classes, f"{path}.name")
    own = {key: value for key, value in settings.items() if key != "name"}
    known_keys(own, [entry.name for entry in fields(classes[str(name)])], path)
    for key, value in own.items():
        if isinstance(value, dict) and "name" in value:
            own[key] = make_method(value, f"{path}.{key}")
        elif isinstance(value, list):
            own[key] = tuple(value)
    try:
        method: Method = classes[str(name)](**own)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{path}: {error}") from error
    return method
