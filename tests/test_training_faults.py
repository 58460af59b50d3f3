"""Training that is killed, stopped, given damaged files or numbers that are not finite."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_images import write_set
from training_common import STEPS, config, environment, image_settings, saved_model, stop_at, text_settings

from spartan.training import trainer as training
from spartan.training.checkpoint import load_checkpoint
from spartan.training.interrupt import StopRequest, steps_to_next_look
from spartan.training.tasks import ImageTask
from spartan.training.trainer import CHECKPOINT, RESULTS, Trainer, TrainingFailed, train


@pytest.fixture(autouse=True)
def threads(thread_count: None) -> None:
    """Runs set the number of threads; it is restored."""


UNINTERRUPTED: dict[str, dict[str, bytes]] = {}


def whole(settings: dict[str, Any]) -> dict[str, bytes]:
    """The model of the same run without interruption; the folders do not matter to it."""
    key = json.dumps([settings["task"], settings["method"]])
    if key not in UNINTERRUPTED:
        other = {**settings, "out": settings["out"] + "-whole", "checkpoint_minutes": 60}
        assert train(config(other))
        UNINTERRUPTED[key] = saved_model(other)
    return UNINTERRUPTED[key]


@pytest.mark.parametrize(
    ("step", "number"), [(0, signal.SIGINT), (3, signal.SIGTERM), (15, signal.SIGINT), (STEPS - 2, signal.SIGTERM)]
)
def test_stopped_and_resumed_is_uninterrupted(
    step: int, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = image_settings(tmp_path)
    with monkeypatch.context() as patch:
        stop_at(step, number, patch)
        assert not train(config(settings))
    assert f"Stopped after step {step + 1}" in capsys.readouterr().out
    assert not (tmp_path / "run" / RESULTS).exists()
    assert train(config({**settings, "log_every": 3, "checkpoint_minutes": 9})), "these may differ"
    assert f"Going on from step {step + 1} of {STEPS}" in capsys.readouterr().out
    assert saved_model(settings) == whole(settings)


@pytest.mark.parametrize("method", ["RigL", "TopKAST", "GMP"])
def test_resumed_text_is_uninterrupted(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"backward_sparsity": 0.5} if method == "TopKAST" else {}
    settings = text_settings(tmp_path, method={"name": method, "sparsity": 0.8, "interval": 4, **own})
    with monkeypatch.context() as patch:
        stop_at(9, signal.SIGTERM, patch)
        assert not train(config(settings))
    assert train(config(settings))
    assert saved_model(settings) == whole(settings)


KILLED = """
import json, os, signal, sys
from spartan.training import trainer
from spartan.training.config import config_from
from spartan.saving import files

settings, moment = json.loads(sys.argv[1]), sys.argv[2]
original_step, original_disk = trainer.Trainer._train_step, files.to_disk
now = False

def train_step(self, examined):
    global now
    now = self.step >= 13
    if now and moment == "step":
        os.kill(os.getpid(), signal.SIGKILL)
    return original_step(self, examined)

def to_disk(path):
    if now and moment == "save":  # the temporary file is written, the checkpoint not yet replaced
        path.write_bytes(path.read_bytes()[:-100])
        os.kill(os.getpid(), signal.SIGKILL)
    original_disk(path)

trainer.Trainer._train_step = train_step
files.to_disk = to_disk
trainer.train(config_from(settings))
"""


@pytest.mark.parametrize(("moment", "steps"), [("step", 13), ("save", 13)])
def test_killed_and_resumed_is_uninterrupted(
    moment: str, steps: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL in the middle of a step, and of a save: the checkpoint before it is whole, what was half written goes."""
    settings = image_settings(tmp_path, checkpoint_minutes=0)  # one after each step
    command = [sys.executable, "-c", KILLED, json.dumps(settings), moment]
    killed = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    out = tmp_path / "run"
    assert load_checkpoint(out / CHECKPOINT)["step"] == steps
    assert len(list(out.glob(".*.tmp"))) == (moment == "save")
    assert train(config({**settings, "checkpoint_minutes": 60}))
    assert f"Going on from step {steps}" in capsys.readouterr().out
    assert not list(out.glob(".*.tmp"))
    assert saved_model(settings) == whole(settings)


