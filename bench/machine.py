"""The machine: its name and versions, its caches, its copy and matmul ceilings, and whether it was quiet."""

from __future__ import annotations

import datetime
import os
import platform
import re
import statistics
import subprocess
from pathlib import Path
from typing import Any

import torch

from bench.timing import Sample, measure
from spartan_kernels import info
from spartan_kernels.backends import extension

ROOT = Path(__file__).resolve().parent.parent
_BUSY_LOAD = 0.5  # runnable processes beside this one, averaged over a minute
_UNSTEADY = 0.10  # spread of a copy, relative


def device_name(device: str) -> str:
    """Name of the device's model, as its vendor writes it."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M)
        if match:
            return match[1].strip()
    return platform.processor() or platform.machine()


def _model() -> str | None:
    """Family and model of the CPU: a vendor's name alone can stand for many."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = [re.search(rf"^{name}\s*:\s*(\d+)$", text, re.M) for name in ("cpu family", "model")]
    return " ".join(f"{name} {m[1]}" for name, m in zip(("family", "model"), found, strict=True) if m) or None


def folder_name(device: str) -> str:
    """Name of the results' folder of this device; of a CPU also with what its kernels use of it."""
    kind = torch.device(device).type
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    if kind != "cpu":
        return slug
    instructions = info()["native"].get("instruction_set") or "reference"
    return f"{kind}-{slug}-{instructions}-{torch.get_num_threads()}-threads"


def cache_bytes(device: str) -> int:
    """Size of the last-level cache; 64 MiB where the system does not say."""
    if torch.device(device).type == "cuda":
        return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20))
    sizes = [
        int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]]
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if (text := path.read_text().strip())[-1] in "KMG"
    ]
    return max(sizes, default=64 << 20)


def modified() -> bool:
    """Whether files differ from the revision that is checked out."""
    return bool(_git("status", "--porcelain", "--untracked-files=no"))


def _git(*arguments: str) -> str:
    try:
        result = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    except OSError:  # no git here
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def describe(device: str) -> dict[str, Any]:
    """Everything a reader needs to judge or repeat a result."""
    from spartan_kernels import info

    report = info()
    cuda = torch.device(device).type == "cuda"
    return {
        "device": device_name(device),
        "model": None if cuda else _model(),
        "device_type": torch.device(device).type,
        "driver": _driver() if cuda else platform.release(),
        "cuda": torch.version.cuda if cuda else None,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "last_level_cache_bytes": cache_bytes(device),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "spartan": report["version"],
        "native": report["native"],
        "revision": _git("rev-parse", "HEAD"),
        "modified": modified(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.splitlines()[0].strip()


def copy_ceiling(device: str, quick: bool) -> Sample:
    """Seconds per byte moved (read and written) by a copy far larger than the cache."""
    n = max(2 * cache_bytes(device), (32 << 20) if quick else (128 << 20)) // 4
    source, target = torch.ones(n, device=device), torch.empty(n, device=device)
    return measure(lambda: target.copy_(source), device, samples=15).scaled(1 / (2 * 4 * n))


def matmul_ceiling(device: str, dtype: torch.dtype, quick: bool) -> Sample:
    """Seconds per floating-point operation of a square dense product."""
    n = 1024 if torch.device(device).type == "cpu" else 8192
    n = n // 2 if quick else n
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return measure(lambda: a @ b, device, samples=10).scaled(1 / (2 * n**3))


def fma_ceiling(device: str, quick: bool) -> Sample | None:
    """Seconds per floating-point operation of multiply-adds in registers alone, on every thread of a CPU."""
    if torch.device(device).type != "cpu" or extension.unavailable():
        return None
    rounds = (1 << 18) if quick else (1 << 22)
    operations = extension.multiply_adds(rounds)  # and a warm-up
    return measure(lambda: extension.multiply_adds(rounds), device, samples=10, warm_up=1).scaled(1 / operations)


def busy() -> list[str]:
    """Reasons to distrust what is measured now, before anything of ours runs."""
    load = os.getloadavg()[0]
    return [f"load average {load:.2f} before the start"] if load > _BUSY_LOAD else []


def unsteady(before: Sample, after: Sample) -> list[str]:
    """Reasons to distrust what was measured between two measurements of the copy ceiling."""
    reasons = []
    spread = max(before.spread, after.spread)
    if spread > _UNSTEADY:
        reasons.append(f"the copy ceiling itself spread by {spread:.0%}")
    drift = abs(before.median - after.median) / statistics.mean((before.median, after.median))
    if drift > _UNSTEADY:
        reasons.append(f"the copy ceiling moved by {drift:.0%} during the run")
    return reasons
