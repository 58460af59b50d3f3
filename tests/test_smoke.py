"""The smoke test covers every operator, passes here, and fails on a wrong kernel."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest
import torch

from spartan_kernels import dispatch, probes, smoke
from spartan_kernels.backends.reference import masked_weight


def test_there_is_a_probe_for_every_operator() -> None:
    assert [probe.operator for probe in probes.probes()] == list(dispatch.SUPPORT)


def test_smoke_passes_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert smoke.main(["--device", "cpu"]) == 0
    assert "WRONG" not in capsys.readouterr().out


def test_smoke_sees_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = masked_weight.block_scores
    wrong_on_float32 = lambda o: right(o) * (1.001 if o.weight.dtype == torch.float32 else 1)  # noqa: E731
    dispatch.implementation.cache_clear()
    monkeypatch.setattr(masked_weight, "block_scores", wrong_on_float32)
    try:
        assert smoke.main(["--device", "cpu"]) == 1
    finally:
        dispatch.implementation.cache_clear()
    assert "block_scores                         cpu   reference  WRONG" in capsys.readouterr().out


def test_chosen_probes_alone_are_run_and_told_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["block_scores", "hard_topk_forward:reference"]
    assert smoke.main(["--device", "cpu", "--json", *wanted]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = [(line["operator"], line["backend"]) for line in lines]
    served = [str(pair).split(":") for pair in smoke.pairs("cpu") if pair.operator == "block_scores"]
    assert sorted(found) == sorted([*map(tuple, served), ("hard_topk_forward", "reference")])
    assert all(line["wrong"] is None and line["kind"] == "eager" for line in lines)
    with pytest.raises(SystemExit, match="2"):
        smoke.main(["--device", "cpu", "block_score"])
    assert "nothing serves 'block_score' here; there are soft_topk_forward" in capsys.readouterr().err


_CHILD = """
import os, sys
sys.argv[0] = "smoke"
from spartan_kernels import probes, smoke
smoke._GRAPH_BACKENDS = ("reference",)
plain = probes.probes
def fail(inputs, backend):
    raise RuntimeError("planted")
def die(inputs, backend):
    if backend == "reference" and inputs["x"].dtype == smoke.torch.float32:
        os._exit(7)
    return plain()[0].call(inputs, backend)
planted = {"soft_topk_backward": fail, "hard_topk_forward": die}
smoke.probes = lambda: [probes.Probe(p.operator, planted.get(p.operator, p.call)) for p in plain()]
sys.exit(smoke.main(sys.argv[1:]))
"""


def test_after_a_failed_or_fatal_capture_another_process_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four graphs the second raises and the third ends its process: three processes, four outcomes."""
    popen, started = subprocess.Popen, []

    def planted(command: list[str], **more: Any) -> Any:
        started.append(command)
        return popen([command[0], "-c", _CHILD, *command[3:]], **more)

    monkeypatch.setattr(smoke.subprocess, "Popen", planted)
    operators = ("soft_topk_forward", "soft_topk_backward", "hard_topk_forward", "block_scores")
    outcomes = list(smoke.run_graphs("cpu", [smoke.Pair(operator, "reference") for operator in operators]))
    assert [outcome.operator for outcome in outcomes] == list(operators)
    assert [outcome.wrong for outcome in outcomes] == [None, "RuntimeError: planted", "its process ended: 7", None]
    assert len(started) == 3


def test_a_device_that_is_not_here_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has the device")
    assert smoke.main(["--device", "cuda"]) == 1
    assert "device cuda is not here" in capsys.readouterr().out