SIGNALLED = """
import os, sys, time
from pathlib import Path
from spartan import cli
from spartan.training import interrupt
from spartan.training.interrupt import StopRequest
from spartan.training.trainer import Trainer

folder, step = Path(sys.argv[1]), int(sys.argv[2])
original_step, original_call, asked = Trainer._train_step, StopRequest.__call__, []

def train_step(self, examined):
    if self.step == step:  # wait for the signal, so that it comes in the middle of this step
        (folder / f"rank-{self.workers.rank}").touch()
        begin = time.monotonic()
        while not asked and time.monotonic() - begin < 100:
            time.sleep(0.01)
    return original_step(self, examined)

def call(self, number, frame):
    asked.append(number)
    original_call(self, number, frame)

Trainer._train_step, StopRequest.__call__ = train_step, call
interrupt.LOOK_SECONDS = 0.0  # as if steps were slow
sys.exit(cli.main(sys.argv[3:]))
"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.mark.skipif(not dist.is_available(), reason="PyTorch was built without torch.distributed")
def test_two_processes_stopped_by_torchrun_and_resumed_are_uninterrupted(tmp_path: Path) -> None:
    """A signal to torchrun, which passes it on to its processes: SIGTERM, later SIGINT, then the same command again."""
    file, script = tmp_path / "run.yaml", tmp_path / "signalled.py"
    settings = image_settings(tmp_path, log_every=1000)
    file.write_text(json.dumps(settings))
    script.write_text(SIGNALLED)
    stopped = [0]
    for number, step in ((signal.SIGTERM, 5), (signal.SIGINT, 14)):
        shown = signalled([*TORCHRUN, str(script), str(tmp_path), str(step), "train", str(file)], number, tmp_path)
        state = load_checkpoint(tmp_path / "run" / CHECKPOINT)
        assert state["step"] == step + 1, shown
        assert shown.count(f"Stopped after step {state['step']}; the same command goes on") == 1, shown
        assert shown.count(f"Going on from step {stopped[-1]} of") == (stopped[-1] > 0), shown
        stopped.append(state["step"])
    models = []
    for out, resumed in ((settings["out"], True), (settings["out"] + "-whole", False)):
        command = [*TORCHRUN, "-m", "spartan", "train", str(file), "--set", f"out={out}"]
        run = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr
        assert run.stdout.count(f"Going on from step {stopped[-1]} of {STEPS}") == resumed
        models.append(saved_model({"out": out}))
    assert models[0] == models[1]


def signalled(command: list[str], number: int, folder: Path) -> str:
    """What a command says that gets a signal once both ranks have left word in `folder`."""
    words = [folder / f"rank-{rank}" for rank in range(2)]
    said = folder / "said"
    with said.open("w") as stream:
        process = subprocess.Popen(command, env=environment(), stdout=stream, stderr=subprocess.STDOUT)
    try:
        begin = time.monotonic()
        while process.poll() is None and not all(word.exists() for word in words) and time.monotonic() - begin < 100:
            time.sleep(0.02)
        process.send_signal(number)
        process.wait(timeout=300)
    finally:
        process.kill()
    for word in words:
        word.unlink()
    return said.read_text()


def test_a_checkpoint_is_written_after_the_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, steps = [0.0], []
    monkeypatch.setattr(training.time, "monotonic", lambda: now[0])
    original = Trainer._train_step

    def train_step(self: Trainer, examined: bool) -> torch.Tensor:
        now[0] += 30.0
        return original(self, examined)

    monkeypatch.setattr(Trainer, "_train_step", train_step)
    monkeypatch.setattr(Trainer, "save", lambda self: steps.append(self.step))
    assert train(config(image_settings(tmp_path, checkpoint_minutes=2.5, evaluate_every=None)))
    assert steps == [5, 10, 15, 20]


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings of a run that was stopped after ten steps."""
    settings = image_settings(tmp_path)
    with monkeypatch.context() as patch:
        stop_at(9, signal.SIGINT, patch)
        assert not train(config(settings))
    return settings


