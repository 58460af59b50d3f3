"""Private parts of PyTorch: all in one module, and what stands in for each where it is missing."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from spartan_kernels import torch_private

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = sorted(path for folder in ("spartan_kernels", "python") for path in (ROOT / folder).rglob("*.py"))
MODULE = ROOT / "spartan_kernels" / "torch_private.py"
ALIASES = {"forward_ad": "torch.autograd.forward_ad", "profiler": "torch.autograd.profiler"}


def private_names(source: str) -> list[str]:
    """Dotted names below torch that have a part with an underscore in front; names of operators do not count."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute):
            found.append(ast.unparse(node))
    full = [".".join([ALIASES.get(name.split(".")[0], name.split(".")[0]), *name.split(".")[1:]]) for name in found]
    parts = [(name, name.split(".")) for name in full]
    return [
        name
        for name, (root, *rest) in parts
        if root == "torch" and rest[:1] != ["ops"] and any(p.startswith("_") and not p.startswith("__") for p in rest)
    ]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_private_parts_of_pytorch_are_used_in_one_module_only(path: Path) -> None:
    assert path == MODULE or private_names(path.read_text()) == []


def test_a_private_name_is_found_in_every_form() -> None:
    assert private_names("import torch\ntorch._C._is_tracing()") == ["torch._C._is_tracing", "torch._C"]
    assert private_names("from torch.autograd.function import _SingleLevelFunction") != []
    assert private_names("from torch._functorch import config") != []
    assert private_names("from torch.autograd import forward_ad\nforward_ad._current_level") != []
    assert private_names("import torch\ntorch.__version__\ntorch.compiler.is_compiling()") == []


def test_this_pytorch_has_every_private_part() -> None:
    """Where this fails, PyTorch has dropped the names listed: the package works without them, slower."""
    assert torch_private.MISSING == []


WITHOUT = """
import importlib, sys, warnings
import torch, torch._functorch.autograd_function, torch.distributed
places = [(importlib.import_module(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in sys.argv[1:]]
taken = [getattr(*place) for place in places]
for place in places:
    delattr(*place)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import spartan
for place, part in zip(places, taken):
    setattr(*place, part)  # PyTorch itself needs it
from spartan_kernels import torch_private
assert torch_private.MISSING == sys.argv[1:], torch_private.MISSING
assert [name for name in sys.argv[1:] if not any(name in str(w.message) for w in caught)] == []
"""

GRADIENTS = """
def leaf(*shape): return torch.rand(*shape, dtype=torch.float64).add(0.1).requires_grad_()
def check(function, *inputs): assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-6)

torch.manual_seed(0)
with spartan.backend("reference"):
    gate = torch.tensor([[1.0, 0.0], [0.5, 2.0]], dtype=torch.float64, requires_grad=True)
    mask = gate.detach() != 0
    check(lambda v, a: spartan.soft_topk(v, 2.0, a, 3.0), leaf(2, 5), leaf(5))
    check(lambda v, w, a: sum(m.square().sum() for m in spartan.soft_topk_global([v, w], 3.0, [a, a[:3]], 3.0)),
          leaf(5), leaf(3), leaf(5))
    masked = lambda x, w, g, b: spartan.masked_linear(x, w, g, (2, 3), b, "gelu", mask, mask)
    smooth = torch.tensor([[1.0, 0.7], [0.5, 2.0]], dtype=torch.float64, requires_grad=True)
    every = lambda x, w, g, b: spartan.masked_linear(x, w, g, (2, 3), b, "gelu")
    check(every, leaf(3, 6), leaf(4, 6), smooth, leaf(4))
    check(lambda x, b: masked(x, torch.ones(4, 6).double(), gate.detach(), b), leaf(3, 6), leaf(4))
    check(lambda x, w, g: spartan.masked_conv2d(x, w, g, 2), leaf(1, 2, 3, 3), leaf(2, 2, 2, 2), leaf(1, 1, 2, 2))
    check(lambda a, b: spartan.sampled_matmul(a, b, torch.ones(2, 2, dtype=torch.bool), 2), leaf(4, 3), leaf(3, 4))
    packed = spartan.BlockSparseWeight.from_dense(torch.ones(4, 6).double(), (2, 3))
    check(lambda x, b: spartan.block_sparse_linear(x, packed, b, "silu"), leaf(3, 6), leaf(4))
x, w, g, b = leaf(3, 6), leaf(4, 6), smooth, leaf(4)
eager = torch.autograd.grad(every(x, w, g, b).sum(), [x, w, g, b])
graph = torch.compile(every, fullgraph=True, backend="aot_eager")
compiled = torch.autograd.grad(graph(x, w, g, b).sum(), [x, w, g, b])
for one, other in zip(eager, compiled):
    torch.testing.assert_close(one, other)
try:
    torch.autograd.grad(torch.autograd.grad(every(x, w, g, b).sum(), x, create_graph=True)[0].sum(), w)
except RuntimeError as error:
    assert "differentiable once" in str(error), error
else:
    raise AssertionError("a second derivative was computed")
"""


@pytest.mark.parametrize(
    "missing",
    [
        ("torch._functorch.autograd_function.enable_single_level_autograd_function",),
        ("torch.autograd.forward_ad._set_fwd_grad_enabled",),
        ("torch._C._are_functorch_transforms_active", "torch._C._len_torch_dispatch_stack"),
    ],
    ids=lambda names: names[0].rpartition(".")[2],
)
def test_gradients_are_right_where_a_private_part_is_missing(missing: tuple[str, ...]) -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    command = [sys.executable, "-c", WITHOUT + GRADIENTS, *missing]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
