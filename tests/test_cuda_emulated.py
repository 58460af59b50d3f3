"""The CUDA kernels without a GPU: the tests of every operator, over an extension built on the emulator.

It shows that the kernels compute what they should whatever the order of threads and blocks, which is drawn anew for
every launch, and that no two threads touch the same memory at once (tests/cuda_emulator/races.h); not how fast they
are. The orders follow from a seed, which a failure names; SPARTAN_EMULATOR_SEED sets it for all tests here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu import build

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(
    shutil.which("cmake") is None or shutil.which("c++") is None, reason="needs cmake and a C++ compiler"
)


@pytest.fixture(scope="module")
def emulated() -> Path:
    """The extension with its CUDA kernels compiled as C++."""
    return build.emulated()


def environment_of(extension: Path, seed: int) -> dict[str, str]:
    return {
        "SPARTAN_EMULATOR_SEED": str(seed),
        "HYPOTHESIS_PROFILE": "slow",
        **os.environ,
        "SPARTAN_EMULATED": str(extension),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]),
    }


_FILES = {
    "masks": ("masked_weight", "hard_topk", "hard_indices", "hard_bits", "step_gradient", "soft_solution"),
    "soft": ("soft_topk", "soft_topk_global", "corners"),
    "masked": ("masked_scores", "magnitudes"),
    "products": ("layout", "masked_linear", "block_sparse", "sampled_matmul"),
}


@pytest.mark.parametrize("files", _FILES.values(), ids=list(_FILES))
def test_the_operators_pass_their_own_tests(emulated: Path, files: tuple[str, ...]) -> None:
    environment = environment_of(emulated, 1)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.cuda_emulator.plugin", "-p", "no:cacheprovider"]
    # what only concerns torch.library and torch.compile is the same on every backend
    few = "1000000.0-1e-06-two_valued or 1000000.0-0.999999-quantised or 1.0-1e-06-normal"
    chosen = f"cuda-cpu and not opcheck and not compiled and not thread_count and (not test_corners or {few})"
    scales = "9-1e-30-1.0 or 10-1e+13-1.0 or 64-smallest-10000.0 or gradient or run_out or bfloat16"
    chosen += f" and not (test_masked_scores and 5001) and (not test_magnitudes or {scales})"
    # a kernel sees distinct values or ties; how the distinct ones are spread is the same to it
    chosen += " and not (stable_sort and (lognormal or student_t or uniform or sorted))"
    command += ["-k", chosen]
    command += [str(ROOT / "tests" / f"test_{name}.py") for name in files]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.parametrize(("name", "seed"), [("lists", 2), ("matmul", 3), ("row_search", 4)])
def test_every_way_through_the_kernels(emulated: Path, name: str, seed: int) -> None:
    environment = environment_of(emulated, seed)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.cuda_emulator.plugin", "-p", "no:cacheprovider"]
    command += [str(ROOT / "tests" / "cuda_emulator" / f"test_{name}.py")]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_rows_of_every_length_the_kernels_distinguish(emulated: Path) -> None:
    script = """
import tests.cuda_emulator.plugin
import spartan
import torch
from spartan_kernels import ops
from spartan_kernels.testing import make_costs, make_values, oracle_hard_topk, oracle_soft_topk, total_cost

lengths = (1, 2, 4, 5, 16, 17, 64, 65, 256, 257, 1024, 1025, 4096, 4097, 8192, 8193)
for n in (*lengths, 15_361):  # the emulator's shared memory ends at 15,360
    for kind in ("none", "power_of_two"):
        values = make_values("quantised", (3, n + 2))[:, 1:-1]  # rows that are not side by side
        a = make_costs(kind, values.shape)
        budget = total_cost(a, values, -1) * torch.tensor([0.13, 0.5, 0.999], dtype=torch.float64)
        hard = ops.hard_topk(values, budget, a, backend="cuda")
        assert torch.equal(hard, oracle_hard_topk(values, budget, a)), (n, kind)
        soft = ops.soft_topk(values, budget, a, 3.0, backend="cuda")
        error = (soft - oracle_soft_topk(values, budget, a, 3.0)).abs().max()
        assert error < 2e-6, (n, kind, error)

# too long for a thread block
values, budget = torch.randn(2, 131_075), torch.tensor([10_000.0, 40_000.0], dtype=torch.float64)
costs = 0.5 + torch.rand(2, 131_075)
for a in (None, costs, costs[0]):
    assert torch.equal(ops.hard_topk(values, budget, a, backend="cuda"), oracle_hard_topk(values, budget, a))
    found = {}
    for name in ("cuda", "reference"):
        leaf = values.clone().requires_grad_()
        with spartan.backend(name):
            spartan.soft_topk(leaf, budget, a, 3.0).mul(costs).sum().backward()
        found[name] = leaf.grad
    error = (found["cuda"] - found["reference"]).abs().max()
    assert error < 1e-5, error
"""
    command = [sys.executable, "-c", script]
    environment = environment_of(emulated, 5)
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
