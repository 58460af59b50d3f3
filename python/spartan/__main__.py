"""`python -m spartan`, which torchrun starts as `-m spartan`."""

from __future__ import annotations

import sys

from spartan.cli import main

if __name__ == "__main__":
    sys.exit(main())
