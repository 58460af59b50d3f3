"""The smoke test covers every operator, passes here, and fails on a wrong kernel."""

from __future__ import annotations

import pytest
import torch

from spartan_kernels import dispatch, smoke
from spartan_kernels.backends.reference import masked_weight


def test_there_is_a_probe_for_every_operator() -> None:
    assert [probe.operator for probe in smoke.probes()] == list(dispatch.SUPPORT)


def test_smoke_passes_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert smoke.main(["--device", "cpu"]) == 0
    assert "WRONG" not in capsys.readouterr().out


def test_smoke_sees_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = masked_weight.block_scores
    wrong_on_float32 = lambda w, r, c: right(w, r, c) * (1.001 if w.dtype == torch.float32 else 1)  # noqa: E731
    dispatch.implementation.cache_clear()
    monkeypatch.setattr(masked_weight, "block_scores", wrong_on_float32)
    try:
        assert smoke.main(["--device", "cpu"]) == 1
    finally:
        dispatch.implementation.cache_clear()
    assert "block_scores                         cpu   reference  WRONG" in capsys.readouterr().out


def test_a_device_that_is_not_here_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has the device")
    assert smoke.main(["--device", "cuda"]) == 1
    assert "device cuda is not here" in capsys.readouterr().out
