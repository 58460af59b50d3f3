"""Kernels whose programs wait for one another, or count one another: each with the reason why that ends on any GPU.

A kernel belongs here only if its programs cannot starve one another: a launch may hold more programs
than run at the same time, so one that waits for a program that has not begun waits for ever.
"""

from __future__ import annotations

_LAST = "no program waits: each draws a ticket and goes on, and the last one finds that all others are done"

DECLARED: dict[str, str] = {"_survey_kernel": _LAST, "_write_kernel": _LAST}
