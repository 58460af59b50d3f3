"""Lightning: the same weights as a plain loop, its checkpoints, its averages, early ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from integrations_common import BATCH, GROWING, METHOD, OPTIONS, STEPS, Bytes, Plain, examples, require_same, sparsity
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

lightning = pytest.importorskip("lightning", reason="the extra `integrations` is not installed")
from lightning.pytorch.callbacks import (  # noqa: E402
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)

from spartan.integrations.lightning import SparsityCallback  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread", "quiet")


class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
    """The byte-level model; it notes how sparse what is validated is."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Bytes()
        self.register_buffer("marker", torch.arange(3.0))  # an average must not write masks into it
        self.validated: list[torch.Tensor] = []

    def training_step(self, batch: Any, index: int) -> Any:
        return self.net(**batch)["loss"]

    def validation_step(self, batch: Any, index: int) -> None:
        self.validated.append(self.net(**batch)["loss"])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.0)


class Two(Module):
    """Two optimizers, and steps by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        first, second = self.optimizers()
        self.zero_grad()
        self.manual_backward(self.net(**batch)["loss"])
        torch.nn.utils.clip_grad_norm_(self.parameters(), 0.5)
        first.step()
        second.step()

    def configure_optimizers(self) -> Any:
        parameters = list(self.parameters())
        parts = parameters[:6], parameters[6:]
        return [torch.optim.AdamW(part, lr=1e-2, weight_decay=0.0) for part in parts], []


def loader(steps: int) -> Any:
    return torch.utils.data.DataLoader(examples(BATCH * steps), batch_size=BATCH)  # type: ignore[arg-type]


def trainer(folder: Path, *callbacks: Any, **settings: Any) -> Any:
    chosen = {"max_epochs": 2, "gradient_clip_val": 0.5, "log_every_n_steps": 3, **settings}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return lightning.Trainer(
        default_root_dir=folder, callbacks=list(callbacks), enable_checkpointing=None, **chosen, **quiet
    )


HALF = STEPS // 2  # steps of an epoch


def reference(method: Any, accumulate: int = 1, bf16: bool = False) -> Plain:
    """The plain loop over two epochs of the same data."""
    import integrations_common

    plain, batch = Plain(method, accumulate=accumulate), integrations_common.batch
    epoch = HALF * accumulate
    integrations_common.batch = lambda index: batch(index % epoch)
    try:
        plain.train(STEPS, bf16=bf16)
    finally:
        integrations_common.batch = batch
    return plain


@pytest.mark.parametrize("method", [METHOD, GROWING], ids=lambda m: m.name)
@pytest.mark.parametrize(
    ("accumulate", "precision"),
    [(1, "32-true"), (2, "32-true"), (1, "bf16-mixed")],
    ids=["plain", "accumulated", "bf16"],
)
def test_the_same_weights_as_a_plain_loop(tmp_path: Path, method: Any, accumulate: int, precision: str) -> None:
    module, callback = Module(), SparsityCallback(method, **OPTIONS)
    run = trainer(tmp_path, callback, accumulate_grad_batches=accumulate, precision=precision)
    run.fit(module, loader(HALF * accumulate))
    plain = reference(method, accumulate, precision == "bf16-mixed")
    plain.sparsifier.finalize()
    require_same(module.net, plain.model)
    assert callback.sparsifier is not None and callback.sparsifier.finalized
    assert sparsity(module) == pytest.approx(0.6, abs=0.01)
    assert float(run.callback_metrics["sparsity"]) == pytest.approx(0.6, abs=0.01)


def test_two_optimizers_by_hand(tmp_path: Path) -> None:
    module = Two()
    trainer(tmp_path, SparsityCallback(METHOD, **OPTIONS, total_steps=STEPS), gradient_clip_val=None).fit(
        module, loader(HALF)
    )
    plain = reference(METHOD)
    plain.sparsifier.finalize()
    require_same(module.net, plain.model)


def checkpoints(folder: Path) -> Any:
    return ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_epochs=1, save_last=False)


@pytest.mark.parametrize("method", [METHOD, GROWING], ids=lambda m: m.name)
def test_resuming_equals_going_on(tmp_path: Path, method: Any) -> None:
    whole, other = Module(), Module()
    trainer(tmp_path, SparsityCallback(method, **OPTIONS), checkpoints(tmp_path)).fit(whole, loader(HALF))
    first = tmp_path / f"step={HALF}.ckpt"
    trainer(tmp_path / "b", SparsityCallback(method, **OPTIONS), checkpoints(tmp_path / "b")).fit(
        other, loader(HALF), ckpt_path=first, weights_only=False
    )
    require_same(other, whole)
    last = torch.load(tmp_path / f"step={STEPS}.ckpt", weights_only=False)["state_dict"]
    assert all(torch.equal(last[name], value) for name, value in whole.state_dict().items())


def test_a_checkpoint_from_the_middle_is_used_with_its_masks(tmp_path: Path) -> None:
    """What is validated is what was trained: not the dense weights under the masks."""
    callback = SparsityCallback(METHOD, **OPTIONS)
    trainer(tmp_path, callback, checkpoints(tmp_path)).fit(Module(), loader(HALF))
    module = Module()
    run = trainer(tmp_path / "b", callback, checkpoints(tmp_path / "b"))
    run.validate(module, loader(1), ckpt_path=tmp_path / f"step={HALF}.ckpt", weights_only=False, verbose=False)
    plain = Plain().train(HALF)
    with torch.no_grad():
        loss = plain.model(**next(iter(loader(1))))["loss"]
    torch.testing.assert_close(module.validated[-1], loss)
    assert sparsity(module) > 0.3


@pytest.mark.parametrize("first", [False, True], ids=["averages last", "averages first"])
@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_averages_are_sparse_whatever_the_order(tmp_path: Path, first: bool, kind: str) -> None:
    """In the end, and whenever they are validated."""
    averaging: Any = EMAWeightAveraging(decay=0.5) if kind == "ema" else StochasticWeightAveraging(1e-2, 1, 1)
    module, callback = Module(), SparsityCallback(METHOD, **OPTIONS)
    run = trainer(tmp_path, *((averaging, callback) if first else (callback, averaging)))
    run.fit(module, loader(HALF), loader(1))
    assert sparsity(module) == pytest.approx(0.6, abs=0.01)
    assert torch.equal(module.marker, torch.arange(3.0))
    if kind == "swa":
        return
    plain = Plain()
    average = AveragedModel(plain.model, avg_fn=get_ema_avg_fn(0.5))
    shown = []

    def each() -> None:
        average.update_parameters(plain.model)
        if plain.sparsifier.step_count in (HALF, STEPS):
            with torch.no_grad():
                shown.append(average.module(**next(iter(loader(1))))["loss"])

    import integrations_common

    batch = integrations_common.batch
    integrations_common.batch = lambda index: batch(index % HALF)
    try:
        plain.train(STEPS, each)
    finally:
        integrations_common.batch = batch
    torch.testing.assert_close(torch.stack(module.validated[-2:]), torch.stack(shown))
    plain.sparsifier.finalize_copy(average.module)
    require_same(module.net, average.module)


def test_an_early_end_is_finalized_and_a_training_without_end_refused(tmp_path: Path) -> None:
    module = Module()
    trainer(tmp_path, SparsityCallback(METHOD, **OPTIONS, total_steps=STEPS), max_epochs=1).fit(module, loader(5))
    require_same(module.net, Plain().train(5).finalized())
    with pytest.raises(ValueError, match="total_steps must be given"):
        trainer(tmp_path, SparsityCallback(METHOD, **OPTIONS), max_epochs=-1).fit(Module(), loader(1))
    with pytest.raises(TypeError, match="method must be a spartan method"):
        SparsityCallback("magnitude")  # type: ignore[arg-type]
