"""The GitHub action: its steps' commands run, with what its inputs say, away from the checkout."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def action() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text())
    return found


def run_step(action: dict[str, Any], name: str, folder: Path, **inputs: str) -> subprocess.CompletedProcess[str]:
    """A step as the runner runs it, its expressions replaced by the inputs or their defaults."""
    (step,) = [step for step in action["runs"]["steps"] if step["name"] == name]
    values = {f"${{{{ inputs.{key} }}}}": inputs.get(key, one["default"]) for key, one in action["inputs"].items()}
    values["${{ github.action_path }}"] = str(ROOT)
    environment = {key: values[value] for key, value in step["env"].items()}  # not declared: KeyError
    assert "${{" not in step["run"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", step["run"]],
        env={**os.environ, **environment, "RUNNER_TEMP": str(folder), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_it_is_a_composite_action_whose_conditions_name_its_inputs(action: dict[str, Any]) -> None:
    assert action["runs"]["using"] == "composite" and action["description"]
    for step in action["runs"]["steps"]:
        assert step["shell"] == "bash"
        if "if" in step:
            assert step["if"].split()[0].removeprefix("inputs.") in action["inputs"]


def test_the_check_runs_the_smoke_test_on_the_device_asked_for(action: dict[str, Any], tmp_path: Path) -> None:
    done = run_step(action, "Check", tmp_path, python=sys.executable, device="cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " right in " in done.stdout and " cuda " not in done.stdout
    wrong = run_step(action, "Check", tmp_path, python=sys.executable, device="abacus")
    assert wrong.returncode == 2 and "abacus" in wrong.stderr


@pytest.mark.parametrize(
    "name, device, expected",
    [
        ("Install", "", f"-m pip install --quiet {ROOT}"),
        ("Check", "", "-m spartan_kernels.smoke"),
        ("Time", "cuda", "-m spartan bench --device cuda"),
    ],
)
def test_the_commands(action: dict[str, Any], tmp_path: Path, name: str, device: str, expected: str) -> None:
    recorder = tmp_path / "python"
    recorder.write_text('#!/bin/sh\necho "$@"\n')
    recorder.chmod(recorder.stat().st_mode | stat.S_IXUSR)
    done = run_step(action, name, tmp_path, python=str(recorder), device=device)
    assert done.returncode == 0 and done.stdout.strip() == expected
