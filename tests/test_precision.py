"""float32 on a GPU is multiplied as PyTorch's switches say, set through either of their interfaces.

What was set once through one of them changes what the other can read, for the whole process: a process each.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch

from spartan_kernels import precision

LEGACY = "torch.backends.cuda.matmul.allow_tf32 = True"
HIGH = "torch.set_float32_matmul_precision('high')"
MATMUL = "torch.backends.cuda.matmul.fp32_precision = {!r}"
EVERYWHERE = "torch.backends.fp32_precision = {!r}"
SETTINGS = {
    "nothing set": ([], False),
    "allow_tf32": ([LEGACY], True),
    "set_float32_matmul_precision": ([HIGH], True),
    "fp32_precision of products": ([MATMUL.format("tf32")], True),
    "fp32_precision of everything": ([EVERYWHERE.format("tf32")], True),
    "that of products over that of everything": ([EVERYWHERE.format("tf32"), MATMUL.format("ieee")], False),
    "the new interface after the old one": ([LEGACY, MATMUL.format("ieee")], False),
    "the old interface after the new one": ([MATMUL.format("tf32"), LEGACY.replace("True", "False")], False),
}
CONV = "torch.backends.cudnn.conv.fp32_precision = {!r}"
LEGACY_CONV = "torch.backends.cudnn.allow_tf32 = False"
CONVOLUTIONS = {
    "nothing set": ([], True),
    "allow_tf32": ([LEGACY_CONV], False),
    "that of products": ([MATMUL.format("ieee")], True),
    "fp32_precision of convolutions": ([CONV.format("ieee")], False),
    "fp32_precision of everything": ([EVERYWHERE.format("ieee")], False),
    "that of convolutions over that of everything": ([EVERYWHERE.format("ieee"), CONV.format("tf32")], True),
}
READ = """
import torch
from spartan_kernels.precision import tf32, tf32_of_convolutions
{settings}
assert {function}() is {expected}
{triton}
"""
TRITON = """
from spartan_kernels.backends.triton.product_plan import precision_of
assert precision_of(torch.empty(2)) == ("tf32" if {expected} else "ieee")
assert precision_of(torch.empty(2, dtype=torch.float16)) == "ieee"
"""
TRITON_CONVOLUTION = """
from spartan_kernels.backends.triton.conv_lines import precision_of_convolution
assert precision_of_convolution(torch.empty(2)) == ("tf32" if {expected} else "ieee")
assert precision_of_convolution(torch.empty(2, dtype=torch.float16)) == "ieee"
"""


def read(settings: list[str], expected: bool, function: str, triton: str) -> None:
    triton = triton.format(expected=expected) if importlib.util.find_spec("triton") else ""
    script = READ.format(settings="\n".join(settings), expected=expected, function=function, triton=triton)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("setting", SETTINGS)
def test_either_interface_of_pytorch_is_obeyed(setting: str) -> None:
    read(*SETTINGS[setting], "tf32", TRITON)


@pytest.mark.parametrize("setting", CONVOLUTIONS)
def test_convolutions_obey_a_switch_of_their_own(setting: str) -> None:
    read(*CONVOLUTIONS[setting], "tf32_of_convolutions", TRITON_CONVOLUTION)


def test_a_search_chooses_for_itself_and_leaves_the_switch_alone() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    with precision.using(True):
        assert precision.tf32() and precision.tf32_of_convolutions()
        with precision.using(False):
            assert not precision.tf32()
        assert torch.backends.cuda.matmul.fp32_precision == before
    assert precision.tf32() == (before == "tf32")
