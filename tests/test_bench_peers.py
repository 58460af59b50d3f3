"""The benchmark's peers of the soft top-k compute what they say, and one that cannot run is a line."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.peers import engine_worker, engines
from bench.peers import soft_topk as peers
from spartan_kernels.testing import make_values, oracle_hard_topk, oracle_soft_topk


@pytest.mark.parametrize(("k", "beta"), [(0.5, 1.0), (7.0, 20.0), (180.0, 5.0)])
def test_bisection_finds_the_same_mask(k: float, beta: float) -> None:
    values = make_values("normal", (5, 199), dtype=torch.float64)
    exact = oracle_soft_topk(values, k, None, beta)
    torch.testing.assert_close(peers.sigmoid_bisection(values, k, beta), exact, rtol=1e-9, atol=1e-9)


def test_sinkhorn_stops_near_its_budget() -> None:
    mask = peers.sinkhorn(make_values("normal", (5, 50)), 10.0, 1.0)
    assert float((mask.sum(-1) / 10 - 1).abs().max()) < 2e-2


@pytest.mark.parametrize("k", [0.01, 1.0, 7.3, 100.0, 198.0, 198.99])
@pytest.mark.parametrize("name", ["normal", "quantised", "all_equal", "student_t"])
def test_lapsum_solves_its_equation(name: str, k: float) -> None:
    values = make_values(name, (4, 199), dtype=torch.float64)
    mask = peers.lapsum(values, k, 3.0)
    torch.testing.assert_close(mask.sum(-1), torch.full((4,), k, dtype=torch.float64), rtol=1e-9, atol=0)
    # one b for the row: the inverse of the distribution function gives it back from every entry that is not rounded off
    b = 3.0 * values - torch.where(mask < 0.5, (2 * mask).log(), -(2 * (1 - mask)).log())
    inside = (mask > 1e-6) & (mask < 1 - 1e-6)
    for row, kept in zip(b, inside, strict=True):
        assert not kept.any() or float(row[kept].max() - row[kept].min()) < 1e-6


def test_lapsum_gradient() -> None:
    values = make_values("normal", (2, 9), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: peers.lapsum(v, 3.3, 2.0), (values,))


def test_torchsort_with_little_regularisation_is_the_hard_choice() -> None:
    pytest.importorskip("torchsort")
    values = make_values("normal", (4, 60))
    mask = peers.torchsort_rank(values, 9.0, 1e4)
    torch.testing.assert_close(mask, oracle_hard_topk(values, 9.0).float(), rtol=0, atol=1e-3)


def test_every_peer_runs_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(*_: Any) -> Any:
        raise ModuleNotFoundError("No module named 'absent'", name="absent")

    off = {"off": (lambda v, k, beta: torch.sigmoid(v) * k, True), "absent": (not_installed, True)}
    monkeypatch.setattr(peers, "RELAXATIONS", {**peers.RELAXATIONS, **off})
    values = make_values("normal", (16, 40))
    for name, peer in peers.peers(values, 4.0, 2.0).items():
        assert isinstance(peer, str) or peer(values).shape == values.shape, name
    ready = peers.peers(values, 4.0, 2.0, gradient=True)
    assert ready["absent"] == "absent is not installed"
    assert "misses its budget" in str(ready["off"])
    assert "Python 3.12" in str(ready[f"softtorch{peers.OTHER}"])
    gradient = ready["sigmoid bisection"]
    assert not isinstance(gradient, str)
    assert gradient(values.requires_grad_(), torch.ones_like(values)).shape == values.shape


def test_an_engine_answers_every_line_and_saves_what_it_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = np.random.default_rng(0)
    weights = [generator.standard_normal(shape).astype(np.float32) for shape in ((5, 3), (2, 5))]
    x = generator.standard_normal((4, 3)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "layers.npz", **{str(i): weight for i, weight in enumerate(weights)})

    def by_numpy(model: list[Any], folder: Path, x: Any, threads: int) -> Any:
        def run() -> Any:
            y = x
            for weight in model:
                y = np.maximum(y @ weight.T, 0)
            return y

        return run

    monkeypatch.setattr(engine_worker, "onnx_model", lambda weights, tokens: weights)
    monkeypatch.setattr(engine_worker, "ENGINES", {"NumPy": by_numpy})
    monkeypatch.setattr(sys, "stdin", io.StringIO("run\nsave\n"))
    engine_worker.main("NumPy", tmp_path, 1)
    assert capsys.readouterr().out.split() == ["ready", "done", "done"]
    expected = np.maximum(np.maximum(x @ weights[0].T, 0) @ weights[1].T, 0)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), expected, rtol=1e-5)


def test_an_engine_that_cannot_run_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no such engine here\n")
    python.chmod(0o755)
    monkeypatch.setenv(engines.PYTHON, str(python))
    found = engines.peers([torch.eye(3)], torch.ones(2, 3), torch.ones(2, 3))
    assert found == dict.fromkeys(engine_worker.ENGINES, "no such engine here")


def test_an_engine_with_a_wrong_result_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    # answers as a worker does, with the input as its result
    python.write_text('#!/bin/sh\necho ready; while read line; do cp "$3/x.npy" "$3/y.npy"; echo done; done\n')
    python.chmod(0o755)
    monkeypatch.setenv(engines.PYTHON, str(python))
    x = torch.tensor([[1.0, 2.0, 4.0]])
    right = engines.peers([torch.eye(3)], x, x)
    assert all(isinstance(engine, engines.Engine) for engine in right.values())
    wrong = engines.peers([2 * torch.eye(3)], x, 2 * x)
    assert set(wrong.values()) == {"its result is wrong by 50% of the largest entry"}
