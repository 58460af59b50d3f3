"""The benchmark: `python -m bench`. Every number in the documentation comes from here."""

from __future__ import annotations

import os

# The profiler, which counts allocations for us, otherwise writes to stderr whenever it starts and stops, and
# whenever memory is released that was allocated before.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
