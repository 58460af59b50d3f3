"""The demonstration on a tiny configuration: results, files, interruption and resumption."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_images import write_set
from torch import nn

rich_console = pytest.importorskip("rich.console")
pytest.importorskip("matplotlib")

from spartan import cli  # noqa: E402
from spartan.demo import run as demo_run  # noqa: E402
from spartan.demo.plan import FULL, QUICK, Plan, Run  # noqa: E402
from spartan.demo.results import RunResult, results_table, save_figure  # noqa: E402
from spartan.demo.run import CHECKPOINT, Demo, Interrupted  # noqa: E402
from spartan.demo.train import DenseProbe, Recipe, Training, accuracy, inference_ratio, train  # noqa: E402
from spartan.methods import Dense, Spartan  # noqa: E402
from spartan.sparsifier import hidden_matrices, kept_fractions  # noqa: E402
from spartan.training.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from spartan.training.images import ImageData, load_folder  # noqa: E402
from spartan.training.models import MODELS, VisionTransformer, multilayer_perceptron  # noqa: E402

RECIPE = Recipe(epochs=3, batch_size=8, learning_rate=1e-3)
TINY = Plan(
    runs=(
        Run("MLP", "Dense"),
        Run("MLP", "Spartan", 0.9),
        Run("MLP", "One-shot", 0.9, 16),
        Run("ViT", "Spartan", 0.8),
    ),
    recipes={"MLP": RECIPE, "ViT": RECIPE},
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_set(tmp_path / "data", train=200, test=30)
    return tmp_path / "data"


@pytest.fixture
def data(folder: Path) -> ImageData:
    return load_folder(folder, verified=False)


def make_demo(data: ImageData, out: Path, plan: Plan = TINY, seed: int = 0) -> Demo:
    return Demo(plan, data, out, seed, rich_console.Console(file=io.StringIO(), width=100))


def weights_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.glob("*/*.safetensors"))}


def without_times(results: list[RunResult]) -> list[RunResult]:
    times = {"step_ratio": None, "step_seconds": 0.0, "mask_seconds": 0.0, "inference_ratio": None}
    return [replace(result, **times) for result in results]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("side", [8, 28])
def test_models_classify_both_data_sets(name: str, side: int) -> None:
    model = MODELS[name](side, 10)
    assert model(torch.randn(3, 1, side, side)).shape == (3, 10)
    assert len(hidden_matrices(model)) == sum(isinstance(module, nn.Linear) for module in model.modules()) - 1


def test_the_perceptron_has_the_announced_sizes() -> None:
    linear = [module for module in multilayer_perceptron(28, 10) if isinstance(module, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [
        (784, 512),
        (512, 256),
        (256, 10),
    ]


def test_patches_must_divide_the_image() -> None:
    with pytest.raises(ValueError, match="side 28, patch 5"):
        VisionTransformer(28, 10, patch=5)


def test_patches_are_squares_of_the_image() -> None:
    """The embedding of one patch depends on its own pixels alone."""
    model = VisionTransformer(8, 10, patch=4)
    seen = []
    model.embed.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    image = torch.zeros(1, 1, 8, 8)
    image[0, 0, 4:, :4] = torch.arange(16.0).view(4, 4)
    model(image)
    assert torch.equal(seen[0][0, 2].sort().values, torch.arange(16.0))
    assert seen[0][0, [0, 1, 3]].abs().sum() == 0


def test_learning_rate_rises_then_falls_to_zero() -> None:
    rates = [RECIPE.learning_rate_at(step, 100) for step in range(101)]
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[10] == pytest.approx(1e-3) and rates[100] == pytest.approx(0, abs=1e-12) and min(rates[:100]) > 0


def test_same_seed_same_weights_and_batches_whatever_the_method(data: ImageData) -> None:
    first = Training("MLP", Dense(), data, RECIPE, 3)
    second = Training("MLP", Spartan(sparsity=0.5), data, RECIPE, 3)
    other = Training("MLP", Dense(), data, RECIPE, 4)
    pairs = list(zip(first.model.parameters(), second.model.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    labels = [next(iter(training.batches()))[1] for training in (first, second, other)]
    assert torch.equal(labels[0], labels[1]) and not torch.equal(labels[0], labels[2])


def test_every_image_is_seen_once_in_an_epoch(data: ImageData) -> None:
    training = Training("MLP", Dense(), data, RECIPE, 0)
    seen = []
    for images, _ in training.batches():
        seen.append(images)
        training.step += 1
        if training.step == training.steps_per_epoch:
            break
    assert torch.equal(torch.cat(seen).sum((1, 2, 3)).sort().values, data.train_images.sum((1, 2, 3)).sort().values)


def test_a_batch_larger_than_the_data_is_refused(data: ImageData) -> None:
    with pytest.raises(ValueError, match="batch_size 500 is larger than the 200"):
        Training("MLP", Dense(), data, replace(RECIPE, batch_size=500), 0)


def test_the_probe_leaves_the_run_as_it_is(data: ImageData) -> None:
    probe = DenseProbe("MLP", data, RECIPE, 0)
    with_probe, without = (Training("MLP", Spartan(sparsity=0.9), data, RECIPE, 0) for _ in range(2))
    assert train(with_probe, probe=probe) and train(without)
    ratio = probe.ratio()
    assert ratio is not None and 0 < ratio < 100
    for ours, theirs in zip(with_probe.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_training_learns(data: ImageData) -> None:
    """Brightness separates the two classes made here, so a sparse model must find it."""
    labels = (torch.arange(200) % 2).long()
    images = data.train_images + 2.0 * labels.view(-1, 1, 1, 1)
    simple = ImageData("made", "made", images, labels, images[:60], labels[:60])
    training = Training("MLP", Spartan(sparsity=0.9), simple, RECIPE, 0)
    train(training)
    training.sparsifier.finalize()
    assert accuracy(training.model, simple) > 0.95


@pytest.fixture
def uninterrupted(data: ImageData, tmp_path: Path) -> tuple[list[RunResult], dict[str, bytes]]:
    demo = make_demo(data, tmp_path / "whole")
    return without_times(demo.execute()), weights_of(tmp_path / "whole")


def test_results_of_a_demo(data: ImageData, tmp_path: Path) -> None:
    demo = make_demo(data, tmp_path)
    results = demo.execute()
    assert [result.sparsity for result in results] == [0.0, 0.9, 0.9, 0.8]
    for result in results:
        assert result.accuracy == result.loaded_accuracy == result.curve[-1]
        assert len(result.curve) == RECIPE.epochs
        assert abs(result.measured_sparsity - result.sparsity) < (1e-4 if result.block == 1 else 0.01)
    assert results[1].file_bytes < 0.3 * results[0].file_bytes
    assert [result.inference_ratio is not None for result in results] == [False, False, True, False]
    demo_run.report(demo, 1.0)
    saved = json.loads((tmp_path / "results.json").read_text())
    assert [result["accuracy"] for result in saved["results"]] == [result.accuracy for result in results]
    assert saved["settings"]["seed"] == 0 and "MLP" in saved["settings"]["recipes"]
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / CHECKPOINT).exists()
    printed = demo.console.file.getvalue()  # type: ignore[attr-defined]
    assert "90.00" in printed and "One-shot 16x16" in printed and "same accuracy" in printed


@pytest.mark.parametrize(
    ("method", "step"),
    [("Dense", 1), ("Dense", 75), ("Spartan", 5), ("Spartan", 40), ("Spartan", 70), ("OneShot", 45)],
)
def test_interrupted_and_resumed_is_uninterrupted(
    data: ImageData,
    tmp_path: Path,
    uninterrupted: tuple[list[RunResult], dict[str, bytes]],
    method: str,
    step: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ctrl-C in the first step, a run's last step, the ramp, annealing, with masks fixed, after pruning."""
    pressed = False
    original = Training.train_step

    def train_step(self: Training, images: torch.Tensor, labels: torch.Tensor) -> float:
        nonlocal pressed
        loss = original(self, images, labels)
        if not pressed and self.step == step and self.sparsifier.method.name == method:
            pressed = True
            os.kill(os.getpid(), signal.SIGINT)
        return loss

    monkeypatch.setattr(Training, "train_step", train_step)
    with pytest.raises(Interrupted):
        make_demo(data, tmp_path / "cut").execute()
    resumed = make_demo(data, tmp_path / "cut")
    resumed.resume()
    assert without_times(resumed.execute()) == uninterrupted[0]
    assert weights_of(tmp_path / "cut") == uninterrupted[1]


