"""The accuracy table: runs are made once, repeat bit for bit, survive the disk; tables say what was not run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from test_images import write_set

pytest.importorskip("rich")

from bench import accuracy as harness
from bench import tables
from bench.accuracy_plan import DENSE, METHODS, PLAN, Part, Run, SpartanWithoutCoupling, planned
from bench.accuracy_subjects import (
    CONVOLUTIONAL,
    CONVOLUTIONAL_FLOPS,
    LANGUAGE,
    SUBJECTS,
    TRANSFORMER,
    Configured,
    Demonstrated,
)
from bench.accuracy_table import NOT_RUN, accuracy_tables
from spartan.demo.train import Recipe, Training, train
from spartan.methods import RigL, Spartan, TopKAST
from spartan.training.images import ImageData, load_folder

RECIPE = Recipe(epochs=4, batch_size=20, learning_rate=1e-3)
SPARTAN = Run("MLP", "Spartan", 0.9, 1, 0)


def record(method: str, sparsity: float, seed: int, accuracy: float, **other: Any) -> dict[str, Any]:
    return {
        "model": "MLP",
        "method": method,
        "sparsity": sparsity,
        "block": 1,
        "seed": seed,
        "accuracy": accuracy,
    } | other


def test_every_run_of_the_plan_can_be_built_and_comes_once() -> None:
    runs = planned([0, 1])
    assert len(runs) == len(set(runs))
    for run in runs:
        method = run.build()
        if run.method != DENSE:
            assert (method.masking.sparsity, method.masking.block_size) == (run.sparsity, run.block)
    assert {run.method for run in runs} - {DENSE} <= set(METHODS)
    assert all(part.model in SUBJECTS for part in PLAN)


def test_settings_follow_the_run() -> None:
    rigl = Run("MLP", "RigL", 0.98, 16, 2).build()
    assert isinstance(rigl, RigL) and (rigl.seed, rigl.distribution) == (2, "erk")
    top_kast = Run("MLP", "Top-KAST", 0.95, 1, 0).build()
    assert isinstance(top_kast, TopKAST) and top_kast.backward_sparsity == 0.9
    with pytest.raises(ValueError, match=r"method must be Dense or one of Spartan.*got 'GPM'"):
        Run("MLP", "GPM", 0.9, 1, 0).build()


def test_a_part_goes_seed_by_seed() -> None:
    part = Part("MLP", ("Spartan", "GMP"), (0.9, 0.8))
    assert [(r.sparsity, r.seed, r.method) for r in part.runs([3, 4])] == [
        (s, seed, method) for s in (0.9, 0.8) for seed in (3, 4) for method in ("Spartan", "GMP")
    ]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in a worker of the harness."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """The perceptron with batches that fit a small data set."""
    monkeypatch.setitem(SUBJECTS, "MLP", Demonstrated("perceptron", "MLP", RECIPE))


@pytest.fixture
def data(tmp_path: Path) -> ImageData:
    write_set(tmp_path / "data", train=600, test=40)
    return load_folder(tmp_path / "data", verified=False)


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("method", ["Spartan", "RigL", "Top-KAST"])
def test_a_run_repeats_bit_for_bit(data: ImageData, method: str) -> None:
    """Over enough steps for masks to change."""
    run = replace(SPARTAN, method=method)
    first, second = (harness.measure(run, data) for _ in range(2))
    assert first == second
    assert first["measured_sparsity"] == pytest.approx(0.9, abs=1e-4) and first["steps"] == 120
    assert json.loads(json.dumps(first)) == first
    assert harness.missing([run], [first]) == []


@pytest.mark.parametrize(("model", "sparsity", "block"), [(TRANSFORMER, 0.8, 16), (LANGUAGE, 0.8, 1)])
def test_transformers_are_trained_as_the_command_does(
    data: ImageData, monkeypatch: pytest.MonkeyPatch, model: str, sparsity: float, block: int
) -> None:
    subject = SUBJECTS[model]
    assert isinstance(subject, Configured)
    small = {"name": subject.settings["model"]["name"], "dim": 32, "depth": 1, "heads": 2}
    less = {"model": small, "steps": 24, "batch_size": 8}
    if model == LANGUAGE:
        less["data"] = {"limit": 20_000, "evaluation_limit": 2_000}
    monkeypatch.setitem(SUBJECTS, model, replace(subject, settings=subject.settings | less))
    run = Run(model, "Spartan", sparsity, block, 0)
    first, second = (harness.measure(run, data) for _ in range(2))
    assert first == second and first["steps"] == 24
    assert first["measured_sparsity"] == pytest.approx(sparsity, abs=0.03) and first["settings"]["preserve_scale"]
    assert ("bits_per_byte" in first) == (model == LANGUAGE) and 0 <= first["accuracy"] <= 1
    dense = harness.measure(replace(run, method=DENSE, sparsity=0.0), data, epochs=SUBJECTS[model].epochs * 2)
    assert dense["steps"] == 48 and dense["measured_sparsity"] == 0
    assert harness.missing([run], [first]) == []


def test_a_residual_network_loses_the_flops_asked_for(data: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"model": {"name": "cnn", "widths": [8, 16]}, "steps": 12, "batch_size": 8}
    found = {}
    for model in (CONVOLUTIONAL, CONVOLUTIONAL_FLOPS):
        subject = SUBJECTS[model]
        assert isinstance(subject, Configured)
        monkeypatch.setitem(SUBJECTS, model, replace(subject, settings=subject.settings | small))
        found[model] = harness.measure(Run(model, "Spartan", 0.8, 1, 0), data)
    assert found[CONVOLUTIONAL]["measured_sparsity"] == pytest.approx(0.8, abs=1e-3)
    assert found[CONVOLUTIONAL_FLOPS]["removed_cost"] == pytest.approx(0.8, abs=1e-3)
    assert abs(found[CONVOLUTIONAL_FLOPS]["measured_sparsity"] - 0.8) > 0.01
    assert "removed_cost" not in found[CONVOLUTIONAL]
    tables = accuracy_tables([*found.values()])
    assert [table.header[1] for table in tables] == ["80% zeros", "80% fewer FLOPs"]


def test_the_ablation_changes_the_gradient_alone(data: ImageData) -> None:
    whole, run = (Run("MLP", f"Spartan, published{ablated}", 0.9, 1, 0) for ablated in ("", ", no coupling"))
    trainings = [Training("MLP", r.build(), data, RECIPE, seed=0) for r in (whole, run)]
    assert [type(training.sparsifier.method) for training in trainings] == [Spartan, SpartanWithoutCoupling]
    assert whole.build().settings() == run.build().settings() == Spartan.paper(sparsity=0.9).settings()
    for training in trainings:
        train(training, lambda training, loss: training.step < 40)
        training.optimizer.zero_grad()
        images, labels = data.train_images[:20], data.train_labels[:20]
        torch.nn.functional.cross_entropy(training.model(images), labels).backward()
    own = trainings[1].model.get_parameter("hidden1.weight").grad
    assert own is not None
    before = own.clone()
    trainings[1].sparsifier.correct_gradients()
    assert torch.equal(own, before)
    coupled = trainings[0].model.get_parameter("hidden1.weight").grad
    assert coupled is not None
    before = coupled.clone()
    trainings[0].sparsifier.correct_gradients()
    assert not torch.equal(coupled, before)


def test_what_was_measured_otherwise_is_refused() -> None:
    known = asdict(SPARTAN) | {"settings": Spartan(sparsity=0.9).settings()}
    other = asdict(replace(SPARTAN, seed=1)) | {"settings": {"beta": 3.0}}
    assert harness.missing([SPARTAN, replace(SPARTAN, seed=2)], [known, other]) == [replace(SPARTAN, seed=2)]
    with pytest.raises(ValueError, match=r"seed=1.* was measured with beta = 3.0, now it is 4.0"):
        harness.missing([replace(SPARTAN, seed=1)], [known, other])


def test_a_file_goes_on_only_under_the_same_circumstances(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "accuracy.json"
    content = harness.describe(harness.Worker(), "data")
    assert harness.read(path, content) == []
    harness.write(path, {**content, "date": "today", "results": [record("GMP", 0.9, 0, 0.5)]})
    assert harness.read(path, content) == [record("GMP", 0.9, 0, 0.5)]
    assert [file.name for file in path.parent.iterdir()] == ["accuracy.json"]
    more = {**content, "models": {**content["models"], "another": {}}}
    assert len(harness.read(path, more)) == 1
    for changed in (
        {**content, "data": "other"},
        harness.describe(harness.Worker(epochs=1), "data"),
        {**content, "models": {}},
    ):
        with pytest.raises(ValueError, match="was measured with another"):
            harness.read(path, changed)


def test_the_command_runs_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[Run] = []

    def in_place(runs: list[Run], worker: harness.Worker, processes: int) -> Any:
        for run in runs:
            made.append(run)
            yield asdict(run) | {"settings": run.build().settings(), "accuracy": 0.5 + run.seed / 10}

    monkeypatch.setattr(harness, "in_processes", in_place)
    monkeypatch.setattr(harness.Worker, "load", lambda self, notice=print: type("Data", (), {"name": "data"}))
    arguments: dict[str, Any] = {"seeds": [0, 1], "out": tmp_path / "a.json", "only": "MLP, GMP"}
    harness.main(**arguments)
    assert {run.method for run in made} == {"GMP"} and len(set(made)) == len(made)
    assert "55.00 ± 7.07" in capsys.readouterr().out
    before = len(made)
    harness.main(**arguments)
    assert len(made) == before
    harness.main(**arguments | {"seeds": [2]})
    assert {run.seed for run in made[before:]} == {2} and len(made) == before * 3 // 2
    with pytest.raises(typer.BadParameter, match="another models"):
        harness.main(**arguments, epochs=1)


def test_processes_compute_with_one_thread(monkeypatch: pytest.MonkeyPatch, data: ImageData) -> None:
    monkeypatch.setattr(harness, "load_data", lambda folder, notice: data)
    torch.set_num_threads(2)
    harness._begin(harness.Worker(images=400, epochs=2))
    assert torch.get_num_threads() == 1
    found = harness._work(replace(SPARTAN, method=DENSE, sparsity=0.0))
    assert found["steps"] == 2 and found["settings"] == {}


def test_tables_say_what_was_not_run() -> None:
    records = [
        record(DENSE, 0.0, 0, 0.9),
        record(DENSE, 0.0, 1, 0.8),
        record("GMP", 0.98, 0, 0.7),
        record("Spartan", 0.98, 0, 0.5),
        record("Spartan", 0.98, 1, 0.6),
        record("Spartan", 0.9, 0, 0.6),
        record("GMP", 0.9, 0, 0.4) | {"block": 16},
    ]
    single, blocks = accuracy_tables(records)
    assert single.header == ["method", "90% zeros", "98% zeros"] and single.dense == "85.00 ± 7.07"
    assert single.cells == [["Spartan", "60.00 (1 seed)", "55.00 ± 7.07"], ["GMP", NOT_RUN, "70.00 (1 seed)"]]
    assert blocks.cells == [["GMP", "40.00 (1 seed)"]] and blocks.title == "MLP, 16×16 blocks"
    records.append(record(DENSE, 0.0, 2, 0.85))
    assert accuracy_tables(records)[0].cells[0][2] == "55.00 ± 7.07 (2 seeds)"


def test_text_is_told_in_bits() -> None:
    records = [
        record(method, 0.8 * (method != DENSE), 0, 0.5, model=LANGUAGE, bits_per_byte=2.0) for method in (DENSE, "GMP")
    ]
    (table,) = accuracy_tables(records)
    assert table.header == ["method, bits per byte", "80% zeros"] and table.dense == "2.000 (1 seed)"
    assert table.cells == [["GMP", "2.000 (1 seed)"]]


def test_the_readme_names_data_and_recipe(tmp_path: Path) -> None:
    content = harness.describe(harness.Worker(epochs=5), "data")
    records = [record(DENSE, 0.0, 0, 0.9, steps=7), record("GMP", 0.9, 0, 0.5, steps=7)]
    harness.write(tmp_path / "accuracy.json", {**content, "date": "2026-01-02T03:04", "results": records})
    text = tables.accuracy(tmp_path)
    assert "| GMP | 50.00 (1 seed) |" in text and "dense: 90.00 (1 seed)" in text
    assert "7 steps of 256" in text and "2026-01-02." in text
