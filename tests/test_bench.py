"""The benchmark harness: a wrong kernel is refused, a slowed one is seen, results survive the disk."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import Tensor
from typer.testing import CliRunner

from bench import cases, save
from bench import machine as bench_machine
from bench.__main__ import main
from bench.case import CASES, Case, Settings, Work, case, select
from bench.checks import check_budget_mask, check_hard_mask
from bench.compare import compare
from bench.machine import fma_ceiling, folder_name, unsteady
from bench.peers import eager
from bench.peers.sinkhorn import sinkhorn_soft_topk, sort_and_sinkhorn
from bench.run import Report, Result, run_case, trace
from bench.timing import Sample, interleave, peak_memory, rotated
from spartan_kernels import ops
from spartan_kernels.backends import extension
from spartan_kernels.testing import make_values, oracle_hard_topk, oracle_soft_topk

QUICK = Settings(quick=True)


def spin(seconds: float) -> None:
    """Busy for a fixed time, so that a test of the clock does not depend on the machine's speed."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def double_case(kernel: Callable[[Tensor], Tensor], **more: Any) -> Case:
    """A case whose right answer is 2x."""

    def check(out: Tensor, x: Tensor) -> None:
        if not torch.equal(out, 2 * x):
            raise AssertionError("the result is not 2x")

    def build(_: Settings) -> Work:
        operands = [(torch.arange(16.0) + i,) for i in range(3)]
        return Work(ours=kernel, operands=operands, check=check, bytes=128, **more)

    return Case("double", "double/16", build)


def report_of(*results: Result, quick: bool = True, copy: float = 1e-10) -> Report:
    machine = {"device": "a machine", "threads": 2, "torch": "2", "date": "2026-01-01", "revision": "abc"}
    ceiling = Sample((copy,) * 10)
    return Report(machine, quick, "float32", ceiling, ceiling, [], list(results), ceiling)


# --------------------------------------------------------------------------------------------------- the gate


def test_a_wrong_kernel_is_refused_and_never_timed() -> None:
    result = run_case(double_case(lambda x: 2 * x + 1e-3), QUICK)
    assert result.time is None and result.peers == {}
    assert result.wrong == "the result is not 2x"


def test_a_kernel_that_is_wrong_the_second_time_is_refused() -> None:
    calls = itertools.count()
    result = run_case(double_case(lambda x: 2 * x + (next(calls) == 1)), QUICK)
    assert result.wrong is not None


