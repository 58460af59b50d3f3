"""`spartan train`: settings, data, both tasks, several processes."""

from __future__ import annotations

import io
import itertools
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from training_common import STEPS, config, environment, image_settings, saved_model, stop_at, text_settings

import spartan
from spartan import cli, methods
from spartan.methods import GMP, Powerpropagation, Spartan
from spartan.training import text as text_data
from spartan.training.config import config_from, read
from spartan.training.models import ByteTransformer, ResidualNetwork
from spartan.training.progress import Progress
from spartan.training.tasks import ImageTask, Slice, TextTask, make_method, make_task
from spartan.training.text import load_text, standard_library
from spartan.training.trainer import RESULTS, load_run, train

yaml = pytest.importorskip("yaml")


@pytest.fixture(autouse=True)
def threads(thread_count: None) -> None:
    """Runs set the number of threads; it is restored."""


def results(settings: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(settings["out"]) / RESULTS).read_text())
    return found


MINIMAL: dict[str, Any] = {
    "task": "images",
    "model": {"name": "mlp"},
    "method": {"name": "Dense"},
    "steps": 5,
    "batch_size": 4,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stepps": 5}, "unknown setting 'stepps'; did you mean 'steps'"),
        ({"data": {"limt": 5}}, "unknown setting 'data.limt'; did you mean 'limit'"),
        ({"zzz": 1}, "unknown setting 'zzz'; known: task, model"),
        ({"steps": "many"}, "steps must be an int; got 'many'"),
        ({"steps": True}, "steps must be an int; got True"),
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"task": "sound"}, "task must be one of images, text; got 'sound'"),
        ({"precision": "float8"}, "precision must be one of float32, bfloat16; got 'float8'"),
        ({"optimizer": {"learning_rate": [1]}}, r"optimizer.learning_rate must be a number; got \[1\]"),
        ({"optimizer": {"learning_rate": float("nan")}}, "optimizer.learning_rate must be at least 0; got nan"),
        ({"optimizer": {"warmup": 1}}, r"optimizer.warmup must be in \[0, 1\); got 1"),
        ({"optimizer": {"clip": 0}}, "optimizer.clip must be above 0, or null; got 0"),
        ({"sparsifier": {"costs": "time"}}, "sparsifier.costs must be one of parameters, flops; got 'time'"),
        ({"optimizer": 3}, "optimizer must be a mapping; got 3"),
        ({"model": {"hidden": [3]}}, "model must have a name"),
        ({"data": {"limit": 0}}, "data.limit must be at least 1; got 0"),
        ({"threads": 1.5}, "threads must be an int or null; got 1.5"),
    ],
)
def test_wrong_settings_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        config_from({**MINIMAL, **change})


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match="steps is missing"):
        config_from({key: value for key, value in MINIMAL.items() if key != "steps"})


