"""The ranks of the distributed tests: `python distributed_worker.py WORLD FOLDER SUITE` runs their checks.

The ranks are forked once all is imported, and the checks of one world size and suite share this start. A check that
fails on one rank may leave the others waiting, so the first failure ends the run; the checks after it count as not run.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import distributed_dtensors  # noqa: F401  registers its checks, as the next ones do
import distributed_methods  # noqa: F401
import distributed_parts  # noqa: F401
import distributed_setups  # noqa: F401
import distributed_sparsifier  # noqa: F401
import torch
import torch._dynamo  # the first optimizer imports it
import torch.distributed as dist
import torch.distributed.nn  # imported later, its default arguments would keep the group and its threads
from distributed_common import CHECKS


def run(own_rank: int, size: int, folder: Path, suite: str) -> None:
    """The checks on one rank."""
    dist.init_process_group(
        "gloo", f"file://{folder}/store", rank=own_rank, world_size=size, timeout=timedelta(seconds=90)
    )
    results: dict[str, str] = {}
    report = folder / f"rank-{own_rank}.json"
    chosen = [(name, c) for name, c in CHECKS.items() if size in c.worlds and c.suite == suite]
    for name, check, backend in ((name, c, b) for name, c in chosen for b in c.backends(size)):
        try:
            torch.manual_seed(0)
            check.function(backend)
            results[f"{name}/{backend}"] = ""
        except BaseException:
            results[f"{name}/{backend}"] = traceback.format_exc()
            break
        finally:
            report.write_text(json.dumps(results))
    gc.collect()  # a thread of the group that meets the interpreter's end aborts the process
    dist.destroy_process_group()


def main(size: int, folder: Path, suite: str) -> int:
    """Fork the ranks, and wait for them; how many ended badly."""
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=run, args=(rank, size, folder, suite), daemon=True) for rank in range(size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    return sum(process.exitcode != 0 for process in ranks)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
