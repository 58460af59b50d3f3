"""Every example runs, and examples/README.md says what there is."""

from __future__ import annotations

import doctest
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_images import write_set

from spartan import cli
from spartan.training.config import Config, DataConfig, OptimizerConfig, SparsifierConfig, read
from spartan.training.tasks import ImageTask, TextTask

pytest.importorskip("yaml")
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
GUIDE = (EXAMPLES / "README.md").read_text(encoding="utf-8")

# What makes a run of each file one of a second; the data are made here.
SMALL = {
    "image_mlp": ["model.hidden=[16, 8]"],
    "image_cnn": ["model.widths=[4, 8]"],
    "image_vit": ["model.patch=4", "model.dim=16", "model.depth=1"],
    "language_model": ["model.context=16", "model.dim=16", "model.depth=1", "data.limit=4096"],
}


@pytest.fixture(autouse=True)
def threads(thread_count: None) -> None:
    """Models are tiny: more threads only wait for one another."""
    torch.set_num_threads(1)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_yaml_files_train(path: Path, tmp_path: Path) -> None:
    changes = ["steps=6", "batch_size=16", "evaluate_every=4", f"out={tmp_path / 'run'}", *SMALL[path.stem]]
    if read(path).task == "images":
        write_set(tmp_path / "data", train=64, test=20)
        changes += [f"data.folder={tmp_path / 'data'}"]
    else:
        changes += [f"data.folder={EXAMPLES}", "data.pattern=*.yaml", "data.evaluation_limit=512"]
    whole = read(path)
    assert cli.main(["train", str(path), "--set", *changes]) == 0
    result = json.loads((tmp_path / "run" / "results.json").read_text())
    assert result["sparsity"] == pytest.approx(whole.method["sparsity"], abs=0.05)  # to a block of a tiny model
    assert [entry["step"] for entry in result["evaluations"]] == [4, 6]
    assert result["history"] == [] and (tmp_path / "run" / "report.txt").read_text().startswith("Spartan, step 6 of 6")


def test_each_yaml_file_has_a_run_of_its_own() -> None:
    outs = [read(path).out for path in EXAMPLES.glob("*.yaml")]
    assert len(set(outs)) == len(outs) == len(SMALL)


def test_block_sparse_inference(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = str(EXAMPLES / "block_sparse_inference.py")
    monkeypatch.setattr(sys, "argv", [script, "--width", "96", "--block", "16", "--steps", "12"])
    runpy.run_path(script, run_name="__main__")
    shown = capsys.readouterr().out
    error = float(re.search(r"differ by (\S+) at most", shown)[1])  # type: ignore[index]
    assert error < 1e-5 and "16x16" in shown and "the same outputs" in shown


@pytest.mark.skipif(not dist.is_available(), reason="PyTorch was built without torch.distributed")
def test_multi_node(tmp_path: Path) -> None:
    """Two processes stop on the way, and one goes on from their checkpoint to the end."""

    def run(processes: int, *arguments: str) -> str:
        root = EXAMPLES.parent
        path = os.pathsep.join([str(root), str(root / "python")])
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += [str(EXAMPLES / "multi_node.py"), "--folder", str(tmp_path), "--steps", "12", "--every", "4"]
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [*command, *arguments], env=environment, capture_output=True, text=True, timeout=240, check=True
        ).stdout

    assert "step 6:" in run(2, "--stop-after", "6")
    shown = run(1)
    assert "going on from step-6" in shown and "step 12:" in shown
    model = torch.load(tmp_path / "model.pt", weights_only=True)
    hidden = [model["0.weight"], model["2.weight"]]
    zeros = sum(int((weight == 0).sum()) for weight in hidden) / sum(weight.numel() for weight in hidden)
    assert abs(zeros - 0.9) < 0.005  # to one block


def test_the_quick_start_is_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    failures, tried = doctest.testfile(str(EXAMPLES / "README.md"), module_relative=False)
    assert tried > 10 and failures == 0


def test_the_guide_names_every_example_and_every_file_it_names_is_there() -> None:
    named = set(re.findall(r"examples/(\w+\.\w+)", GUIDE))
    there = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".yaml")}
    assert named == there


def test_commands_of_the_guide_are_understood() -> None:
    """Each `spartan train` with its changes makes settings."""
    text = GUIDE.replace("\\\n", " ")
    commands = [shlex.split(line, comments=True) for line in re.findall(r"^.*spartan train examples.*$", text, re.M)]
    assert len(commands) >= len(SMALL)
    for command in commands:
        file, *rest = command[command.index("train") + 1 :]
        assert rest[:1] in ([], ["--set"])
        read(EXAMPLES.parent / file, rest[1:])


def test_the_table_has_every_setting() -> None:
    table = GUIDE[GUIDE.index("## Settings") :]
    kinds = (Config, DataConfig, OptimizerConfig, SparsifierConfig)
    for name in {entry.name for kind in kinds for entry in fields(kind)}:
        assert f"`{name}`" in table, name
    for name in (*ImageTask.models, *TextTask.models):
        assert f"`{name}`" in table, name