@pytest.mark.parametrize("name", ["soft_topk/4096x1024", "soft_topk_global/resnet50-warm", "hard_topk/4096x1024"])
def test_a_wrong_operator_is_refused_by_the_real_cases(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks of the registry themselves: off by a fraction, off by one entry."""
    soft_topk, hard_topk, solve = ops.soft_topk, ops.hard_topk, ops.solve_masks_

    def one_too_few(*arguments: Any, **options: Any) -> Tensor:
        mask = hard_topk(*arguments, **options)
        mask[0, mask[0].nonzero()[0]] = False
        return mask

    def drifting(*arguments: Any, **options: Any) -> None:
        solve(*arguments, **options)
        arguments[4][0].mul_(1 + 1e-3)

    monkeypatch.setattr(ops, "soft_topk", lambda *a, **k: soft_topk(*a, **k) * (1 + 1e-4))
    monkeypatch.setattr(ops, "hard_topk", one_too_few)
    monkeypatch.setattr(ops, "solve_masks_", drifting)
    result = run_case(CASES[name], QUICK)
    assert result.time is None and result.wrong


def test_check_of_a_soft_mask_sees_form_and_budget() -> None:
    values = make_values("normal", (5000,))
    mask = ops.soft_topk(values, 500.0, beta=5.0)
    check_budget_mask(mask, 500.0, values=values, beta=5.0)
    for wrong in [
        mask * 1.00001,
        mask.flip(0),  # the budget is met, the form is not
        ops.soft_topk(values, 500.0, beta=5.01),
        torch.full_like(mask, 0.1),
        oracle_hard_topk(values, 500).float(),
        mask.index_fill(0, torch.tensor([3]), float("nan")),
    ]:
        with pytest.raises(AssertionError):
            check_budget_mask(wrong, 500.0, values=values, beta=5.0)


def test_check_of_a_hard_mask_sees_count_order_and_ties() -> None:
    values = torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0, 0.0])
    check_hard_mask(torch.tensor([False, True, True, True, False, False]), values, 3.9)
    for kept in ([1, 2], [1, 2, 3, 4], [0, 1, 2], [1, 2, 4], [1, 3, 4]):
        wrong = torch.zeros(6, dtype=torch.bool)
        wrong[kept] = True
        with pytest.raises(AssertionError):
            check_hard_mask(wrong, values, 3.9)


# ----------------------------------------------------------------------------------------------------- timing


def test_peers_are_timed_beside_ours_and_a_missing_one_is_a_line() -> None:
    peers = {"slower": lambda x: spin(3e-3), "absent": "not installed"}
    result = run_case(double_case(lambda x: (spin(1e-3), 2 * x)[1], peers=peers), QUICK)
    assert result.missing == {"absent": "not installed"}
    assert set(result.peers) == {"slower"}
    assert result.peers["slower"].ratio.median > 1.5
    assert len(result.time.values) >= 3
    only = run_case(double_case(lambda x: 2 * x, peers=peers), QUICK, against=["absent"])
    assert only.peers == {} and only.missing == {"absent": "not installed"}


def test_operands_rotate_and_preparation_is_not_timed() -> None:
    seen: list[float] = []
    work = Work(
        ours=lambda x: seen.append(float(x[0])),
        operands=[(torch.tensor([float(i)]),) for i in range(4)],
        check=lambda out, x: None,
        bytes=4,
        prepare=lambda x: spin(5e-3),
    )
    ours, _ = interleave(work, {}, "cpu", rounds=5, seconds=10.0)
    assert set(seen) == {0.0, 1.0, 2.0, 3.0}
    assert ours.median < 4e-3


def test_a_slow_peer_sits_out_rounds_it_has_no_time_for() -> None:
    work = Work(ours=lambda: spin(1e-3), operands=[()], check=lambda out: None, bytes=1)
    ours, peers = interleave(work, {"slow": lambda: spin(0.05)}, "cpu", rounds=10, seconds=0.1)
    times, ratios = peers["slow"]
    assert len(ours.values) == 10
    assert 2 <= len(times.values) < 10 and len(ratios.values) == len(times.values)


def test_rotation_exceeds_the_cache() -> None:
    assert len(rotated(lambda i: (i,), 10, 100)) == 20
    assert len(rotated(lambda i: (i,), 1000, 100)) == 1


def test_peak_memory_counts_the_workspace_and_the_result() -> None:
    def call() -> Tensor:
        workspace = torch.empty(1 << 20)
        return workspace[: 1 << 10].clone()

    peak, kept = peak_memory(call, "cpu")
    assert kept == 4 << 10
    assert peak == (4 << 20) + (4 << 10)


def test_the_peak_counts_the_operations_of_every_thread() -> None:
    sink = torch.empty(1)
    with_one = extension.native.cpu.multiply_adds(3, sink.data_ptr(), 1)
    assert with_one > 0
    assert extension.multiply_adds(12) == 4 * with_one * torch.get_num_threads()
    peak = fma_ceiling("cpu", quick=True)
    assert peak is not None
    assert min(peak.values) > 0


def test_an_unquiet_machine_is_reported() -> None:
    steady = Sample((1.0, 1.01, 0.99, 1.0, 1.0, 1.01))
    assert unsteady(steady, steady) == []
    assert any("moved" in reason for reason in unsteady(steady, steady.scaled(1.3)))
    assert any("spread" in reason for reason in unsteady(steady, Sample((0.8, 1.0, 1.3, 0.7, 1.4, 1.0))))


# ---------------------------------------------------------------------------------------------------- compare


def test_a_slowed_kernel_is_seen() -> None:
    def kernel(seconds: float) -> Report:
        return report_of(run_case(double_case(lambda x: (spin(seconds), 2 * x)[1]), QUICK))

    before, slowed = kernel(1e-3), kernel(20e-3)
    (verdict,) = compare(slowed, [before])
    assert verdict.word == "slower" and verdict.change > 4
    (verdict,) = compare(before, [slowed])
    assert verdict.word == "faster"


def result_of(median: float, spread: float = 0.01, **more: Any) -> Result:
    values = tuple(median * (1 + spread * (i - 5) / 5) for i in range(11))
    return Result("op/case", "op", time=Sample(values), **more)


def test_verdicts_know_the_noise() -> None:
    before = report_of(result_of(1.0))
    words = {change: compare(report_of(result_of(change)), [before])[0].word for change in (1.0, 1.04, 1.2, 0.97, 0.7)}
    assert words == {1.0: "same", 1.04: "same", 1.2: "slower", 0.97: "same", 0.7: "faster"}
    noisy = compare(report_of(result_of(1.2, spread=1.2)), [before])[0]
    assert noisy.word != "slower"
    assert compare(report_of(result_of(1.0)), [])[0].word == "new"
    assert compare(report_of(Result("op/case", "op", wrong="no")), [before])[0].word == "wrong"


def test_a_slower_machine_is_not_a_slower_kernel() -> None:
    before = report_of(result_of(1.0), copy=1e-10)
    after = report_of(result_of(1.5), copy=1.5e-10)
    assert compare(after, [before])[0].word == "same"


# --------------------------------------------------------------------------------------------- files, figures


def test_results_survive_the_disk(tmp_path: Path) -> None:
    result = run_case(double_case(lambda x: 2 * x, peers={"plain": lambda x: x + x}, notes={"n": 16.0}), QUICK)
    report = report_of(result)
    paths = save.write(report, tmp_path)
    assert sorted(p.name for p in paths) == ["double-quick.csv", "double-quick.json"]
    (read,) = save.load(str(tmp_path), tmp_path, report)
    (back,) = read.results
    ratio = result.peers["plain"].ratio.median
    assert back.peers["plain"].ratio.median == pytest.approx(ratio, rel=1e-3)
    assert dataclasses.replace(back, time=None, peers={}) == dataclasses.replace(result, time=None, peers={})
    assert (tmp_path / "double-quick.csv").read_text().splitlines()[0].startswith("case,implementation")
    assert compare(report, [read])[0].word in ("same", "too noisy")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 99}', '{"version": 1, "results": [{}]}'])
def test_a_damaged_result_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"broken\.json"):
        save.load(str(path), tmp_path, report_of())


def test_an_unknown_revision_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no-such-revision"):
        save.load("no-such-revision", tmp_path, report_of(result_of(1.0)))


def test_figures_come_from_files_alone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from bench import plot

    peers = run_case(double_case(lambda x: 2 * x, peers={"copy": lambda x: x.clone()}), QUICK).peers
    steps = {"forward and backward": 0.3, "optimizer": 0.1}
    save.write(report_of(result_of(1.0, peers=peers), quick=False), tmp_path)
    save.write(report_of(dataclasses.replace(result_of(0.4, parts=steps), op="step"), quick=False), tmp_path)
    written = plot.figures(tmp_path)
    assert [p.name for p in written] == ["op.png", "step.png"]
    first = [p.read_bytes() for p in written]
    assert [p.read_bytes() for p in plot.figures(tmp_path)] == first


# ----------------------------------------------------------------------------------------- registry and peers


def test_registry() -> None:
    assert select([], device="cuda") == list(CASES.values())
    assert select([]) == [c for c in CASES.values() if not c.gpu]
    assert {c.op for c in select(["hard_topk"])} == {"hard_topk"}
    assert [c.name for c in select(["hard_topk/4096x1024"])] == ["hard_topk/4096x1024"]
    with pytest.raises(ValueError, match=r"'top'.*soft_topk"):
        select(["top"])
    with pytest.raises(ValueError, match="twice"):
        case("hard_topk", "4096x1024")(lambda s: None)
    assert all(c.build.__doc__ for c in CASES.values())
    assert sum(torch.Size(shape).numel() for shape in cases.cases_global.resnet50_shapes()) == 25_502_912


def test_trace_is_a_chrome_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    trace(double_case(lambda x: 2 * x), QUICK, str(path))
    names = {event.get("name") for event in json.loads(path.read_text())["traceEvents"]}
    assert "aten::mul" in names


def test_sinkhorn_solves_the_same_problem() -> None:
    values = make_values("normal", (2000,), dtype=torch.float64)
    costs = make_values("uniform", (2000,), seed=1, dtype=torch.float64) + 0.5
    for a, beta in [(None, 2.0), (costs, 3.0)]:
        exact = oracle_soft_topk(values, 200.0, a, beta)
        mask = sinkhorn_soft_topk(values, 200.0, a, beta, tolerance=1e-13)
        torch.testing.assert_close(mask, exact, rtol=1e-9, atol=1e-9)
    soft, hard = sort_and_sinkhorn([values[:500].view(20, 25), values[500:]], 200.0, 2.0)
    row = torch.cat([soft[0].flatten(), soft[1]])
    torch.testing.assert_close(row, oracle_soft_topk(values.abs(), 200.0, None, 2.0), rtol=2e-2, atol=1e-3)
    kept = torch.cat([hard[0].flatten(), hard[1]])
    assert torch.equal(kept, oracle_hard_topk(values.abs(), 200))


def test_eager_peers_solve_the_same_problem() -> None:
    values = make_values("normal", (3, 100))
    expected = oracle_hard_topk(values, 7)
    for peer in (eager.topk_mask, eager.sort_mask, eager.kthvalue_mask):
        assert torch.equal(peer(values, 7), expected)


def test_command_line_lists_and_refuses() -> None:
    command = [sys.executable, "-m", "bench"]
    listed = subprocess.run([*command, "--list"], capture_output=True, text=True, check=True).stdout
    assert all(name in listed for name in CASES)
    bad = subprocess.run([*command, "top"], capture_output=True, text=True, check=False)
    assert bad.returncode == 2 and "soft_topk" in bad.stderr


def test_command_line_times_saves_and_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way of a regression and of a wrong kernel: exit status 1, and nothing saved over good results."""
    app = typer.Typer()
    app.command()(main)

    def run(kernel: Callable[[Tensor], Tensor], *arguments: str) -> tuple[int, str]:
        peers = {"plain": lambda x: x + x, "other": lambda x: x * 2}
        monkeypatch.setitem(CASES, "double/16", double_case(kernel, peers=peers))
        common = ["double", "--quick", "--against", "plain", "--save", "--results", str(tmp_path), *arguments]
        result = CliRunner().invoke(app, common)
        return result.exit_code, result.output

    monkeypatch.setattr(bench_machine, "modified", lambda: True)
    code, output = run(lambda x: 2 * x)
    assert code == 2 and "--modified" in output and not list(tmp_path.iterdir())
    code, output = run(lambda x: (spin(1e-3), 2 * x)[1], "--modified")
    monkeypatch.setattr(bench_machine, "modified", lambda: False)
    assert code == 0 and "plain" in output and "other" not in output
    (written,) = tmp_path.glob("*/double-quick.json")
    machine = json.loads(written.read_text())["machine"]
    assert written.parent.name == folder_name("cpu")
    assert {"device", "driver", "torch", "revision", "date", "threads"} <= set(machine)

    saved = written.read_bytes()
    code, output = run(lambda x: (spin(50e-3), 2 * x)[1], "--compare", str(written))
    assert code == 1 and "slower" in output
    code, output = run(lambda x: x, "--compare", str(written))
    assert code == 1 and "wrong" in output
    assert written.read_bytes() == saved
    code, output = run(lambda x: 2 * x, "--compare", "no-such-revision")
    assert code == 2


@pytest.mark.parametrize("backward", [False, True])
def test_convolutions_are_checked_before_they_are_timed(backward: bool) -> None:
    kind = "forward-backward" if backward else "forward"
    name = f"masked_conv/{kind}-64to128-3x3-28x28-channels-last-block-32-sparsity-90"
    work = CASES[name].build(Settings(quick=True))
    operands = work.operands[0]
    result = work.ours(*operands)
    work.check(result, *operands)
    for i in range(2 if backward else 1):
        parts = [part.clone() for part in (result if backward else (result,))]
        parts[i][0, 0, 0, 0] += 1e-4 * parts[i].abs().max()  # far from what rounding makes, and invisible to the eye
        with pytest.raises(AssertionError, match=("gradient of x", "gradient of the weight")[i] if backward else "y"):
            work.check(tuple(parts) if backward else parts[0], *operands)