def test_a_file_with_changes(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("task: images\nmodel: {name: mlp}\nmethod: {name: Dense}\nsteps: 5\nbatch_size: 4\n")
    read_back = read(
        path, ["steps=7", "optimizer.learning_rate=2e-3", "data.pattern=*.md", "data.limit=100", "model.hidden=[3, 4]"]
    )
    assert (read_back.steps, read_back.optimizer.learning_rate, read_back.data.limit) == (7, 0.002, 100)
    assert read_back.data.pattern == "*.md"
    assert read_back.model == {"name": "mlp", "hidden": [3, 4]}
    with pytest.raises(ValueError, match=r"run.yaml: a change must be KEY=VALUE"):
        read(path, ["steps"])
    with pytest.raises(ValueError, match=r"run.yaml: 'steps\.a' cannot be set"):
        read(path, ["steps.a=3"])
    path.write_text("steps: 5\nsteps: 6\n")
    with pytest.raises(ValueError, match=r"run.yaml: a key is there twice among steps, steps"):
        read(path)
    path.write_text("a: [1\n")
    with pytest.raises(ValueError, match=r"run.yaml: is not YAML"):
        read(path)
    path.write_text("- 1\n")
    with pytest.raises(ValueError, match="must be a mapping of settings"):
        read(path)


def test_without_pyyaml_the_command_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    (tmp_path / "run.yaml").write_text("steps: 5\n")
    assert cli.main(["train", str(tmp_path / "run.yaml")]) == 1
    assert "spartan-kernels[train]" in capsys.readouterr().err


def test_methods_by_name() -> None:
    assert make_method({"name": "Spartan", "sparsity": 0.5, "block_size": [4, 8]}) == Spartan(
        sparsity=0.5, block_size=(4, 8)
    )
    nested = {"name": "Powerpropagation", "alpha": 3.0, "method": {"name": "GMP", "sparsity": 0.5}}
    assert make_method(nested) == Powerpropagation(GMP(sparsity=0.5), alpha=3.0)
    with pytest.raises(ValueError, match=r"unknown setting 'method.name.Spartn'; did you mean 'Spartan'"):
        make_method({"name": "Spartn"})
    with pytest.raises(ValueError, match=r"unknown setting 'method.sparsty'; did you mean 'sparsity'"):
        make_method({"name": "GMP", "sparsty": 0.5})
    with pytest.raises(ValueError, match=r"method: sparsity must be in \[0, 1\)"):
        make_method({"name": "GMP", "sparsity": 1.5})
    with pytest.raises(ValueError, match=r"unknown setting 'method.method.alpa'"):
        make_method({"name": "Powerpropagation", "method": {"name": "GMP", "alpa": 3.0}})


def test_wrong_models_are_refused_by_name(tmp_path: Path) -> None:
    task = make_task(config(image_settings(tmp_path)), print)
    for model, message in (
        ({"name": "mpl"}, "model.name must be one of mlp, cnn, vit; got 'mpl'"),
        ({"name": "mlp", "hiden": [3]}, "unknown setting 'model.hiden'; did you mean 'hidden'"),
        ({"name": "mlp", "hidden": 3}, "model.hidden must be a list, each an int; got 3"),
        ({"name": "mlp", "side": 3}, "unknown setting 'model.side'"),
        ({"name": "vit", "depth": "two"}, "model.depth must be an int; got 'two'"),
        ({"name": "vit", "patch": 3}, "side must be a multiple of patch; got side 8, patch 3"),
        ({"name": "vit", "dim": 10, "heads": 4}, "dim must be a multiple of heads; got dim 10, heads 4"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            task.model(model)


def test_models_have_the_shapes_they_say() -> None:
    network = ResidualNetwork(8, 10, widths=(4, 6), depth=2)
    assert network(torch.randn(3, 1, 8, 8)).shape == (3, 10)
    assert [name for name, _ in network.named_children()][3:7] == [
        f"stage{stage}_block{block}" for stage in (1, 2) for block in (1, 2)
    ]
    assert ByteTransformer(context=8, dim=16, depth=2, heads=2)(torch.randint(256, (3, 5))).shape == (3, 5, 256)


def test_the_language_model_does_not_look_ahead() -> None:
    torch.manual_seed(0)
    model = ByteTransformer(context=12, dim=16, depth=2, heads=2).eval()
    tokens = torch.randint(256, (2, 12))
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 256
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert (before[:, 7:] - after[:, 7:]).abs().min(0).values.max() > 0


def test_text_is_read_in_order_and_some_held_out(tmp_path: Path) -> None:
    for index in range(25):
        (tmp_path / f"{index:02}.py").write_bytes(bytes([index] * 10))
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_bytes(b"x" * 99)
    data = load_text(tmp_path)
    assert sorted({*data.held_out.tolist()}) == [1, 21] and len(data.held_out) == 20
    assert data.train.tolist() == [i for i in range(25) if i not in (1, 21) for _ in range(10)]
    assert len(load_text(tmp_path, limit=15, held_out_limit=3).train) == 15
    with pytest.raises(ValueError, match="has 0 files named"):
        load_text(tmp_path, "*.c")
    with pytest.raises(ValueError, match="is not a folder"):
        load_text(tmp_path / "none")


def test_the_standard_library_is_the_text_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (standard_library() / "dataclasses.py").is_file()
    (tmp_path / "a.py").write_text("one")
    (tmp_path / "b.py").write_text("two")
    monkeypatch.setattr(text_data, "standard_library", lambda: tmp_path)
    assert bytes(load_text().train.tolist()) == b"one" and bytes(load_text().held_out.tolist()) == b"two"


@pytest.mark.parametrize("make", [image_settings, text_settings])
def test_parts_of_a_batch_are_the_batch(make: Any, tmp_path: Path) -> None:
    task = make_task(config(make(tmp_path)), print)
    for step in (0, 3, 5):
        whole = task.batch(step, 16, 7, Slice())
        parts = [task.batch(step, 16, 7, Slice(index, 4)) for index in range(4)]
        for index, tensor in enumerate(whole):
            assert torch.equal(torch.stack([part[index] for part in parts], 1).flatten(0, 1), tensor)
        assert not torch.equal(whole[0], task.batch(step + 1, 16, 7, Slice())[0])
        assert not torch.equal(whole[0], task.batch(step, 16, 8, Slice())[0])


def test_an_epoch_shows_every_image_once(tmp_path: Path) -> None:
    task = make_task(config(image_settings(tmp_path)), print)
    assert isinstance(task, ImageTask)
    seen = torch.cat([task.batch(step, 16, 0, Slice())[0] for step in range(4, 8)])
    assert torch.equal(seen.sum((1, 2, 3)).sort().values, task.data.train_images.sum((1, 2, 3)).sort().values)


def test_targets_of_text_are_the_bytes_after(tmp_path: Path) -> None:
    task = make_task(config(text_settings(tmp_path)), print)
    assert isinstance(task, TextTask)
    for inputs, targets in (task.batch(3, 16, 0, Slice()), *task.held_out()):
        assert inputs.shape == targets.shape and torch.equal(inputs[:, 1:], targets[:, :-1])


def test_score_is_that_of_all_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spartan.training.tasks.EVALUATION_BATCH", 6)
    task = make_task(config(image_settings(tmp_path)), print)
    assert isinstance(task, ImageTask)
    model = task.model({"name": "mlp", "hidden": [8]})
    parts = sum(task.score(model, torch.device("cpu"), Slice(index, 3)) for index in range(3))
    logits = model(task.data.test_images)
    loss = torch.nn.functional.cross_entropy(logits, task.data.test_labels, reduction="sum")
    right = int((logits.argmax(1) == task.data.test_labels).sum())
    torch.testing.assert_close(parts, torch.tensor([loss.item(), right, 20.0], dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("make", [image_settings, text_settings])
def test_a_run_leaves_a_sparse_model_and_its_figures(
    make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = make(tmp_path)
    assert train(config(settings))
    found = results(settings)
    model = load_run(tmp_path / "run")
    zeros = sum(int((p == 0).sum()) for p in model.parameters())
    assert zeros / sum(p.numel() for p in model.parameters()) == pytest.approx(found["file_sparsity"])
    assert found["sparsity"] == pytest.approx(0.8, abs=1e-3) and found["steps"] == STEPS
    assert 0 <= found["metrics"]["accuracy"] <= 1 and found["metrics"]["loss"] > 0
    if make is text_settings:
        assert found["metrics"]["bits_per_byte"] == pytest.approx(found["metrics"]["loss"] / 0.693147, rel=1e-5)
        assert found["metrics"]["loss"] < 5.0, "guessing costs log 256 = 5.5"
    else:
        assert [entry["step"] for entry in found["evaluations"]] == [8, 16, 24]
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
    assert f"{found['sparsity']:.2%} zeros" in capsys.readouterr().out
    assert train(config(settings)), "trained already"
    assert "Trained already" in capsys.readouterr().out
    before = saved_model(settings)
    assert train(config(settings), restart=True)
    assert saved_model(settings) == before, "the same seed, the same model"
    assert train(config({**settings, "seed": 1}), restart=True)
    assert saved_model(settings) != before


@pytest.mark.parametrize("name", [n for n in methods.__all__ if n not in ("Method", "SparseMethod", "Dense")])
def test_every_method_trains_by_its_name(name: str, tmp_path: Path) -> None:
    own: dict[str, Any] = {"sparsity": 0.5}
    if name == "TopKAST":
        own["backward_sparsity"] = 0.25
    if name == "Powerpropagation":
        own = {"method": {"name": "GMP", "sparsity": 0.5}}
    settings = image_settings(tmp_path, method={"name": name, **own}, evaluate_every=None, log_every=5)
    assert train(config(settings))
    found = results(settings)
    assert found["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert [row["step"] for row in found["history"]] == [5, 10, 15, 20]
    assert found["history"][-1]["sparsity"] == pytest.approx(0.5, abs=0.05)


def test_sparsity_in_operations(tmp_path: Path) -> None:
    """A convolution's weights cost more operations the larger its images are."""
    changes = {"model": {"name": "cnn", "widths": [4, 8]}, "sparsifier": {"costs": "flops"}, "evaluate_every": None}
    assert train(config(image_settings(tmp_path, **changes)))
    model = load_run(tmp_path / "run")
    convolutions = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)}
    pixels = {name: 16 if name.startswith("stage2") else 64 for name in convolutions}
    dense = sum(pixels[name] * m.weight.numel() for name, m in convolutions.items())
    kept = sum(pixels[name] * int(m.weight.count_nonzero()) for name, m in convolutions.items())
    assert dense * (0.2 - 64 / dense) <= kept <= 0.2 * dense * (1 + 1e-5)


def test_the_gradient_is_clipped_and_autocast_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms, dtypes = [], set()
    original = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, *args: Any) -> Any:
        gradients = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
        norms.append(torch.cat(gradients).norm().item())
        return original(self, *args)

    def loss(self: ImageTask, model: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = model(inputs)
        dtypes.add(logits.dtype)
        return torch.nn.functional.cross_entropy(logits.float(), targets)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    monkeypatch.setattr(ImageTask, "loss", loss)
    changes = {"method": {"name": "Dense"}, "optimizer": {"clip": 0.01}, "precision": "bfloat16"}
    assert train(config(image_settings(tmp_path, **changes)))
    assert norms and max(norms) <= 0.0101
    assert dtypes == {torch.bfloat16}


def test_a_batch_larger_than_the_data_is_refused(tmp_path: Path) -> None:
    settings = image_settings(tmp_path, batch_size=65)
    with pytest.raises(ValueError, match="batch_size 65 is larger than the 64 training images"):
        train(config(settings))


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(image_settings(tmp_path, model={"name": "vit", "patch": 4, "dim": 16, "depth": 1})))
    yield path


def test_the_command(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", str(file), "--set", "steps=3", "data.limit=32", "--set", "seed=5"]) == 0
    found = results(yaml.safe_load(file.read_text()))
    assert found["steps"] == 3 and found["settings"]["seed"] == 5 and "32 training" in found["data"]
    capsys.readouterr()
    assert cli.main(["train", str(file), "--set", "stps=3"]) == 1
    assert capsys.readouterr().err == f"spartan: {file}: unknown setting 'stps'; did you mean 'steps'?\n"


WATCHED = """
import sys
from pathlib import Path
from spartan import cli
status = cli.main(sys.argv[1:])
threads = [thread.read_text().strip() for thread in Path("/proc/self/task").glob("*/comm")]
print("Threads left:", sum("gloo" in name for name in threads), flush=True)
sys.exit(status)
"""


@pytest.mark.skipif(not dist.is_available(), reason="PyTorch was built without torch.distributed")
def test_two_processes_train_what_one_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two go on from the checkpoint of one; without batch normalisation, as a process knows its part of a batch."""
    settings = image_settings(tmp_path, model={"name": "mlp", "hidden": [24, 16], "normalise": False})
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert cli.main(["train", str(file), "--set", f"out={alone}"]) == 0
    with monkeypatch.context() as patch:
        stop_at(5, signal.SIGTERM, patch)
        assert cli.main(["train", str(file), "--set", f"out={together}"]) == 130
    script = tmp_path / "watched.py"
    script.write_text(WATCHED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    command += ["train", str(file), "--set", f"out={together}"]
    shown = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("Data:") == 1 and shown.stdout.count("Going on from step 6") == 1, "one process speaks"
    assert shown.stdout.count("Threads left: 0") == 2, "a thread that meets the interpreter's end aborts the process"
    models = []
    for out in (alone, together):
        models.append(make_task(config(settings), print).model(settings["model"]))
        spartan.load_pretrained(models[-1], out / "model")
    for (name, ours), theirs in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=name)
        assert torch.equal(ours == 0, theirs == 0), name
    figures = [json.loads((out / RESULTS).read_text()) for out in (alone, together)]
    assert [found["processes"] for found in figures] == [1, 2]
    assert figures[0]["metrics"] == pytest.approx(figures[1]["metrics"], rel=1e-3)


class Terminal(io.StringIO):
    """Standard output that a person watches."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("watched", "rich"), [(True, True), (True, False), (False, True)])
def test_progress_is_shown_now_and_then(watched: bool, rich: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setitem(sys.modules, "rich.progress", None)
    now, asked, shown = [0.0], [], Terminal() if watched else io.StringIO()
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr("spartan.training.progress.time.monotonic", lambda: now[0])

    def note(step: int) -> str:
        asked.append(step)
        return f"all is well at {step}"

    with Progress(1000, 0, shown=True) as progress:
        for step in range(1, 1001):
            now[0] += 0.1
            progress.update(step, partial(note, step))
    pauses = {later - earlier for earlier, later in itertools.pairwise(asked[:-1])}
    assert asked[-1] == 1000 and min(pauses) >= (5 if watched and rich else 100), "the last step is shown anyway"
    assert "all is well at 1000" in shown.getvalue()
    if not (watched and rich):
        assert shown.getvalue().splitlines()[-1] == "step 1,000 of 1,000: all is well at 1000"
    before = len(asked)
    with Progress(10, 0, shown=False) as progress:
        progress.update(10, partial(note, 10))
    assert len(asked) == before