def test_interrupted_command_says_how_to_resume(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_run, "QUICK", TINY)
    original = Training.train_step

    def train_step(self: Training, images: torch.Tensor, labels: torch.Tensor) -> float:
        if self.step == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, images, labels)

    monkeypatch.setattr(Training, "train_step", train_step)
    arguments = ["demo", "--quick", "--data", str(folder), "--out", str(tmp_path / "out")]
    assert cli.main(arguments) == 130
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Data:")
    assert shlex.split(lines[-1])[-len(arguments) - 3 :] == [
        *("demo", "--out", str(tmp_path / "out"), "--seed", "0", "--quick", "--data", str(folder)),
        "--resume",
    ]
    assert (tmp_path / "out" / CHECKPOINT).exists()
    monkeypatch.setattr(Training, "train_step", original)
    assert cli.main([*arguments, "--resume"]) == 0
    assert not (tmp_path / "out" / CHECKPOINT).exists()


def test_resume_refuses_what_it_cannot_go_on_from(data: ImageData, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no checkpoint to resume"):
        make_demo(data, tmp_path).resume()
    make_demo(data, tmp_path, seed=1)._save()
    with pytest.raises(ValueError, match="other settings: seed was 1, is 0"):
        make_demo(data, tmp_path).resume()


def test_checkpoint_is_whole_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"tensor": torch.arange(5), "text": "plain"})
    assert torch.equal(load_checkpoint(path)["tensor"], torch.arange(5))
    content = path.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    for damaged in (content[:-1], content + b"x", flipped):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"checkpoint\.pt: is damaged"):
            load_checkpoint(path)
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"checkpoint\.pt: is not a checkpoint"):
        load_checkpoint(path)


