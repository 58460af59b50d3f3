"""The Triton kernels on CPU tensors, in Triton's interpreter: the operator tests, and problems of several programs.

The interpreter is chosen before triton is imported, so the tests run in a process of their own. It rounds to bfloat16
towards zero and costs milliseconds for each program: a few small cases of each operator stand for the rest. Every
launch is watched for races, for accesses outside of their tensors and for programs that wait for one another.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

TESTS = Path(__file__).parent
# by the files that share a process: the start of one costs more than most of them
SELECTIONS = {
    "masks": {
        "test_autograd.py": "(corners and (flat or nothing or everything)) or every_shape_of_costs or loses_nothing",
        "test_corners.py": "1000000.0-1e-06-two_valued or 1000000.0-0.999999-quantised or 1.0-1e-06-normal",
        "test_patterns.py": "(the_largest and quantised) or soft_pattern",
        "test_magnitudes.py": "(9-1e-30-1.0 or 10-1e+13-1.0 or 64-smallest-10000.0 or 10--1e+30-10000.0) or gradient",
    },
    "rows": {
        "test_soft_topk.py": "long_rows or odd_lengths or nothing_and or ties or plateau or non_finite"
        " or (float32_gradient and 20.0)",
        "test_hard_topk.py": "long_rows or lowest_index or first_entry or fractional"
        " or (concatenation and mixed_scales)",
        "test_triton_split_rows.py": "reference or few_trials or whichever",
        "test_hard_indices.py": "(mask_keeps and (float16-7 or 255 or 7-torch)) or (too_few and 10-torch)",
        "test_hard_bits.py": "300-torch or 9000 or training or (lists and 1000)",
        "test_masked_weight.py": "block_scores or zero_weights or dropped"
        " or (float32 and ((forward_and_gradient and both) or memory_of_its_input or signs_are))",
    },
    "lists": {
        "test_soft_topk_global.py": "list_equals or sharded or nothing or stale or carries or (oracle and mixed)",
        "test_masked_scores.py": "causal or step or a_masked_list or (lists and scalar-3.0) or (such_a_list and little)"
        " or ((rows or gradients or such_a_row or refused) and (cpu-4 or cpu-64))",
        "test_triton_launch_plan.py": "reads_of or last_solve or one_round",
        "test_soft_solution.py": "operators_take or sum_over_the_kept",
    },
    "products": {
        "test_masked_linear.py": "(value and 37) or many_tokens or closed_gates or layout_replaces or nan_gate",
        "test_layout.py": "what_is_empty or transposed or nan_is",
        "test_block_sparse.py": "value_and",
        "test_single_weights.py": "value or finite or anew",
        "test_sampled_matmul.py": "opcheck",
        "test_float8.py": "value_against or zeros or rounds_as or long_depth or empty or all_outputs or row_of"
        " or compile or autocast",
    },
    "convolutions": {
        "test_masked_conv.py": "value_and or no_block or closed_block or needs8 or needs3 or lie_in_memory or groups",
        "test_block_sparse_conv.py": "(value_and or every_block) and not 512 and not 48",
    },
}


def interpreted(*arguments: str) -> None:
    """Run tests in a process with the interpreter."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:warnings", *arguments]
    environment = os.environ | {"TRITON_INTERPRET": "1", "HYPOTHESIS_PROFILE": "slow"}
    done = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.parametrize("group", SELECTIONS)
def test_operators_in_the_interpreter(group: str) -> None:
    files = SELECTIONS[group]
    chosen = " or ".join(f"({file} and ({selection}))" for file, selection in files.items())
    dtypes = "(test_triton or triton and not float64 and not bfloat16 and not float16)"
    interpreted(
        "-p", "tests.triton_races.plugin", *(str(TESTS / file) for file in files), "-k", f"{dtypes} and ({chosen})"
    )


def test_operators_over_processes() -> None:
    """The ranks' processes are not watched for races; their kernels are, with a group of one rank (below)."""
    interpreted(str(TESTS / "test_distributed.py"), "-k", "2- and triton")


@pytest.mark.parametrize("file", ["test_planted.py", "test_kernels.py"])
def test_races_in_the_interpreter(file: str) -> None:
    """Planted faults of every kind are found, and the kernels have none."""
    interpreted(str(TESTS / "triton_races" / file))
