"""Other versions of Triton beside the installed one, each in a folder of the environment, made once and kept."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

# The oldest that the package is meant for, and the newest there is: the installed one is left out.
VERSIONS = ("3.6.0", "3.9.0")
FOLDER = Path(sys.prefix) / "tritons"


def folder_of(version: str, folder: Path = FOLDER) -> Path:
    """Where a version is; installs it on the first call. Without a network, what was installed once still works.

    Raises:
        RuntimeError: it cannot be installed.
    """
    place = folder / version
    if (place / ".complete").exists():
        return place
    shutil.rmtree(place, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*command, "--target", str(place), f"triton=={version}"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if line.startswith("ERROR")), done.stderr[-200:])
        raise RuntimeError(f"Triton {version} cannot be installed beside this one: {reason}")
    (place / ".complete").touch()
    return place


def environment(place: Path) -> dict[str, str]:
    """The environment of a process that imports the Triton in `place` instead of the installed one."""
    paths = [str(place), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def others(installed: str) -> tuple[str, ...]:
    """The versions that the installed one does not stand for."""
    return tuple(version for version in VERSIONS if version != installed)
