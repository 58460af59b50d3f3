"""The command line: what it prints, its exit status, and how it fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import spartan_kernels
from spartan import cli
from spartan_kernels import __version__


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"spartan {__version__}\n"


def test_no_command_prints_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    printed = capsys.readouterr().out
    assert "info" in printed and "demo" in printed


def test_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["fly"])
    assert stopped.value.code == 2
    assert "fly" in capsys.readouterr().err


FACTS: dict[str, Any] = {
    "version": "9.9",
    "torch": "2.13.0",
    "native": {"available": False, "reason": "no compiler", "cuda": None},
    "devices": ["cpu"],
    "operators": {
        "first": {"cpu": {"auto": "reference", "native": "the native backend has no first", "reference": None}},
        "second": {"cpu": {"auto": "native", "native": None, "reference": None}},
        "third": {"cpu": {"auto": "reference", "native": "the native backend has no third", "reference": None}},
    },
}


@pytest.mark.parametrize("with_rich", [True, False])
def test_info_names_backends_and_reasons(
    with_rich: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if with_rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setattr(spartan_kernels, "info", lambda: FACTS)
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    for text in ("9.9", "2.13.0", "no compiler", "first", "second", "third", "auto"):
        assert text in printed
    assert printed.count("the native backend has no such operator") == 1, "equal reasons are given once"


def test_info_of_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert __version__ in printed
    assert all(operator in printed for operator in spartan_kernels.info()["operators"])


def test_demo_without_its_extra_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["demo"]) == 1
    assert "spartan-kernels[demo]" in capsys.readouterr().err


def test_demo_refuses_an_empty_data_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert cli.main(["demo", "--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("spartan: ") and "train-images-idx3-ubyte" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("device=foo", "device must be auto, cpu, cuda, cuda:0 or another of PyTorch's; got 'foo'"),
        ("device=''", "device must be auto, cpu, cuda, cuda:0 or another of PyTorch's; got ''"),
        ("device=meta", "device 'meta' is not there"),
        ("device=xpu", "device 'xpu' is not there"),
        (f"seed={2**64}", f"seed must be in [-2**40, 2**40]; got {2**64}"),
        (f"seed={2**40 + 1}", "seed must be in [-2**40, 2**40]; got"),
        (f"seed={-(2**40) - 1}", "seed must be in [-2**40, 2**40]; got"),
    ],
)
def test_train_names_a_device_or_seed_that_cannot_be(
    setting: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("yaml")
    file = tmp_path / "run.yaml"
    file.write_text("{task: text, model: {name: gpt}, method: {name: Dense}, steps: 1, batch_size: 1}")
    assert cli.main(["train", str(file), "--set", setting]) == 1
    assert message in capsys.readouterr().err


def test_import_is_light() -> None:
    """Importing the command line loads none of the libraries that only the demo needs."""
    heavy = "{'matplotlib', 'sklearn', 'rich', 'triton'}"
    code = f"import sys, spartan.cli; sys.exit(bool({heavy} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
