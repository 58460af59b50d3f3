"""Hugging Face's Trainer: the same weights as a plain loop, its checkpoints, its best model, averages, early ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from integrations_common import BATCH, GROWING, METHOD, OPTIONS, STEPS, Bytes, Plain, examples, require_same, sparsity
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

transformers = pytest.importorskip("transformers", reason="the extra `integrations` is not installed")
from safetensors.torch import load_file  # noqa: E402
from transformers import TrainerCallback, TrainingArguments  # noqa: E402

from spartan.integrations.transformers import FILE, SparsityCallback  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread", "quiet")


class Ordered(transformers.Trainer):  # type: ignore[misc, name-defined]
    """Takes examples in their order, as the plain loop does."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer(folder: Path, *callbacks: Any, model: Any = None, scores: Any = None, **settings: Any) -> Any:
    accumulate = settings.get("gradient_accumulation_steps", 1)
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": BATCH,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 0.5,
        "optim": "adamw_torch",
        "save_strategy": "no",
        "logging_steps": 4,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **settings,
    }
    metrics = None if scores is None else lambda _: {"score": next(scores)}
    return Ordered(
        model=Bytes() if model is None else model,
        args=TrainingArguments(**arguments),
        train_dataset=examples(BATCH * STEPS * accumulate),
        eval_dataset=examples(BATCH),
        compute_metrics=metrics,
        callbacks=list(callbacks),
    )


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 2},
    "bf16": {"bf16": True},
    "fused": {"optim": "adamw_torch_fused"},
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("method", [METHOD, GROWING], ids=lambda m: m.name)
def test_the_same_weights_as_a_plain_loop(tmp_path: Path, setting: str, method: Any) -> None:
    callback = SparsityCallback(method, **OPTIONS)
    run = trainer(tmp_path, callback, **SETTINGS[setting])
    run.train()
    plain = Plain(method, accumulate=SETTINGS[setting].get("gradient_accumulation_steps", 1))
    if setting == "fused":
        plain.optimizer.param_groups[0].update(fused=True)
    plain.train(STEPS, bf16=setting == "bf16")
    plain.sparsifier.finalize()
    require_same(run.model, plain.model)
    assert sparsity(run.model) == pytest.approx(0.6, abs=0.01) and callback.sparsifier is not None
    assert callback.sparsifier.finalized


@pytest.mark.parametrize("method", [METHOD, GROWING], ids=lambda m: m.name)
@pytest.mark.parametrize("given", ["found", "named"])
def test_resuming_equals_going_on(tmp_path: Path, method: Any, given: str) -> None:
    whole = trainer(tmp_path / "a", SparsityCallback(method, **OPTIONS), save_strategy="steps", save_steps=5)
    whole.train()
    checkpoint, second = tmp_path / "a" / "checkpoint-5", SparsityCallback(method, **OPTIONS)
    folder = tmp_path / "a"
    if given == "named":
        checkpoint = checkpoint.rename(tmp_path / "moved")
        folder, second = tmp_path / "b", SparsityCallback(method, **OPTIONS, resume_from=checkpoint)
    resumed = trainer(folder, second, save_strategy="steps", save_steps=5)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    require_same(resumed.model, whole.model)


def test_resuming_without_its_masks_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path / "a", SparsityCallback(METHOD, **OPTIONS), save_strategy="steps", save_steps=5).train()
    trainer(tmp_path / "b", SparsityCallback(METHOD, **OPTIONS), save_strategy="steps", save_steps=5).train()
    place = tmp_path / "a" / "checkpoint-5"
    place.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"resumes at step 5, but there are no masks of that step of that training"):
        trainer(tmp_path / "b", SparsityCallback(METHOD, **OPTIONS)).train(
            resume_from_checkpoint=str(tmp_path / "moved")
        )
    (tmp_path / "moved" / FILE).write_bytes(b"no masks")
    run = trainer(tmp_path / "c", SparsityCallback(METHOD, **OPTIONS, resume_from=tmp_path / "moved"))
    with pytest.raises(ValueError, match=r"sparsity\.pt: cannot be read as masks"):
        run.train(resume_from_checkpoint=str(tmp_path / "moved"))