@pytest.mark.parametrize("plan", [FULL, QUICK])
def test_the_plan_compares_both_methods_at_the_same_sparsities(plan: Plan) -> None:
    assert len({run.key for run in plan.runs}) == len({run.label for run in plan.runs}) == len(plan.runs)
    for model in ("MLP", "ViT"):
        own = [run for run in plan.runs if run.model == model]
        assert own[0].method == "Dense"
        targets = {
            method: {(r.sparsity, r.block) for r in own if r.method == method} for method in ("Spartan", "One-shot")
        }
        assert targets["Spartan"] == targets["One-shot"] == {(0.9, 1), (0.95, 1), (0.98, 1), (0.9, 16)}
        assert model in plan.recipes
    for run in plan.runs:
        assert getattr(run.build(), "sparsity", 0.0) == run.sparsity


def test_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="'Guess'"):
        Run("MLP", "Guess", 0.5).build()


def test_the_announcement_says_when_the_data_is_another(data: ImageData) -> None:
    console = rich_console.Console(file=io.StringIO(), width=200)
    demo_run.announce(replace(data, name="scikit-learn's digits", source="scikit-learn"), console)
    assert "Fashion-MNIST could not be found" in console.file.getvalue()


def test_inference_is_compared_only_where_it_is_the_same(data: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    model = multilayer_perceptron(data.side, 10)
    with torch.no_grad():
        model.hidden1.weight[16:] = 0
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert 0 < inference_ratio(model, data, 16) < 1000
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    monkeypatch.setattr("spartan.demo.train.to_block_sparse", lambda other, block: other[:-1])
    with pytest.raises(ValueError, match="logits differ"):
        inference_ratio(nn.Sequential(*model, nn.Tanh()), data, 16)


def test_kept_fractions_count_zeros() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 10), nn.Linear(10, 2))
    with torch.no_grad():
        model[0].weight[:2] = 0
    kept, zeros = kept_fractions(model, hidden_matrices(model))
    assert kept == {"0.weight": pytest.approx(0.6), "1.weight": 1.0}
    assert zeros == pytest.approx(8 / 70)


def test_report_of_a_single_run(tmp_path: Path) -> None:
    result = RunResult("MLP", "Spartan", 0.9, 1, 0.9, 0.8, 0.8, None, 1e-3, 1e-4, None, 1000, {"0.weight": 0.1}, [0.8])
    assert results_table([result], "title").row_count == 1
    save_figure(tmp_path / "figure.png", [result], "title")
    assert (tmp_path / "figure.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="at least one run"):
        save_figure(tmp_path / "none.png", [], "title")
