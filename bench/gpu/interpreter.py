"""Triton's interpreter under NumPy 2.5: releases before 3.9 make numbers of arrays in a way that it refuses."""

from __future__ import annotations

from typing import Any


def mend() -> None:
    """Let a tensor of one element count a loop, as later releases do."""
    import numpy as np
    import triton
    from triton.runtime import interpreter

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version >= (3, 9) or np.lib.NumpyVersion(np.__version__) < "2.5.0" or hasattr(interpreter, "spartan_mended"):
        return
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor, interpreter.spartan_mended = patched, True
