"""The README is short, its quick start trains a good model, and its tables are those of the committed results."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from bench import tables
from tests import pages
from tests.pages import README

TEXT = README.read_text(encoding="utf-8")


def test_the_readme_is_short() -> None:
    assert len(TEXT.splitlines()) <= 150
    assert len(TEXT.split()) <= 1500


def quick_start(seed: int, method: str = "spartan.Spartan(sparsity=0.9)") -> float:
    """Run the first example as printed, but for the method, and score the model it trains on inputs it has not seen."""
    example = next(block.code for block in pages.blocks(TEXT) if "Sparsifier" in block.code)
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


def test_tables_are_those_of_the_committed_results() -> None:
    found = tables.pages(pages.ROOT)
    names = {
        name for page in found for name in re.findall(r"<!-- results:([\w-]+) -->", page.read_text(encoding="utf-8"))
    }
    assert README in found and {"accuracy", "speed", "accuracy-short", "speed-short", "plans", "compiled"} <= names
    for page in found:
        text = page.read_text(encoding="utf-8")
        assert tables.rendered(text, tables.save.RESULTS) == text, f"run `python -m bench.tables` for {page}"


def test_a_table_that_differs_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "docs" / "results" / "accuracy.md"
    page.parent.mkdir(parents=True)
    (tmp_path / "README.md").write_text(TEXT, encoding="utf-8")
    text = (pages.ROOT / "docs" / "results" / "accuracy.md").read_text(encoding="utf-8")
    page.write_text(re.sub(r"\d\d\.\d\d ±", "99.99 ±", text), encoding="utf-8")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    with pytest.raises(typer.Exit):
        tables.main(check=True)
    tables.main(check=False)
    assert page.read_text(encoding="utf-8") == text
    tables.main(check=True)


def test_a_table_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="results:speeed is none of"):
        tables.rendered("<!-- results:speeed -->\n<!-- /results -->\n", tables.save.RESULTS)
