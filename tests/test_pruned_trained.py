"""Pruning of models trained first: what is measured, zeros that stay, results that go on, the table."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import pytest
import torch

pytest.importorskip("rich")

from bench import pruned_trained, tables
from bench.pruned_trained import SUBJECTS, Run, Trained, make, planned
from spartan.training.images import ImageData

pytestmark = pytest.mark.usefixtures("one_thread")

LANGUAGE, VIT = SUBJECTS


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """Subjects of a few steps, with images made of their labels."""
    subjects = copy.deepcopy(SUBJECTS)
    for settings in subjects.values():
        settings.update(steps=12, after=3, batch_size=8, calibration=16)
        settings["model"]["dim"] = 32
    subjects[LANGUAGE].update(bytes=[6_000, 400])
    subjects[VIT].update(images=[40, 20])
    made = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (60,), generator=made)
    images = torch.randn(60, 1, 8, 8, generator=made) + labels[:, None, None, None]
    data = ImageData("made", "here", images[:40], labels[:40], images[40:], labels[40:])
    monkeypatch.setattr(pruned_trained, "SUBJECTS", subjects)
    monkeypatch.setattr(pruned_trained, "load_data", lambda: data)
    return subjects


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("score", ["Magnitude", "Wanda", "OBS"])
def test_zeros_are_as_many_as_asked_for_and_stay_in_training(
    small: dict[str, dict[str, Any]], subject: str, score: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.nn.Module] = []
    dense = Trained.dense
    monkeypatch.setattr(Trained, "dense", lambda *args: (seen.append(dense(*args)), seen[-1])[1])
    trained = Trained()
    before = make(Run(subject, score, 0.5, 0, 0), trained)
    after = make(Run(subject, score, 0.5, 3, 0), trained)
    assert before["measured_sparsity"] == after["measured_sparsity"] == 0.5 and before["error"] == after["error"] > 0
    assert before["loss"] != after["loss"]
    untrained, later = seen
    for name, weight in untrained.named_parameters():
        if name.startswith("layers.") and weight.dim() == 2:
            assert torch.equal(weight == 0, later.get_parameter(name) == 0), name
            if subject == VIT:
                for strip in (weight == 0).split(16):
                    assert all(bool(block.all()) or not bool(block.any()) for block in strip.split(16, 1))
        elif not weight.requires_grad or weight.dim() == 2:
            assert not torch.equal(weight, later.get_parameter(name)), name


def test_a_seed_trains_its_dense_model_once_and_anew(small: dict[str, dict[str, Any]]) -> None:
    trained = Trained()
    first, again, other = (trained.dense(LANGUAGE, seed) for seed in (0, 0, 1))
    assert first is not again and torch.equal(first.head.weight, again.head.weight)  # type: ignore[arg-type, union-attr]
    assert not torch.equal(first.head.weight, other.head.weight)  # type: ignore[arg-type, union-attr]
    record = make(Run(LANGUAGE, "Dense", 0.0, 0, 0), trained)
    assert record["measured_sparsity"] == 0 and 0 < record["bits_per_byte"] < 9


def test_runs_are_made_once_and_shown(
    small: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Run] = []
    monkeypatch.setattr(pruned_trained, "make", lambda run, trained: (made.append(run), make(run, trained))[1])
    out = tmp_path / "pruned-trained.json"
    for _ in range(2):
        pruned_trained.main(seeds=[0, 1], out=out)
        assert len(made) == len(planned([0, 1])) == 2 * 2 * 14
    shown = tables.pruned_trained(tmp_path).replace("\xa0", " ")
    found = [
        record["bits_per_byte"]
        for record in json.loads(out.read_text("utf-8"))["results"]
        if (record["subject"], record["method"], record["sparsity"], record["steps"]) == (LANGUAGE, "OBS", 0.8, 3)
    ]
    line = next(line for line in shown.splitlines() if line.startswith("| OBS |"))
    assert f"{mean(found):.3f} ± {pstdev(found):.3f}" in line.split("|")[5]
    assert "80%, 3 steps" in shown and "ViT, 16x16 blocks: test accuracy in percent; dense: " in shown
