"""The products' part of the benchmark: peers that agree or say why not, a gate that sees, figures from files."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import spartan.functional as F
from bench import cases, save
from bench.case import CASES, Settings, select
from bench.peers import matmul
from bench.run import PeerResult, Report, Result, run_case
from bench.timing import Sample
from spartan_kernels import ops
from spartan_kernels.float8 import rounded_rows

QUICK = Settings(quick=True)
SIZE = 16


def block_weight(zero_every: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    grid = (torch.arange(24) % zero_every == 0).float().view(4, 6)
    weight = torch.randn(4 * SIZE, 6 * SIZE, generator=generator)
    return weight * grid.repeat_interleave(SIZE, 0).repeat_interleave(SIZE, 1)


def operands(backward: bool) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2 * SIZE, 6 * SIZE, generator=generator)
    return (x.requires_grad_(), torch.randn(2 * SIZE, 4 * SIZE, generator=generator)) if backward else (x,)


# ------------------------------------------------------------------------------------------------------- peers


def test_forward_peers_multiply() -> None:
    weight, (x,) = block_weight(), operands(backward=False)
    exact = x.double() @ weight.double().mT
    ready = {n: p for n, p in matmul.peers(weight, SIZE, (x,)).items() if not isinstance(p, str)}
    assert {"dense", "gathered bmm"} <= set(ready)
    for name, peer in ready.items():
        torch.testing.assert_close(peer(x).double(), exact, rtol=1e-5, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_backward_peers_give_both_gradients() -> None:
    weight, (x, grad) = block_weight(), operands(backward=True)
    found = matmul.peers(weight, SIZE, (x, grad))
    dx, dw = found["dense"](x, grad)
    torch.testing.assert_close(dx, grad @ weight)
    torch.testing.assert_close(dw, grad.mT @ x.detach())
    dx, blocks = found["gathered bmm"](x, grad)
    torch.testing.assert_close(dx, grad @ weight)
    kept = dw.view(4, SIZE, 6, SIZE).transpose(1, 2).reshape(24, SIZE, SIZE)[::2]
    torch.testing.assert_close(blocks, kept)
    assert found["SciPy BSR"] in ("it computes no gradients", "scipy is not installed")


def test_every_way_to_be_missing_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(weight: Tensor, size: int) -> matmul.Layer:
        import no_such_package  # noqa: F401

        raise AssertionError

    def dies(weight: Tensor, size: int) -> matmul.Layer:
        raise RuntimeError("not on\nthis device")

    def wrong(weight: Tensor, size: int) -> matmul.Layer:
        return matmul.Layer(lambda x: 1.2 * x @ weight.mT, None)

    def refuses(weight: Tensor, size: int) -> matmul.Layer:
        raise matmul.Missing("its blocks are smaller")

    monkeypatch.setattr(matmul, "CPU", {"a": absent, "b": dies, "c": wrong, "d": refuses})
    found = matmul.peers(block_weight(), SIZE, operands(backward=False))
    assert found == {
        "a": "no_such_package is not installed",
        "b": "RuntimeError: not on",
        "c": "its result is wrong by 20% of the largest entry",
        "d": "its blocks are smaller",
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="they may run here")
@pytest.mark.parametrize("name", sorted(set(matmul.GPU) - set(matmul.CPU)))
def test_gpu_peers_are_a_line_without_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "CPU", {name: matmul.GPU[name]})
    (reason,) = matmul.peers(block_weight(), SIZE, operands(backward=False)).values()
    assert isinstance(reason, str) and reason and "\n" not in reason


def test_two_of_four_is_offered_at_half_the_weights_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "CPU", {"2:4": matmul.torch_semi_structured})
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda pruned: pruned)
    x = operands(backward=False)
    assert matmul.peers(block_weight(4), SIZE, x)["2:4"] == "2:4 is a sparsity of 50%, this weight's is 75%"
    assert callable(matmul.peers(block_weight(2), SIZE, x)["2:4"])
    pruned = matmul.torch_semi_structured(block_weight(2), SIZE).dense
    assert bool(((pruned.view(-1, 4) != 0).sum(1) == 2).all())


# ------------------------------------------------------------------------------------------------------- cases


def test_a_quick_run_takes_a_part_unless_a_case_is_named() -> None:
    everything, quick = select(["masked_matmul"]), select(["masked_matmul"], quick=True)
    assert 0 < len(quick) < 6 < len(everything)
    assert set(c.name for c in select([], quick=True)) < set(CASES)
    (left_out, *_) = [c for c in everything if c not in quick]
    assert select([left_out.name], quick=True) == [left_out]
    assert cases.cases_matmul.__doc__


@pytest.mark.parametrize("blur", ["value", "block"])
@pytest.mark.parametrize("passes", ["forward", "forward-backward"])
def test_a_wrong_product_is_refused(passes: str, blur: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = {ops: ops.masked_linear, F: F.masked_linear}

    def wrong(module: Any) -> Any:
        def masked_linear(x: Tensor, weight: Tensor, gate: Tensor, *rest: Any, **options: Any) -> Tensor:
            if blur == "value":
                return right[module](x, weight, gate * (1 + 1e-4), *rest, **options)
            gate = gate.clone()
            gate.view(-1)[gate.flatten().nonzero()[0]] = 0
            return right[module](x, weight, gate, *rest, **options)

        return masked_linear

    for module in right:
        monkeypatch.setattr(module, "masked_linear", wrong(module))
    result = run_case(CASES[f"masked_matmul/{passes}-block-32-sparsity-90"], QUICK, against=[])
    assert result.time is None and "exceeds its budget" in str(result.wrong)


def test_work_counts_kept_blocks_only() -> None:
    work = CASES["masked_matmul/forward-block-64-sparsity-50"].build(QUICK)
    rows, in_, out = (int(work.notes[name]) for name in ("rows", "in", "out"))
    assert work.flops == 2 * rows * in_ * out // 2
    assert work.bytes == 4 * (rows * in_ + rows * out + in_ * out // 2)
    assert (work.notes["sparsity"], work.notes["block"], work.notes["passes"]) == (0.5, 64, 1)


# ----------------------------------------------------------------------------------------------------- figures


def sample(median: float) -> Sample:
    return Sample(tuple(median * f for f in (0.98, 0.99, 1.0, 1.01, 1.02)))


def synthetic() -> Report:
    """Ours is as fast as dense at 80% and twice as fast at 90%; a peer is always slower."""
    results = []
    for passes, block, (sparsity, gain) in itertools.product((1, 3), (16, 32), ((0.5, 0.5), (0.8, 1.0), (0.9, 2.0))):
        name = f"masked_matmul/{passes}-{block}-{sparsity}"
        notes = {"rows": 8.0, "in": 4.0, "out": 4.0, "block": block, "sparsity": sparsity, "passes": float(passes)}
        times = {"dense": 1e-3, "torch BSR": 3e-3}
        ours = times["dense"] / gain
        peers = {n: PeerResult(sample(t), sample(t / ours)) for n, t in times.items()}
        flops = int(1e6 * passes * (1 - sparsity))
        results.append(
            Result(name, "masked_matmul", time=sample(ours), bytes=10_000, flops=flops, peers=peers, notes=notes)
        )
    machine = {"device": "a machine", "threads": 2, "torch": "2", "date": "2026-01-01", "revision": "abc"}
    return Report(machine, False, "float32", sample(1e-10), sample(1e-11), [], results)


def test_figures_of_products_come_from_files_alone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from bench import plot

    save.write(synthetic(), tmp_path)
    written = plot.figures(tmp_path)
    assert [p.name for p in written] == ["masked_matmul.png", "masked_matmul-roofline.png"]
    first = [p.read_bytes() for p in written]
    assert [p.read_bytes() for p in plot.figures(tmp_path)] == first


def test_a_product_without_a_dense_peer_is_still_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from bench import plot

    report = synthetic()
    save.write(
        dataclasses.replace(report, results=[dataclasses.replace(r, peers={}) for r in report.results]), tmp_path
    )
    assert all(p.stat().st_size for p in plot.figures(tmp_path))


def test_speed_up_is_over_dense_and_break_even_where_it_stays_above_one() -> None:
    pytest.importorskip("matplotlib")
    from bench import plot

    results = [r for r in synthetic().results if (r.notes["passes"], r.notes["block"]) == (1, 16)]
    curves = plot.speed_ups(results)
    assert set(curves) == {"ours", "torch BSR"}
    assert [y for _, y in curves["ours"]] == pytest.approx([0.5, 1.0, 2.0])
    assert [y for _, y in curves["torch BSR"]] == pytest.approx([1 / 3] * 3)
    assert plot.break_even([(0.5, 0.5), (0.7, 2.0)]) == pytest.approx(0.6)
    assert plot.break_even([(0.5, 2.0), (0.7, 0.5), (0.9, 2.0)]) == pytest.approx(0.8)
    assert plot.break_even([(0.5, 1.5), (0.9, 4.0)]) == 0.5
    assert plot.break_even(curves["torch BSR"]) is None


def test_products_are_told_by_the_peak_of_multiply_adds(tmp_path: Path) -> None:
    from bench.product_table import products

    report = synthetic()
    machine = {**report.machine, "model": "family 25 model 17", "native": {"instruction_set": "avx2"}}
    notes = {"in": 768.0, "out": 3072.0, "rows": 2048.0, "passes": 1.0}
    results = [
        dataclasses.replace(r, case=f"masked_matmul/{kind}-{i}", notes={**r.notes, **notes})
        for kind in ("forward", "packed-2048")
        for i, r in enumerate(report.results)
        if r.notes["passes"] == 1
    ]
    report = dataclasses.replace(report, machine=machine, results=results, fma=sample(5e-10))
    save.write(report, tmp_path / "cpu-a-machine")
    table = products(tmp_path)
    # at 90%: twice as fast as dense, which takes 1 ms; 100,000 operations in 0.5 ms, where 1,000,000 are possible
    assert "| 16×16 | mask moves | 2048 | 0.5× (0.12) | – | 1× (0.10) | 2× (0.10) | – | – |" in table
    assert table.count("| packed |") == 2
    assert "of 2 GFLOP/s" in table
    assert "a machine (family 25 model 17), kernels for AVX2" in table


def test_the_float8_peer_multiplies_rounded_rows() -> None:
    x, weight = torch.randn(48, 128, dtype=torch.bfloat16), torch.randn(80, 128, dtype=torch.bfloat16)
    rows = [rounded_rows(t * torch.rand(t.shape[0], 1)) for t in (x, weight)]
    try:
        y = matmul.scaled_product(*rows, torch.bfloat16)
    except (NotImplementedError, RuntimeError) as error:
        pytest.skip(f"this PyTorch multiplies in 8 bits on GPUs alone: {error}")
    left, right = (numbers.double() * scales.double() for numbers, scales in rows)
    exact = left @ right.T
    assert float((y.double() - exact).abs().max() / exact.abs().max()) < 2**-7


def test_the_float8_peer_says_that_it_needs_a_gpu() -> None:
    assert CASES["masked_matmul/many-tokens-packed-float8-4096x4096-block-128-sparsity-90"].gpu
    with pytest.raises(matmul.Missing, match="GPU"):
        matmul.dense_float8(block_weight(), (SIZE, SIZE))
