"""Pruning of a trained encoder: calibration, distillation that keeps zeros, results that go on, the tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer

pytest.importorskip("rich")

from bench import pruned, tables
from bench.pruned import METHODS, PATTERNS, Run, calibration, make, planned, prune_and_train
from tests.test_pretrained import distillation

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_seed_draws_the_calibration_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruned, "CALIBRATION", {"texts": 10, "batch_size": 4})
    task = distillation()
    first, again, other = (calibration(task, seed) for seed in (0, 0, 1))
    assert [len(batch["input_ids"]) for batch in first] == [4, 4, 2]
    assert torch.equal(first[0]["input_ids"], again[0]["input_ids"])
    assert not torch.equal(first[0]["input_ids"], other[0]["input_ids"])


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_makes_the_zeros_it_is_named_for(method: str) -> None:
    task = distillation()
    model, record = prune_and_train(task, Run(method, "70%", 0))
    kept = sum(int(p.count_nonzero()) for name, p in model.named_parameters() if "encoder" in name and p.dim() == 2)
    assert kept == round(0.3 * 2 * 24 * 48)
    assert record["measured_sparsity"] == pytest.approx(0.7, abs=1e-3) and record["error"] > 0


def test_factors_leave_out_as_many_numbers() -> None:
    task = distillation()
    model, record = prune_and_train(task, Run("CoSpaDi", "50%", 0))
    assert 0.5 <= record["measured_sparsity"] < 0.6 and 0 < record["error"] < 0.5
    stored = 0
    for layer in (model.encoder[0], model.encoder[2]):
        stored += layer.dictionary.weight.numel() + int(layer.coefficients.weight.count_nonzero())
    assert stored == round((1 - record["measured_sparsity"]) * 2 * 24 * 48)


def test_training_brings_embeddings_back_and_keeps_zeros() -> None:
    task = distillation()
    before = make(Run("OBS", "80%", 0), task)
    after = make(Run("OBS", "80%", 30), task)
    assert before["cosine"] + 0.02 < after["cosine"]
    model, _ = prune_and_train(task, Run("OBS", "80%", 0))
    trained, _ = prune_and_train(task, Run("OBS", "80%", 30))
    for name, weight in model.named_parameters():
        if "encoder" in name and weight.dim() == 2:
            assert torch.equal(weight == 0, trained.get_parameter(name) == 0)


def test_runs_are_made_once_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Run] = []
    out = tmp_path / "pruned.json"
    monkeypatch.setattr(pruned, "mini_lm", lambda recipe: distillation(recipe["steps"]))
    monkeypatch.setattr(pruned, "SPARSITIES", (0.7, 0.5))
    monkeypatch.setattr(pruned, "PATTERNS", {"2:4": PATTERNS["2:4"]})
    monkeypatch.setattr(pruned, "CALIBRATION", {"texts": 10, "batch_size": 4})
    monkeypatch.setattr(pruned, "make", lambda run, task: (made.append(run), make(run, task))[1])
    monkeypatch.setattr(
        pruned,
        "speed",
        lambda task: [{"zeros": "80%", "sentences": 1, "tokens": 3, "dense": [0.002], "packed": [0.001]}],
    )
    pruned.main(seeds=[0, 1], out=out, steps=2)
    assert len(made) == len(planned([0, 1], 2)) == 2 * (2 * (len(METHODS) + 1) + 3 + 3)  # and CoSpaDi
    pruned.main(seeds=[0, 1], out=out, steps=2)
    assert len(made) == len(planned([0, 1], 2))
    with pytest.raises(typer.BadParameter, match="other settings"):
        pruned.main(seeds=[0], out=out, steps=4)
    shown = tables.pruned(tmp_path).replace("\xa0", " ")
    records = [r for r in json.loads(out.read_text("utf-8"))["results"] if r["method"] == "OBS" and r["zeros"] == "70%"]
    assert len({r["cosine"] for r in records}) == 4  # two seeds, with and without training
    cosines = [r["cosine"] for r in records if r["steps"] == 0]
    line = next(line for line in shown.splitlines() if line.startswith("| OBS |"))
    assert f"{sum(cosines) / 2:.3f} ± {abs(cosines[0] - cosines[1]) / 2:.3f}" in line
    assert "| OBS, 2 steps |" in shown and "| 1 x 3 | 80% | 2.0 | 1.0 |" in shown and "seeds: 2" in shown
