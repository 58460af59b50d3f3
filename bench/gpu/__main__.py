"""`python -m bench.gpu`: the whole plan on a machine with a CUDA device, or (SPARTAN_REHEARSE=1) on the CPU instead.

Uses the Python that runs it and what is installed there: no network, no environment of its own. Leaves gpu.log,
gpu.jsonl and summary.txt in the folder OUT (default: gpu-results).
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from bench.gpu import plan, records, summary
from bench.gpu.run import ROOT, Run


def main() -> int:
    """0 when every step ended well."""
    import torch

    rehearse = records.rehearsing()
    if not rehearse and not torch.cuda.is_available():
        print(
            f"make gpu needs a CUDA device; PyTorch {torch.__version__} sees none."
            " Without one: make gpu-compile, make gpu REHEARSE=1"
        )
        return 1
    out = Path(os.environ.get("OUT") or ROOT / ("build/gpu-rehearsal" if rehearse else "gpu-results"))
    caches = tempfile.mkdtemp(prefix="spartan-gpu-")
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    environment = {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "TRITON_CACHE_DIR": f"{caches}/triton",  # empty, so that the time of a first call is that of a first call
        "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor",
        "SPARTAN_TUNE_CACHE": f"{caches}/tune.json",
    }
    if rehearse:
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    try:
        return Run(plan.steps(rehearse), out, summary.lines, environment).go()
    finally:
        shutil.rmtree(caches, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
