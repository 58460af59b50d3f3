"""`make gpu`: build with CUDA, test, sanitize and measure on a machine with a CUDA device; one table, one exit status.

Uses the Python that runs it and what is installed there (no network, no environment of its own). Results and logs go to
the folder OUT (default: gpu-results).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT_SECONDS = 8 * 60


@dataclass(frozen=True)
class Step:
    """A command, the seconds it may take, and the program it needs besides Python."""

    name: str
    command: list[str]
    limit: int
    needs: str | None = None


@dataclass(frozen=True)
class Outcome:
    """How a step ended."""

    name: str
    state: str  # "ok", "FAILED", "absent"
    seconds: float
    remark: str


def steps(out: Path) -> list[Step]:
    """Build, tests, memory and race checks on the smoke test's small sizes, benchmark."""
    python = sys.executable
    smoke = [python, "-m", "spartan_kernels.smoke", "--device", "cuda"]
    sanitizer = ["compute-sanitizer", "--error-exitcode", "9"]
    products = ["masked_matmul", "--device", "cuda", "--dtype", "bfloat16", "--quick", "--save"]
    return [
        Step("build", [python, "setup.py", "-q", "build_ext", "--inplace"], 180),
        Step("smoke", smoke, 60),
        Step("tests", [python, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"], 180),
        Step("memcheck", [*sanitizer, "--tool", "memcheck", *smoke], 120, "compute-sanitizer"),
        Step("racecheck", [*sanitizer, "--tool", "racecheck", *smoke], 120, "compute-sanitizer"),
        Step("benchmark", [python, "-m", "bench", "--device", "cuda", "--quick", "--save", "--results", str(out)], 150),
        Step("products", [python, "-m", "bench", *products, "--results", str(out / "bfloat16")], 120),
    ]


def run(step: Step, out: Path) -> Outcome:
    """Run a step with its log in `out`."""
    if step.needs and shutil.which(step.needs) is None:
        return Outcome(step.name, "absent", 0.0, f"{step.needs} is not installed")
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "SPARTAN_NATIVE": "on",
        "SPARTAN_CUDA": os.environ.get("SPARTAN_CUDA", "on" if shutil.which("nvcc") else "auto"),
    }
    log = out / f"{step.name}.log"
    start = time.perf_counter()
    with log.open("w") as file:
        try:
            done = subprocess.run(
                step.command,
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=step.limit,
                check=False,
            )
            state, remark = ("ok", _last_line(log)) if done.returncode == 0 else ("FAILED", _last_line(log))
        except subprocess.TimeoutExpired:
            state, remark = "FAILED", f"took longer than {step.limit} s"
    return Outcome(step.name, state, time.perf_counter() - start, remark)


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:90] if lines else ""


def main() -> int:
    """Run every step, the later ones also when an earlier one failed; 0 when none did."""
    out = Path(os.environ.get("OUT") or ROOT / "gpu-results")
    out.mkdir(parents=True, exist_ok=True)
    import torch

    if not torch.cuda.is_available():
        print(f"make gpu needs a CUDA device; PyTorch {torch.__version__} sees none. Without one: make gpu-compile")
        return 1
    print(f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, PyTorch {torch.__version__}")
    start, outcomes = time.perf_counter(), []
    for step in steps(out):
        outcomes.append(run(step, out))
        last = outcomes[-1]
        print(f"{last.name:10} {last.state:7} {last.seconds:6.1f} s  {last.remark}", flush=True)
        if step.name == "build" and last.state == "FAILED":
            break
    total = time.perf_counter() - start
    late = total > LIMIT_SECONDS
    print(f"total {total:.0f} s, logs in {out}" + (f": over the {LIMIT_SECONDS} s it may take" if late else ""))
    return int(late or any(outcome.state == "FAILED" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
