"""Each recipe runs in seconds on small data and writes its results and figure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_images import write_set

ROOT = Path(__file__).resolve().parent.parent


def results(name: str, folder: Path, *arguments: str) -> list[dict[str, float]]:
    """Records of a trial of one recipe."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    script = ROOT / "examples" / "layers" / f"{name}.py"
    command = [sys.executable, str(script), "--quick", "--out", str(folder), *arguments]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=True, capture_output=True)
    assert (folder / f"{name}.png").stat().st_size > 0
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["results"]


def test_sparse_tables_keep_what_their_budget_allows(tmp_path: Path) -> None:
    records = results("embedding_tables", tmp_path)
    (dense,) = (record for record in records if record["method"] == "dense")
    sparse = [record for record in records if "budget" in record["method"] or "by table" in record["method"]]
    assert len(sparse) == 8
    for record in sparse:
        assert record["parameters"] == pytest.approx((1 - record["sparsity"]) * dense["parameters"], abs=0.06)
        if "by table" in record["method"]:
            assert record["users"] == pytest.approx(record["items"], abs=0.1)
    assert all(0 <= record["recall"] <= 100 for record in records)


def test_continual_learning_counts_fewer_flops_with_masks(tmp_path: Path) -> None:
    write_set(tmp_path / "data", train=400, test=100, side=16)
    records = results("continual_learning", tmp_path, "--data", str(tmp_path / "data"))
    flops = {record["method"]: record["flops"] for record in records}
    assert flops["dense, no buffer"] < flops["dense"]
    assert flops["+ fewer samples"] < flops["+ gradient masks"] < flops["masks by task"] < flops["dense"] / 2
    for record in records:
        assert 0 <= record["accuracy"] <= 100 and 0 <= record["forgetting"] <= 100
        if record["method"].startswith("dense"):
            assert record["zeros"] < 1
        else:
            assert record["zeros"] >= 89.9  # a grown weight may still be zero
