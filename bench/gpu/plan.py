"""The plan of `make gpu`: what is asked first is what would be missed most."""

from __future__ import annotations

import sys

from bench.gpu.run import Step

# seconds after the start by which a step has to have ended, and the fewest that are worth its beginning
_STEPS = (
    ("facts", 25, 5),
    ("probes", 110, 20),
    ("headline", 260, 20),
    ("suite", 380, 20),
    ("sanitize", 450, 20),
    ("profile", 530, 15),
)
_BUILD_ENDS = 240
SECONDS = 540  # for all of them, with the summary
_REHEARSAL_STEP = 900  # seconds for each step of a rehearsal, which asks whether it runs and not how fast


def steps(rehearse: bool = False) -> list[Step]:
    """The steps in order; the build of the CUDA kernels goes on behind the first ones."""
    build = Step("build", _command("build"), _REHEARSAL_STEP if rehearse else _BUILD_ENDS, background=True)
    return [build] + [
        Step(name, _command(name), _REHEARSAL_STEP * (1 + i) if rehearse else ends, least)
        for i, (name, ends, least) in enumerate(_STEPS)
    ]


def _command(name: str) -> list[str]:
    return [sys.executable, "-m", f"bench.gpu.{name}"]
