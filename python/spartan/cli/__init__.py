"""The command line: `spartan info | bench | demo | train | inspect`."""

from __future__ import annotations

from spartan.cli.commands import main

__all__ = ["main"]
