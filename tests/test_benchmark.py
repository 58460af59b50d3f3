"""`spartan bench`: what is wrong is not timed, what is right has its peers beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spartan import cli
from spartan.cli import benchmark
from spartan_kernels import ops

pytestmark = pytest.mark.usefixtures("one_thread")
_SOFT = ("soft_topk", "soft_topk_global", "masked_linear", "masked_weight", "block_sparse_linear")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_operator_is_right_and_timed_beside_peers(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--quick", "--device", "cpu", "--dtype", dtype]) == 0
    printed = capsys.readouterr().out
    for name in (*_SOFT, "hard_topk"):
        (line,) = [line for line in printed.splitlines() if line.strip().startswith(f"{name},")]
        assert "x" in line and ("copy" in line or "dense" in line)


@pytest.mark.parametrize("name", _SOFT)
def test_a_wrong_operator_is_told_and_not_timed(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = getattr(ops, name)

    def wrong(*arguments: Any, **settings: Any) -> Any:
        result = right(*arguments, **settings)
        return [part * 1.01 for part in result] if isinstance(result, list) else result * 1.01

    monkeypatch.setattr(ops, name, wrong)
    found = list(benchmark.measure("cpu", quick=True))
    (bad,) = [one for one in found if one.wrong]
    assert bad.name.startswith(f"{name},") and bad.seconds == 0 and not bad.peers
    assert cli.main(["bench", "--quick", "--device", "cpu"]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.strip().startswith(f"{name},")]
    assert " wrong " in line and str(bad.wrong)[:40] in line


def test_a_wrong_hard_mask_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "hard_topk", lambda v, k, backend=None: torch.zeros_like(v, dtype=torch.bool))
    (bad,) = [one for one in benchmark.measure("cpu", quick=True) if one.wrong]
    assert bad.name.startswith("hard_topk") and "not the hard top-k" in str(bad.wrong)


def test_what_cannot_be_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--quick", "--device", "cpu", "--backend", "abacus"]) == 1
    assert "abacus" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert cli.main(["bench", "--quick", "--device", "cuda"]) == 1
        assert "no CUDA device" in capsys.readouterr().err
