"""Every script of the documentation is complete and does what its text says."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "in-your-trainer.md"
SCRIPTS = {
    name: code
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    for name in re.findall(r"\A# (\w+\.py)\n", code)
}
SPARSITY = {"plain.py": 0.9, "trainer.py": 0.6, "accelerated.py": 0.9, "lit.py": 0.9, "two.py": 0.9}


def test_every_script_of_the_page_is_run() -> None:
    assert set(SCRIPTS) == set(SPARSITY)
    assert len(SCRIPTS) == PAGE.read_text(encoding="utf-8").count("```python")


@pytest.mark.parametrize("name", SPARSITY)
def test_scripts_run_as_printed(name: str, tmp_path: Path) -> None:
    for package in ("transformers", "accelerate", "lightning"):
        if re.search(rf"^(import|from) {package}\b", SCRIPTS[name], re.M) and not importlib.util.find_spec(package):
            pytest.skip(f"{package} is not installed: the extra `integrations`")
    (tmp_path / name).write_text(SCRIPTS[name], encoding="utf-8")
    path = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, name], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr
    found = re.search(r"(\d\.\d+) of the (?:parameters|masked weights) are zero", run.stdout)
    assert found is not None and float(found[1]) == pytest.approx(SPARSITY[name], abs=0.01), run.stdout


def test_links_lead_somewhere() -> None:
    text = PAGE.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", text)
    headings = {
        re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-") for line in re.findall(r"^#+ (.*)$", text, re.M)
    }
    assert links
    for link in links:
        place, _, section = link.partition("#")
        assert (PAGE.parent / place).exists() if place else section in headings, link