def test_damaged_checkpoints_are_refused(stopped: dict[str, Any]) -> None:
    path = Path(stopped["out"]) / CHECKPOINT
    content = path.read_bytes()
    for damaged in (content[:-1], content[: len(content) // 2], content[:30]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"checkpoint\.pt: is damaged .*; remove it and start again"):
            train(config(stopped))
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"checkpoint\.pt: is not a checkpoint"):
        train(config(stopped))
    assert train(config(stopped), restart=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"name": "mlp", "hidden": [32, 16]}}, r"model.hidden was \[24, 16\], is \[32, 16\]"),
        ({"method": {"name": "Dense"}}, "method.name was 'Spartan', is 'Dense'"),
        ({"steps": 30}, "steps was 24, is 30"),
        ({"seed": 3}, "seed was 0, is 3"),
        ({"optimizer": {"clip": 2.0}}, "optimizer.clip was 1.0, is 2.0"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(stopped: dict[str, Any], change: Any, message: str) -> None:
    before = (Path(stopped["out"]) / CHECKPOINT).read_bytes()
    with pytest.raises(ValueError, match=f"of a run with other settings .*{message}"):
        train(config({**stopped, **change}))
    assert (Path(stopped["out"]) / CHECKPOINT).read_bytes() == before


def test_a_checkpoint_of_other_data_is_refused(stopped: dict[str, Any]) -> None:
    write_set(Path(stopped["data"]["folder"]), train=64, test=24)
    with pytest.raises(ValueError, match="of a run on other data"):
        train(config(stopped))


@pytest.mark.parametrize("what", ["loss", "gradient", "weight"])
def test_numbers_that_are_not_finite_stop_training(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = image_settings(tmp_path, checkpoint_minutes=0, evaluate_every=None)
    original, calls = ImageTask.loss, [0]

    def loss(self: ImageTask, model: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        value = original(self, model, inputs, targets)
        if calls[0] != (7 if what == "weight" else 8):  # the learning rate is that of the step after
            return value
        if what == "loss":
            return value * math.nan
        if what == "gradient":
            return value + (model.get_parameter("head.weight").sum() * 0).sqrt()  # 0 with an infinite derivative
        monkeypatch.setattr(training, "warmup_cosine", lambda *arguments: math.inf)
        return value

    monkeypatch.setattr(ImageTask, "loss", loss)
    rate = training.warmup_cosine
    messages = {"loss": "loss nan", "gradient": r"loss \d.*gradient nan", "weight": "weight 'hidden1.weight' must be"}
    with pytest.raises(TrainingFailed, match=f"broke down in step 8: {messages[what]}.*the last checkpoint stays in"):
        train(config(settings))
    state = load_checkpoint(tmp_path / "run" / CHECKPOINT)
    assert state["step"] == 7
    assert all(bool(torch.isfinite(value).all()) for value in state["model"].values())
    monkeypatch.setattr(ImageTask, "loss", original)
    monkeypatch.setattr(training, "warmup_cosine", rate)
    assert train(config({**settings, "checkpoint_minutes": 60}))
    assert saved_model(settings) == whole(settings)


def test_a_failure_before_any_checkpoint_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageTask, "loss", lambda self, model, inputs, targets: model(inputs).sum() * math.nan)
    with pytest.raises(TrainingFailed, match=r"broke down in step 1: loss nan.*there is no checkpoint yet"):
        train(config(image_settings(tmp_path)))


@pytest.mark.parametrize(
    ("seconds", "steps", "most", "expected"),
    [(1.0, 1, 10, 1), (40.0, 1, 10, 1), (0.5, 5, 1000, 10), (0.5, 5, 4, 4), (0.0, 1, 10, 10)],
)
def test_processes_look_for_a_signal_every_second(seconds: float, steps: int, most: int, expected: int) -> None:
    assert steps_to_next_look(seconds, steps, most) == expected


def test_a_later_signal_interrupts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("spartan.training.interrupt.time.monotonic", lambda: now[0])
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopRequest().listening() as stop:
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):  # as torchrun repeats what the terminal sent
            os.kill(os.getpid(), number)
        assert stop.asked
        now[0] = 2.0
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
