"""`python -m spartan.cli`."""

from __future__ import annotations

import sys

from spartan.cli import main

if __name__ == "__main__":
    sys.exit(main())
