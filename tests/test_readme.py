"""The README's example runs as pasted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import typer

from bench import tables

README = Path(__file__).resolve().parent.parent / "README.md"


def examples() -> list[str]:
    """The Python code of the README."""
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def quick_start(seed: int, method: str = "spartan.Spartan(sparsity=0.9)") -> float:
    """Run the first example as printed, but for the method, and score the model it trains on inputs it has not seen."""
    example = next(e for e in examples() if "Sparsifier" in e)
    printed = "spartan.Spartan(sparsity=0.9)"
    assert example.count(printed) == 1
    torch.manual_seed(seed)
    made: dict[str, Any] = {}
    exec(compile(example.replace(printed, method), str(README), "exec"), made)
    x = torch.randn(4000, 64, generator=torch.Generator().manual_seed(99))
    with torch.no_grad():
        return float((made["model"](x).argmax(1) == x[:, :10].argmax(1)).float().mean())


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for what the example saves, and one thread."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_quick_start_learns_its_task_as_well_as_a_dense_model(
    seed: int, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sparse = quick_start(seed)
    assert capsys.readouterr().out == "0.9000 of the parameters are zero\n"
    assert (elsewhere / "sparse-model" / "model.safetensors").exists()
    assert sparse > 0.8
    assert sparse > quick_start(seed, "spartan.Dense()") - 0.02


@pytest.mark.usefixtures("elsewhere", "one_thread")
def test_the_quick_start_s_score_sees_a_model_at_chance() -> None:
    """As the published settings leave it, with these weights and so few steps."""
    assert quick_start(0, "spartan.Spartan.paper(sparsity=0.9)") < 0.2


def test_budgets_and_costs(capsys: pytest.CaptureFixture[str]) -> None:
    text = README.read_text(encoding="utf-8").partition("### Budgets and costs")[2]
    example, shown = re.findall(r"```(?:python)?\n(.*?)```", text, re.DOTALL)[:2]
    torch.manual_seed(0)
    exec(compile(example, str(README), "exec"), {})
    lines, wanted = capsys.readouterr().out.splitlines(), shown.splitlines()
    assert lines[:3] == wanted[:3]
    assert lines[3].partition("%")[0][:-1] == wanted[3].partition("%")[0][:-1]  # which are zero depends on the weights


@pytest.mark.skipif(not dist.is_available(), reason="PyTorch was built without torch.distributed")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("train_sharded.py", "0.900 of the masked weights are zero, on 2 ranks\n"),
        ("masks.py", "budget 1894.4: soft masks sum to 1894.4, hard masks keep 1894\n"),
    ],
)
def test_over_two_processes(name: str, expected: str, tmp_path: Path) -> None:
    script = tmp_path / name
    script.write_text(next(e for e in examples() if e.startswith(f"# {name}, run by: torchrun")), encoding="utf-8")
    root = README.parent
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "python")]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert shown.stdout == expected, shown.stderr


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README.read_text(encoding="utf-8"))
    assert links and all((README.parent / link).exists() for link in links)


def test_tables_are_those_of_the_committed_results() -> None:
    text = README.read_text(encoding="utf-8")
    assert "<!-- results:accuracy -->" in text and "<!-- results:speed -->" in text
    assert tables.rendered(text, tables.save.RESULTS) == text


def test_a_table_that_differs_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = tmp_path / "README.md"
    text = README.read_text(encoding="utf-8")
    changed.write_text(re.sub(r"\d\d\.\d\d ±", "99.99 ±", text), encoding="utf-8")
    monkeypatch.setattr(tables, "README", changed)
    with pytest.raises(typer.Exit):
        tables.main(check=True)
    tables.main(check=False)
    assert changed.read_text(encoding="utf-8") == text
