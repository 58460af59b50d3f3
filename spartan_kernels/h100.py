"""An H100 SXM, for what is predicted by counts: nothing was measured."""

from __future__ import annotations

__all__ = ["BANDWIDTH", "CLOCK", "LAUNCH", "PROCESSORS", "SCHEDULERS", "WARP"]

BANDWIDTH = 3.35e12  # bytes in a second, from memory
CLOCK = 1.755e9  # in a second
PROCESSORS = 132
SCHEDULERS, WARP = 4, 32  # of a processor, and threads of a warp
LAUNCH = 1.5  # microseconds from one launch of a stream to the next: assumed, for those too that find nothing to do
