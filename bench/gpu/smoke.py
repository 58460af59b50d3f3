"""`python -m spartan_kernels.smoke`, in a rehearsal with the emulated extension in the place of CUDA's."""

from __future__ import annotations

import sys

from bench.gpu import backends

if __name__ == "__main__":
    backends.ready()
    from spartan_kernels.smoke import main

    sys.exit(main())
