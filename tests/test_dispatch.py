"""Dispatch: the support table, auto and named backends, info() and checks()."""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

import spartan
import spartan_kernels
from spartan_kernels import dispatch, ops
from spartan_kernels.backends import extension

VALUES = torch.tensor([3.0, 1.0, 2.0])


@pytest.fixture
def no_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine as if the extension had not been built."""
    real = dispatch.unavailable

    def unavailable(name: str) -> str | None:
        return "the extension was not built" if name == "native" else real(name)

    monkeypatch.setattr(dispatch, "unavailable", unavailable)
    dispatch.select.cache_clear()
    dispatch._warn_once.cache_clear()
    yield
    dispatch.select.cache_clear()
    dispatch._warn_once.cache_clear()


def test_every_operator_is_defined_and_served_by_the_reference() -> None:
    for operator, backends in dispatch.SUPPORT.items():
        assert hasattr(torch.ops.spartan, operator), operator
        assert "reference" in backends
        wide = () if "float8" in operator else (torch.float64,)
        for dtype in (torch.float32, torch.bfloat16, torch.float16, *wide):
            assert dispatch.select(operator, "cpu", dtype, "reference") == "reference"


def test_info_agrees_with_the_choice_and_gives_a_reason_for_every_no() -> None:
    report = spartan_kernels.info()
    assert report["version"] == spartan_kernels.__version__
    assert report["torch"] == torch.__version__
    assert set(report["operators"]) == set(dispatch.SUPPORT)
    for operator, by_device in report["operators"].items():
        for device, row in by_device.items():
            assert dispatch.select(operator, device, torch.float32, "auto") == row["auto"]
            for name in dispatch.BACKENDS:
                assert row[name] is None or (isinstance(row[name], str) and row[name])
            assert row[row["auto"]] is None


def test_on_rocm_triton_serves_every_operator_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """ROCm's devices are called cuda; the CUDA C++ kernels, were they built, say why they cannot run."""
    built = SimpleNamespace(cuda_version="13.0", cuda_archs="9.0")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(extension, "native", built)
    for cached in (dispatch.unavailable, dispatch.select, dispatch.least_capability):
        cached.cache_clear()
    try:
        assert "ROCm" in str(dispatch.unavailable("cuda"))
        for operator, backends in dispatch.SUPPORT.items():
            triton = backends.get("triton")
            served = triton is not None and triton.capability == (0, 0)  # another is asked of NVIDIA's alone
            expected = "triton" if served else "reference"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert dispatch.select(operator, "cuda", torch.float32, "auto") == expected
    finally:
        monkeypatch.undo()
        for cached in (dispatch.unavailable, dispatch.select, dispatch.least_capability):
            cached.cache_clear()


@pytest.mark.parametrize("operator", ["soft_topk_global_forward", "hard_topk_global_forward", "solve_masks_"])
def test_over_a_process_group_only_those_that_solve_over_one_serve(operator: str) -> None:
    for name in dispatch.BACKENDS:
        alone = dispatch.refusal(operator, name, "cuda", torch.float32)
        grouped = dispatch.refusal(operator, name, "cuda", torch.float32, grouped=True)
        missing = f"the {name} backend has no {operator} over a process group"
        assert grouped == (alone if name in dispatch.GROUP_BACKENDS else missing)
    with pytest.raises(ValueError, match=r"backend='cuda': the cuda backend has no \w+ over a process group"):
        dispatch.select(operator, "cuda", torch.float32, "cuda", grouped=True)


def test_auto_steps_down_and_says_so_once(no_native: None) -> None:
    with pytest.warns(RuntimeWarning, match=r"native.*not built"):
        assert dispatch.select("soft_topk_forward", "cpu", torch.float32, "auto") == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.select("soft_topk_forward", "cpu", torch.float64, "auto") == "reference"