@pytest.mark.parametrize("best", [4, 12])
def test_the_best_model_has_the_masks_of_its_step(tmp_path: Path, best: int) -> None:
    callback = SparsityCallback(METHOD, **OPTIONS)
    settings: dict[str, Any] = {"load_best_model_at_end": True, "metric_for_best_model": "score", "save_steps": 4}
    settings |= {"save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 4, "greater_is_better": True}
    scores = iter([float(step == best) for step in (4, 8, 12)])
    run = trainer(tmp_path, callback, scores=scores, **settings)
    run.train()
    require_same(run.model, Plain().train(best).finalized())


class Averaging(TrainerCallback):  # type: ignore[misc]
    """Averages the weights, and puts the average in their place when training ends."""

    def __init__(self) -> None:
        self.average: Any = None
        self.values: list[torch.Tensor] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        self.values = [p.detach().clone() for p in model.parameters()]

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.average.update_parameters(model)
        for value, p in zip(self.values, model.parameters(), strict=True):
            value.lerp_(p.detach(), 0.5)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for value, p in zip(self.values, model.parameters(), strict=True):
            p.data.copy_(value)


@pytest.mark.parametrize("first", [False, True], ids=["averages last", "averages first"])
def test_averages_are_sparse_whatever_the_order(tmp_path: Path, first: bool) -> None:
    averaging, callback = Averaging(), SparsityCallback(METHOD, **OPTIONS)
    run = trainer(tmp_path, *((averaging, callback) if first else (callback, averaging)))
    run.train()
    assert sparsity(run.model) == pytest.approx(0.6, abs=0.01)
    assert sparsity(averaging.average.module) == pytest.approx(0.6, abs=0.01)
    for value, p in zip(averaging.values, run.model.parameters(), strict=True):
        assert torch.equal(p[p != 0], value[p != 0])


def test_the_last_checkpoint_is_sparse_and_logs_say_so(tmp_path: Path) -> None:
    run = trainer(tmp_path, SparsityCallback(METHOD, **OPTIONS), save_strategy="steps", save_steps=5)
    run.train()
    saved = load_file(tmp_path / f"checkpoint-{STEPS}" / "model.safetensors")
    require_same_values(saved, run.model.state_dict())
    history = json.loads((tmp_path / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["log_history"]
    logged = [entry["sparsity"] for entry in history if "loss" in entry]
    assert len(logged) == 3 and logged == sorted(logged) and logged[-1] == pytest.approx(0.6, abs=0.01)
    run.save_model(str(tmp_path / "final"))
    require_same_values(load_file(tmp_path / "final" / "model.safetensors"), run.model.state_dict())


def require_same_values(saved: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
    assert set(saved) == set(state)
    assert all(torch.equal(saved[name], value) for name, value in state.items())


class Stopping(TrainerCallback):  # type: ignore[misc]
    """Ends the training early."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop = state.global_step >= 5
        return control


def test_an_early_end_is_finalized_and_a_second_training_begins_anew(tmp_path: Path) -> None:
    callback = SparsityCallback(METHOD, **OPTIONS)
    run = trainer(tmp_path, callback, Stopping())
    run.train()
    require_same(run.model, Plain().train(5).finalized())
    run.train()
    assert callback.sparsifier is not None and callback.sparsifier.finalized
    assert [type(c).__name__ for c in run.callback_handler.callbacks].count("_Last") == 0


def test_a_model_of_transformers_with_checkpointed_activations(tmp_path: Path) -> None:
    """Trained, saved, and read back by `from_pretrained`."""
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    run = trainer(tmp_path, SparsityCallback(METHOD, **OPTIONS), model=model, gradient_checkpointing=True)
    run.train()
    run.save_model(str(tmp_path / "final"))
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "final")
    require_same(again, model)
    assert sparsity(model) == pytest.approx(0.6, abs=0.01)


def test_a_method_of_the_wrong_type_is_refused() -> None:
    with pytest.raises(TypeError, match="method must be a spartan method"):
        SparsityCallback("magnitude")  # type: ignore[arg-type]
