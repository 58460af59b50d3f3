"""The break-even: which product serves a density, what is stored, and how it is measured."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import spartan
from spartan.tuning import interpolated_crossing
from spartan_kernels import break_even, dispatch
from spartan_kernels.break_even import Crossing, dense_wins, device_kind, load, store
from spartan_kernels.testing import make_values

CPU = torch.device("cpu")
KIND = device_kind(CPU)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "folder" / "break_even.json"
    monkeypatch.setenv("SPARTAN_TUNE_CACHE", str(path))
    break_even._forget()
    yield path
    break_even._forget()


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own_cache: Path) -> None:
    assert break_even.cache_file() == own_cache
    monkeypatch.delenv("SPARTAN_TUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert break_even.cache_file() == tmp_path / "spartan-kernels" / "break_even.json"


def test_the_nearest_block_decides(own_cache: Path) -> None:
    store("another machine", (Crossing("float32", 8, 8, False, 0.1),))
    small, large = Crossing("float32", 16, 16, False, 0.2), Crossing("float32", 128, 128, False, None)
    assert store(KIND, (small, large)) == own_cache
    assert load() == {"another machine": (Crossing("float32", 8, 8, False, 0.1),), KIND: (small, large)}
    assert dense_wins(0.21, CPU, torch.float32, (16, 16), 2048)
    assert not dense_wins(0.19, CPU, torch.float32, (16, 16), 2048)
    assert dense_wins(0.3, CPU, torch.float32, (8, 32), 2048)
    assert not dense_wins(1.0, CPU, torch.float32, (128, 64), 2048)
    assert list(own_cache.parent.iterdir()) == [own_cache]


def test_without_a_measurement_nothing_is_dense() -> None:
    store(KIND, (Crossing("float32", 16, 16, False, 0.0),))
    assert dense_wins(0.5, CPU, torch.float32, (16, 16), 17)
    assert not dense_wins(1.0, CPU, torch.float32, (16, 16), 16)  # few tokens
    assert not dense_wins(1.0, CPU, torch.float16, (16, 16), 17)


def test_all_blocks_take_the_place_of_the_dense_product_where_that_is_surely_faster(own_cache: Path) -> None:
    def asked(tokens: int = 2048, dtype: torch.dtype = torch.float32) -> tuple[int, int] | None:
        return break_even.whole_block(CPU, dtype, tokens)

    assert asked() is None
    store(KIND, (Crossing("float32", 16, 16, False, None, 0.9), Crossing("float32", 32, 64, False, None, 0.5)))
    assert asked() == (32, 64) and asked(tokens=16) is asked(dtype=torch.bfloat16) is None
    with break_even.using((Crossing("float32", 8, 8, False, None, 0.96),)):
        assert asked() is None
    assert asked() == (32, 64)
    written = json.loads(own_cache.read_text())
    for entry in written[KIND]:
        del entry["whole"]  # as earlier versions wrote it
    own_cache.write_text(json.dumps(written))
    break_even._forget()
    assert asked() is None and not dense_wins(1.0, CPU, torch.float32, (16, 16), 2048)


_ENTRY = {"dtype": "float32", "rows": 16, "columns": 16, "few": False, "density": 0.5, "whole": 0.9}


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        json.dumps({KIND: [{"dtype": "float32"}]}).encode(),
        *(json.dumps({KIND: [_ENTRY | wrong]}).encode() for wrong in (
            {"rows": "16"}, {"density": -1.0}, {"density": float("nan")}, {"columns": True}, {"few": 3},
            {"dtype": None},
        )),
    ],
    ids=range(11),
)  # fmt: skip
def test_a_damaged_cache_is_named_once_and_products_go_on_without_it(own_cache: Path, content: bytes) -> None:
    own_cache.parent.mkdir()
    own_cache.write_bytes(content)
    break_even._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match=rf"{own_cache}.*spartan\.tune"):
        assert load() == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        break_even._forget()
        y = spartan.masked_linear(torch.randn(3, 32), torch.randn(32, 32), torch.ones(2, 2), 16)
    assert torch.isfinite(y).all()


def test_a_whole_cache_is_read_without_a_warning(own_cache: Path) -> None:
    own_cache.parent.mkdir()
    own_cache.write_text(json.dumps({KIND: [_ENTRY, _ENTRY | {"density": None, "whole": 1}]}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [entry.density for entry in load()[KIND]] == [0.5, None]


def test_a_cache_that_is_no_file_is_not_opened(own_cache: Path) -> None:
    own_cache.parent.mkdir()
    os.mkfifo(own_cache)
    break_even._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="not a regular file"):
        assert load() == {}


def test_auto_multiplies_densely_above_the_break_even(monkeypatch: pytest.MonkeyPatch) -> None:
    store(KIND, (Crossing("float32", 4, 4, False, 0.6), Crossing("float32", 4, 4, True, 0.6)))
    asked: list[str] = []
    implementation = dispatch.implementation

    def recording(operator: str, name: str) -> Callable[..., object]:
        asked.append(f"{operator} {name}")
        return implementation(operator, name)

    monkeypatch.setattr(dispatch, "implementation", recording)
    weight = torch.randn(8, 8, requires_grad=True)
    x = torch.randn(3, 8)
    half = torch.eye(2)
    usual = dispatch.select("masked_linear_forward", "cpu", torch.float32, "auto")
    for gate, name in ((half, usual), (torch.ones(2, 2), "reference")):
        asked.clear()
        spartan.masked_linear(x, weight, gate, 4).sum().backward()
        assert [a for a in asked if "linear" in a] == [
            f"masked_linear_forward {name}",
            f"masked_linear_backward {name}",
        ]
    asked.clear()
    spartan.masked_linear(x, weight, torch.ones(2, 2), 4, backend=usual)  # by name: obeyed
    assert f"masked_linear_forward {usual}" in asked


@pytest.mark.parametrize(
    ("ratios", "crossing"),
    [
        ([0.2, 0.5, 1.0], None),
        ([0.2, 0.5, 1.6], 0.75),
        ([0.2, 1.5, 0.9], None),  # noise
        ([1.2, 1.5, 1.9], 0.0),
        ([0.85, 1.25, 1.6], 0.25),
    ],
)
def test_the_crossing(ratios: list[float], crossing: float | None) -> None:
    found = interpolated_crossing([0.0, 0.5, 1.0], ratios)
    assert found == (crossing if crossing is None else pytest.approx(crossing))


@pytest.mark.skipif(dispatch.unavailable("native") is not None, reason="needs the native backend")
def test_tune_with_a_timer() -> None:
    calls: list[torch.Tensor] = []

    def timer(call: Callable[[], object], device: torch.device) -> float:
        result = call()
        assert isinstance(result, torch.Tensor) and device == CPU
        calls.append(result)
        # the first of ten is the dense product, the others rise with the density: they pass 1.05 between 0.5 and 0.7
        return 1.0 if len(calls) % 10 == 1 else (0.1, 0.2, 0.3, 0.4, 0.85, 1.25, 1.5, 1.6, 1.7)[(len(calls) - 2) % 10]

    path = spartan.tune("cpu", (torch.float32, torch.float64), (64, (32, 16)), timer=timer)
    surface = load()[KIND]
    assert path.exists() and len(calls) == 80  # float64 has no kernel
    assert [(c.dtype, c.rows, c.columns, c.few, c.packed) for c in surface] == [
        ("float32", *size, few, packed)
        for packed in (False, True)
        for size in ((64, 64), (32, 16))
        for few in (True, False)
    ]
    assert all(c.density == pytest.approx(0.6) for c in surface)
    for first in (0, 40):  # density 1 is the dense product
        torch.testing.assert_close(calls[first + 9], calls[first], rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match=r"dtypes.*float64"):
        spartan.tune("cpu", (torch.float64,), timer=timer)


def test_blocks_of_a_few_weights_are_measured_apart_from_the_others() -> None:
    """They have kernels of their own; where only the others were measured, a model of a CPU decides."""
    few, many = 16, 2048
    single = (0.1, CPU, torch.float32, (1, 1))
    assert not dense_wins(*single, many) and dense_wins(*single, few) and dense_wins(0.5, *single[1:], many)
    assert not dense_wins(1.0, CPU, torch.float32, (8, 8), many)
    store(KIND, (Crossing("float32", 16, 16, False, 0.0), Crossing("float32", 16, 16, True, 1.0)))
    assert not dense_wins(*single, many) and dense_wins(*single, few)
    assert break_even.packed_time(*single, many, 1 << 20) < 1
    store(KIND, (Crossing("float32", 16, 16, False, 1.0), Crossing("float32", 1, 1, False, 0.05)))
    assert dense_wins(*single, many) and dense_wins(0.1, CPU, torch.float32, (4, 1), many)
    assert break_even.packed_time(*single, many, 1 << 20) > 1
    assert not dense_wins(0.1, CPU, torch.float32, (16, 16), many)


def test_packed_blocks_are_decided_by_their_own_measurement() -> None:
    """Without it, by that of blocks which are found in each product."""
    many = (CPU, torch.float32, (16, 16), 2048)
    store(KIND, (Crossing("float32", 16, 16, False, 0.2, 2.0),))
    assert dense_wins(0.3, *many, packed=True) and dense_wins(0.3, *many)
    assert break_even.packed_time(0.3, *many, 1 << 20) > 1
    store(
        KIND, (Crossing("float32", 16, 16, False, 0.2, 2.0), Crossing("float32", 16, 16, False, 0.5, 0.5, packed=True))
    )
    assert dense_wins(0.3, *many) and not dense_wins(0.3, *many, packed=True) and dense_wins(0.6, *many, packed=True)
    assert break_even.packed_time(0.3, *many, 1 << 20) < 1 < break_even.packed_time(0.6, *many, 1 << 20)
    assert break_even.whole_block(CPU, torch.float32, 2048) is None  # that of packed blocks does not count


def test_packed_single_weights_on_a_gpu_are_predicted_from_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """For few tokens, of which each costs a gather; until they are measured."""
    monkeypatch.setattr(break_even, "device_kind", lambda device: "a GPU")

    def time(density: float, tokens: int, dtype: torch.dtype = torch.bfloat16) -> float:
        return break_even.packed_time(density, torch.device("cuda"), dtype, (1, 1), tokens, 1 << 24)

    # 4096 x 4096, 4 bytes for each kept weight against 2 for each: 4.0 of 10.0 us, and 1.5 to launch either
    assert time(0.2, 1) == pytest.approx(5.5 / 11.5, rel=0.01)
    assert time(0.5, 1) >= 1 > time(0.4, 1) and time(0.5, 1, torch.float32) < 1
    assert time(0.2, 1) < time(0.2, 2) < 1 < time(0.2, 8)
    store("a GPU", (Crossing("bfloat16", 1, 1, True, 0.1),))
    assert time(0.2, 1) == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("block_size", [(4, 1), (1, 4), (4, 4)])
def test_packed_single_weights_on_a_gpu_say_nothing_of_other_narrow_blocks(
    monkeypatch: pytest.MonkeyPatch, block_size: tuple[int, int]
) -> None:
    monkeypatch.setattr(break_even, "device_kind", lambda device: "a GPU")

    def wins(size: tuple[int, int]) -> bool:
        return dense_wins(0.3, torch.device("cuda"), torch.bfloat16, size, 1, packed=True)

    def time() -> float:
        return break_even.packed_time(0.3, torch.device("cuda"), torch.bfloat16, block_size, 1, 1 << 24)

    store("a GPU", ())
    modelled = time()
    store("a GPU", (Crossing("bfloat16", 1, 1, True, 0.1, packed=True),))
    assert wins((1, 1)) and not wins(block_size) and time() == modelled
    store(
        "a GPU",
        (Crossing("bfloat16", 1, 1, True, 0.9, packed=True), Crossing("bfloat16", *block_size, True, 0.2, packed=True)),
    )
    assert not wins((1, 1)) and wins(block_size) and time() > 1  # it was measured itself


@pytest.mark.parametrize("density", [0.05, 0.1, 0.2, 0.5])
@pytest.mark.parametrize("width", [2, 4])
def test_lines_that_weights_of_a_row_read(density: float, width: int) -> None:
    """As weights that lie at random do, up to what lines hold none of."""
    columns = (make_values("uniform", (1 << 18,), seed=3) < density).nonzero().flatten()
    lines = (columns[: columns.numel() // 32 * 32].view(-1, 32) * width).div(128, rounding_mode="floor")
    counted = 1 + float((lines.diff(dim=1) != 0).sum(1).double().mean())
    assert counted <= break_even.single_weights_lines(density, width, 1) - 2 < 1.3 * counted


@pytest.mark.skipif(not spartan.info()["native"]["available"], reason="needs the compiled CPU kernels")
def test_tuning_a_cpu_also_measures_single_weights() -> None:
    spartan.tune("cpu", (torch.float32,), timer=lambda call, device: 1.0)
    sides = {(entry.rows, entry.columns) for entry in load()[KIND]}
    assert sides == {(16, 16), (32, 32), (64, 64), (128, 128), (4, 1), (1, 1)}


def test_a_device_that_is_not_asked_is_told_the_density_of_the_budget() -> None:
    """On its way to the target a schedule passes the break-even; the host knows where it is."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 4))
    sparsifier = spartan.Sparsifier(model, spartan.methods.GMP(sparsity=0.75, block_size=8, interval=1), total_steps=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sparsifier.attach(optimizer)
    told = []
    for step in range(10):
        on_cpu, elsewhere = (copy.deepcopy(model).to(device)[0]._layout() for device in ("cpu", "meta"))
        assert on_cpu.density is None  # counted where it is read
        told.append(elsewhere.density)
        model(make_values("normal", (4, 64), seed=step)).square().mean().backward()
        optimizer.step()
    kept = float(model[0].mask_hard.double().mean())
    assert told[0] is None and all(0 < after <= before < 1 for before, after in pairwise(told[1:]))
    assert told[1] > 2 * kept and model[0].mask_expected == pytest.approx(kept, abs=1 / 64)
