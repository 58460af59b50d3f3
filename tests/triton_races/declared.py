"""Kernels whose programs wait for one another, or count one another: each with the reason why that ends on any GPU.

None does today. A kernel belongs here only if its programs cannot starve one another: a launch may hold more programs
than run at the same time, so one that waits for a program that has not begun waits for ever.
"""

from __future__ import annotations

DECLARED: dict[str, str] = {}
