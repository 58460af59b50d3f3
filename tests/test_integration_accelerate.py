"""Accelerate: the same weights as a plain loop, whatever is prepared first, and its own checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from integrations_common import GROWING, METHOD, OPTIONS, STEPS, Bytes, Plain, batch, require_same

accelerate = pytest.importorskip("accelerate", reason="the extra `integrations` is not installed")
from spartan.integrations.accelerate import sparsify  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
ORDERS = ["before", "between", "after"]


class Run:
    """A training by Accelerate; masks are made before, between or after the model and the optimizer are prepared."""

    def __init__(self, order: str, method: Any = METHOD, accumulate: int = 1, **settings: Any) -> None:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        self.accelerator = accelerate.Accelerator(gradient_accumulation_steps=accumulate, cpu=True, **settings)
        self.accumulate = accumulate
        self.model: Any = Bytes()
        self.optimizer: Any = torch.optim.AdamW(self.model.parameters(), lr=1e-2, weight_decay=0.0)
        if order == "before":
            self._sparsify(method)
        self.model = self.accelerator.prepare(self.model)
        if order == "between":
            self._sparsify(method)
        self.optimizer = self.accelerator.prepare(self.optimizer)
        if order == "after":
            self._sparsify(method)

    def _sparsify(self, method: Any) -> None:
        self.sparsifier = sparsify(
            self.accelerator, self.model, self.optimizer, method=method, total_steps=STEPS, **OPTIONS
        )

    def train(self, steps: int) -> Run:
        begin = self.sparsifier.step_count * self.accumulate
        for index in range(begin, begin + steps * self.accumulate):
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(self.model(**batch(index))["loss"])
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
                self.optimizer.step()
                self.optimizer.zero_grad()
        return self

    @property
    def plain(self) -> Any:
        return self.accelerator.unwrap_model(self.model)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("method", [METHOD, GROWING], ids=lambda m: m.name)
@pytest.mark.parametrize(("accumulate", "precision"), [(1, "no"), (2, "no"), (1, "bf16")])
def test_the_same_weights_as_a_plain_loop(order: str, method: Any, accumulate: int, precision: str) -> None:
    run = Run(order, method, accumulate, mixed_precision=precision).train(STEPS)
    plain = Plain(method, accumulate=accumulate).train(STEPS, bf16=precision == "bf16")
    for each in (run, plain):
        each.sparsifier.finalize()  # type: ignore[attr-defined]
    require_same(run.plain, plain.model)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("method", [METHOD, GROWING], ids=lambda m: m.name)
def test_resuming_equals_going_on(order: str, method: Any, tmp_path: Path) -> None:
    first = Run(order, method).train(5)
    first.accelerator.save_state(str(tmp_path))
    second = Run(order, method)
    second.accelerator.load_state(str(tmp_path))
    assert second.sparsifier.step_count == 5
    require_same(second.train(STEPS - 5).plain, first.train(STEPS - 5).plain)


def test_checkpoints_of_finalized_models_have_no_masks(tmp_path: Path) -> None:
    run = Run("after").train(STEPS)
    run.sparsifier.finalize()
    run.accelerator.save_state(str(tmp_path))
    run.accelerator.load_state(str(tmp_path))
    with pytest.raises(ValueError, match="the checkpoint is of a finalized model, without masks"):
        Run("after").accelerator.load_state(str(tmp_path))


def test_what_is_no_accelerator_is_refused() -> None:
    with pytest.raises(TypeError, match=r"accelerator must be an accelerate\.Accelerator"):
        sparsify(Bytes(), Bytes(), method=METHOD, total_steps=STEPS)  # type: ignore[arg-type]