@pytest.mark.parametrize(("capability", "serves"), [((8, 0), False), ((8, 6), False), ((8, 9), True), ((10, 0), True)])
def test_8_bits_are_multiplied_on_gpus_that_can(
    capability: tuple[int, int], serves: bool, monkeypatch: pytest.MonkeyPatch, no_native: None
) -> None:
    """And by the reference elsewhere, as auto says once; other operators ask no GPU."""
    monkeypatch.setattr(dispatch, "unavailable", lambda name: None)
    monkeypatch.setattr(dispatch, "least_capability", lambda: capability)
    operator, arguments = "block_sparse_linear_float8_forward", ("cuda", torch.bfloat16)
    assert dispatch.select("block_sparse_linear_forward", *arguments, "triton") == "triton"
    if serves:
        assert (
            dispatch.select(operator, *arguments, "triton") == dispatch.select(operator, *arguments, "auto") == "triton"
        )
        return
    found = ".".join(map(str, capability))
    with pytest.raises(ValueError, match=rf"triton.*compute capability 8\.9.*{found}"):
        dispatch.select(operator, *arguments, "triton")
    with pytest.warns(RuntimeWarning, match=r"compute capability 8\.9"):
        assert dispatch.select(operator, *arguments, "auto") == "reference"


def test_a_named_backend_never_falls_back(no_native: None) -> None:
    with pytest.raises(ValueError, match=r"native.*not built"):
        ops.soft_topk(VALUES, 1.0, backend="native")
    for name in ("cuda", "triton"):
        with pytest.raises(ValueError, match=name):
            ops.hard_topk(VALUES, 1.0, backend=name)


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"backend.*native.*reference.*'fast'"):
        ops.soft_topk(VALUES, 1.0, backend="fast")
    with pytest.raises(ValueError, match="'fast'"), spartan_kernels.backend("fast"):
        pass


def test_block_argument_and_environment_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARTAN_BACKEND", "reference")
    assert dispatch.requested(None) == "reference"
    assert dispatch.requested("auto") == "auto"
    with spartan_kernels.backend("auto"):
        assert dispatch.requested(None) == "auto"
        with spartan_kernels.backend("triton"):
            assert dispatch.requested(None) == "triton"
            assert dispatch.requested("native") == "native"
        assert dispatch.requested(None) == "auto"
    monkeypatch.setenv("SPARTAN_BACKEND", "quick")
    with pytest.raises(ValueError, match="'quick'"):
        ops.soft_topk(VALUES, 1.0)


@pytest.mark.parametrize("by_block", [True, False])
def test_a_backward_pass_with_a_slope_runs_on_the_backend_named(
    monkeypatch: pytest.MonkeyPatch, by_block: bool
) -> None:
    used: set[str] = set()
    implementation = dispatch.implementation

    def recording(operator: str, name: str) -> Callable[..., object]:
        used.add(name)
        return implementation(operator, name)

    monkeypatch.setattr(dispatch, "implementation", recording)
    weight, gate = torch.randn(8, 8, requires_grad=True), torch.ones(2, 2)
    with spartan.backend("reference" if by_block else "auto"):
        named = None if by_block else "reference"
        y = spartan.masked_linear(torch.randn(3, 8), weight, gate, 4, slope=torch.ones(2, 2), backend=named)
        y.sum().backward()
    assert used == {"reference"}


def test_block_ends_with_an_error_and_stays_in_its_thread() -> None:
    with pytest.raises(RuntimeError, match="inside"), spartan_kernels.backend("reference"):
        seen: list[str] = []
        thread = threading.Thread(target=lambda: seen.append(dispatch.requested(None)))
        thread.start()
        thread.join()
        assert seen == ["auto"]
        raise RuntimeError("inside")
    assert dispatch.requested(None) == "auto"


def test_a_compiled_graph_obeys_the_block() -> None:
    compiled = torch.compile(lambda v: ops.soft_topk(v, 1.0), fullgraph=True, backend="eager")
    expected = compiled(VALUES)
    with spartan_kernels.backend("reference"):
        torch.testing.assert_close(compiled(VALUES), expected)
    with spartan_kernels.backend("triton"), pytest.raises(ValueError, match="triton"):
        compiled(VALUES)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_checks_raise_on_the_gpu_only_when_asked() -> None:
    bad = torch.tensor([1.0, float("nan")], device="cuda")
    assert ops.soft_topk(bad, 1.0).isnan().all()
    spartan_kernels.checks(True)
    try:
        with pytest.raises(ValueError, match="values"):
            ops.soft_topk(bad, 1.0)
    finally:
        spartan_kernels.checks(False)


def test_import_is_light() -> None:
    """Importing spartan loads neither triton nor matplotlib, which cost seconds."""
    code = "import spartan, sys; print([m for m in ('triton', 'matplotlib', 'rich') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
