"""Triton's interpreter, mended: NumPy 2.5 refuses what releases before 3.9 do, and all of them search without need."""

from __future__ import annotations

from typing import Any


def mend() -> None:
    """Let a tensor of one element count a loop, as later releases do, and a launch search the language once."""
    from triton.runtime import interpreter

    if not hasattr(interpreter, "spartan_mended"):
        interpreter.spartan_mended = True
        _count_loops(interpreter)
        _search_once(interpreter)


def _count_loops(interpreter: Any) -> None:
    import numpy as np
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version >= (3, 9) or np.lib.NumpyVersion(np.__version__) < "2.5.0":
        return
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def _search_once(interpreter: Any) -> None:
    """A kernel's call of a function searches the whole language for what to patch, as its launch has: half the time."""
    if not hasattr(interpreter, "_LangPatchScope"):  # newer or older than this Triton
        return
    patch, execute = interpreter._patch_lang, interpreter.GridExecutor.__call__
    modules: set[int] = set()  # whose names are patched, until the launch ends and gives them back

    def once(function: Any) -> Any:
        module = id(function.__globals__)
        if module in modules:
            return interpreter._LangPatchScope()
        modules.add(module)
        return patch(function)

    def launch(executor: Any, *arguments: Any, **options: Any) -> Any:
        modules.clear()
        try:
            return execute(executor, *arguments, **options)
        finally:
            modules.clear()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = once, launch
