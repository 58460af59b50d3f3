"""The emulator's own tests: each planted fault is found whatever the order of threads, and none where there is none.

Run by tests/test_cuda_emulated.py, or by pytest directly; needs a C++ compiler alone.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SEEDS = (1, 2, 3)
RACE, EARLY, UNWRITTEN = "a race in", "a copy that was not waited for in", "a read of what was not written before in"
STUCK = "wait for a barrier that the others never reach"

# Each kernel of planted.cu, the kind of memory, and how its fault may show: which of two threads comes first is a draw.
PLANTED = {
    "exchange_through_shared": ("shared", (RACE, UNWRITTEN)),
    "read_before_the_barrier": ("shared", (RACE, UNWRITTEN)),
    "overwrite_before_all_have_read": ("shared", (RACE,)),
    "read_what_was_never_written": ("shared", (UNWRITTEN,)),
    "count_in_shared": ("shared", (RACE,)),
    "read_among_atomics": ("shared", (RACE,)),
    "a_shuffle_orders_no_memory": ("shared", (RACE,)),
    "neighbouring_bytes": ("global", (RACE,)),
    "read_a_copy_on_its_way": ("shared", (EARLY,)),
    "read_a_copy_of_another_thread": ("shared", (RACE, UNWRITTEN, EARLY)),
    "copy_over_what_is_still_read": ("shared", (RACE, EARLY)),
    "blocks_write_one_word": ("global", (RACE,)),
    "blocks_count": ("global", (RACE,)),
    "release_without_a_fence": ("global", (RACE,)),
    "acquire_without_a_fence": ("global", (RACE,)),
    "write_after_the_fence": ("global", (RACE,)),
    "blocks_read_each_other": ("global", (RACE,)),
    "a_barrier_that_some_never_reach": ("", (STUCK,)),
    "a_grid_barrier_that_some_never_reach": ("", (STUCK,)),
}

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program that runs one kernel of planted.cu."""
    build = tmp_path_factory.mktemp("planted")
    flags = ["c++", "-std=c++20", "-O1", "-g1", "-Wno-unknown-pragmas", f"-I{HERE}"]
    kernels = [*flags, "-fsanitize=thread", "-x", "c++", "-c", str(HERE / "planted.cu"), "-o", str(build / "planted.o")]
    parts = [str(HERE / "emulator.cpp"), str(HERE / "races.cpp"), str(build / "planted.o")]
    for command in (kernels, [*flags, *parts, "-ldl", "-lpthread", "-o", str(build / "planted")]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return build / "planted"


def run(program: Path, kernel: str, which: str, seed: int) -> tuple[int, str]:
    environment = {**os.environ, "SPARTAN_EMULATOR_SEED": str(seed)}
    done = subprocess.run([program, kernel, which], env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


@pytest.mark.parametrize("kernel", PLANTED)
def test_a_planted_fault_is_found_and_its_absence_is_not(planted: Path, kernel: str) -> None:
    memory, messages = PLANTED[kernel]
    for seed in SEEDS:
        status, text = run(planted, kernel, "fault", seed)
        assert status == 1 and f"SPARTAN_EMULATOR_SEED={seed}" in text, text
        assert any(message in text for message in messages), text
        if memory:
            assert f"{kernel}<true>" in text and f"{memory} memory at 0x" in text
            assert re.search(r"thread \d+ of block \(\d+, 0\) at planted\.cu:\d+ ", text), text
        assert run(planted, kernel, "clean", seed) == (0, "")


def test_every_planted_kernel_is_tested() -> None:
    kernels = re.findall(r"template <bool kFault>\n__global__ void (\w+)", (HERE / "planted.cu").read_text())
    assert sorted(kernels) == sorted(PLANTED)


def test_the_seed_decides_the_order_of_threads_and_blocks(planted: Path) -> None:
    orders = [run(planted, "order", "clean", seed)[1].split() for seed in (1, 1, 2, 3)]
    assert orders[0] == orders[1]
    for part, count in ((slice(0, 8), 8), (slice(8, None), 64)):
        found = [order[part] for order in orders[1:]]
        assert all(sorted(map(int, each)) == list(range(count)) for each in found)
        assert len({tuple(each) for each in found}) == len(found)
