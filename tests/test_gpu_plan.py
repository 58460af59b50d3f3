"""`make gpu`: its plan keeps its time, ends what it started, and leaves a record and a summary whatever happens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.case import Settings, Work
from bench.gpu import backends, build, headline, measure, plan, profile, pytest_plugin, records, summary, tools
from bench.gpu.entries import Entry, entries
from bench.gpu.run import Run, Step
from bench.machine import ROOT
from spartan_kernels.devices import StandIn

pytestmark = pytest.mark.usefixtures("one_thread")


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def told(step: str, found: list[records.Record]) -> list[str]:
    return [str(record["value"]) for record in found if record["step"] == step]


@pytest.fixture
def run_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv(records.FILE, "")

    def go(*steps: Step) -> tuple[int, dict[str, str]]:
        status = Run(steps, tmp_path / "out", told).go()
        found = records.read(tmp_path / "out" / "gpu.jsonl")
        return status, {record["name"]: record["state"] for record in found if record["step"] == "plan"}

    return go


_RECORD = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from bench.gpu import records; "


def test_later_steps_run_after_a_failure_and_their_findings_are_told(run_steps: Any, tmp_path: Path) -> None:
    status, states = run_steps(
        Step("first", python("print('said'); raise SystemExit(3)"), 60, 1),
        Step("absent", ["/no/such/program"], 60, 1),
        Step("second", python(_RECORD + "records.add('second', value='found it')"), 60, 1),
    )
    assert status == 1
    assert states == {"first": "FAILED (3)", "absent": "FAILED", "second": "ok"}
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["gpu.jsonl", "gpu.log", "summary.txt"]
    assert "said" in (out / "gpu.log").read_text()
    text = (out / "summary.txt").read_text()
    assert text.index("first") < text.index("second") < text.index("  found it") < text.index("total")


def test_all_well_is_status_nought(run_steps: Any) -> None:
    assert run_steps(Step("only", python("pass"), 60, 1)) == (0, {"only": "ok"})


def _stays(pid: int) -> bool:
    """Whether a process is still there after a while: one that was ended needs a moment on a busy machine."""
    until = time.time() + 20
    while time.time() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        if state == "Z":
            return False
        time.sleep(0.1)
    return True


def test_at_its_limit_a_step_is_ended_with_all_that_it_started(run_steps: Any, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(300)"
    code = f"""
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {deaf!r}])
open({str(pids)!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
time.sleep(300)
"""
    begun = time.time()
    status, states = run_steps(Step("long", python(code), 15, 1), Step("next", python("pass"), 60, 1))
    assert (status, states) == (1, {"long": "stopped at its limit", "next": "ok"})
    assert time.time() - begun < 60
    assert not any(_stays(int(pid)) for pid in pids.read_text().split())


def test_what_a_step_leaves_running_is_ended_too(run_steps: Any, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    code = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
open({str(pids)!r}, "w").write(str(child.pid))
"""
    assert run_steps(Step("leaves", python(code), 60, 1))[1] == {"leaves": "ok"}
    assert not _stays(int(pids.read_text()))


def test_without_time_later_steps_are_left_out_and_the_order_stays(run_steps: Any) -> None:
    status, states = run_steps(
        Step("slow", python("import time; time.sleep(2)"), 60, 1),
        Step("late", python("pass"), 3, 2.5),
        Step("last", python("pass"), 60, 1),
    )
    assert status == 1
    assert list(states.items()) == [("slow", "ok"), ("late", "no time"), ("last", "ok")]


def test_a_step_in_the_background_is_not_waited_for(run_steps: Any, tmp_path: Path) -> None:
    order = tmp_path / "order"
    write = "import time; time.sleep({}); open({!r}, 'a').write('{} ')"
    status, states = run_steps(
        Step("behind", python(write.format(3, str(order), "behind")), 60, 1, background=True),
        Step("front", python(write.format(0, str(order), "front")), 60, 1),
    )
    assert (status, states) == (0, {"front": "ok", "behind": "ok"})
    assert order.read_text().split() == ["front", "behind"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=str)
def test_killed_it_tells_what_was_found_and_ends_what_runs(number: signal.Signals, tmp_path: Path) -> None:
    pids, out = tmp_path / "pids", tmp_path / "out"
    step = _RECORD + (
        f"import os, time; records.add('middle', value='half way'); open({str(pids)!r}, 'w').write(str(os.getpid()));"
        " time.sleep(300)"
    )
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from bench.gpu.run import Run, Step
told = lambda step, found: [r["value"] for r in found if r["step"] == step]
steps = [Step("middle", [sys.executable, "-c", {step!r}], 200, 1), Step("never", ["true"], 250, 1)]
sys.exit(Run(steps, Path({str(out)!r}), told).go())
"""
    running = subprocess.Popen(python(code), stdout=subprocess.PIPE, text=True)
    while not (pids.exists() and pids.read_text()):
        assert running.poll() is None
        time.sleep(0.1)
    running.send_signal(number)
    said, _ = running.communicate(timeout=60)
    assert running.returncode == 1
    assert "  half way" in said and f"ended by {number.name}" in said and "never: not begun" in said
    assert said == (out / "summary.txt").read_text()
    assert not _stays(int(pids.read_text()))


def test_the_plan_fits_its_time_and_grows_no_files() -> None:
    steps = plan.steps()
    ends = [step.ends for step in steps if not step.background]
    assert ends == sorted(ends) and ends[-1] <= plan.SECONDS - 10
    assert [step.name for step in steps if step.background] == ["build"]
    assert [step.name for step in steps] == [step.name for step in plan.steps(rehearse=True)]


def test_a_torn_record_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "records"
    monkeypatch.setenv(records.FILE, str(path))
    records.add("a", value=1)
    with path.open("a") as file:
        file.write('{"step": "b", "val')
    assert [record["step"] for record in records.read()] == ["a"]
    assert records.read(tmp_path / "none") == []


# ---------------------------------------------------------------------------------------------------- the headline


def _work(kernel: Any, **more: Any) -> Work:
    def check(out: torch.Tensor, x: torch.Tensor) -> None:
        if not torch.equal(out, 2 * x):
            raise AssertionError("it is not 2x")

    return Work(ours=kernel, operands=[(torch.arange(4.0),)], check=check, bytes=32, **more)


def test_a_right_case_is_timed_from_idle_in_a_graph_and_beside_its_peers() -> None:
    peers = {"plain": lambda x: x + x, "absent": "not installed", "broken": lambda x: x @ torch.ones(9)}
    found = measure.time_work(_work(lambda x: 2 * x, peers=peers), StandIn(), True, 0.01)
    assert found["eager"]["us"] > 0 and found["graph"]["us"] > 0 and found["peers"]["plain"]["n"] >= 5
    assert found["missing"]["absent"] == "not installed" and "RuntimeError" in found["missing"]["broken"]


def test_a_wrong_case_is_not_timed() -> None:
    found = measure.time_work(_work(lambda x: 2 * x + 1), StandIn(), True, 0.01)
    assert found == {"wrong": "it is not 2x"}


def test_a_case_that_cannot_be_captured_keeps_its_other_times() -> None:
    found = measure.time_work(_work(lambda x: 2 * x + 0 * len(x.nonzero())), StandIn(), True, 0.01)
    assert "waits for the device" in found["graph_wrong"] and found["eager"]["us"] > 0


def test_after_a_case_that_ends_its_process_another_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(records.FILE, str(tmp_path / "records"))
    monkeypatch.setenv(records.REHEARSE, "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run, child = (
        subprocess.run,
        """
import os, sys, torch
from bench.case import Work
from bench.gpu import headline
from bench.gpu.entries import Entry
def entry(name, kernel):
    check = lambda y, x: None
    return Entry(name, "triton", lambda s: Work(kernel, [(torch.ones(2),)], check, 8))
planted = [entry("good", lambda x: x), entry("fatal", lambda x: os._exit(9)), entry("raises", lambda x: x @ x[:1]),
           entry("waits", lambda x: x.nonzero()), entry("also good", lambda x: x)]
headline.entries = lambda: planted
sys.exit(headline.main(sys.argv[1:]))
""",
    )
    started = []

    def planted(command: list[str], **more: Any) -> Any:
        started.append(command)
        return run([command[0], "-c", child, *command[3:]], cwd=ROOT, **more)

    monkeypatch.setattr(headline.subprocess, "run", planted)
    assert headline.main([]) == 1
    cases = {r["case"]: r.get("wrong") for r in records.read() if r["kind"] == "case"}
    assert list(cases) == ["good", "fatal", "raises", "waits", "also good"]
    assert cases["good"] is None and cases["also good"] is None
    assert cases["fatal"] == "its process ended with 9" and "inconsistent tensor size" in cases["raises"]
    assert len(started) == 3  # the second ends with the case that cannot be captured


def test_every_entry_has_a_name_of_its_own_that_ends_with_its_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    for rehearse in ("0", "1"):
        monkeypatch.setenv(records.REHEARSE, rehearse)
        names = [entry.name for entry in entries()]
        assert len(set(names)) == len(names)
        assert all(entry.backend in ("triton", "cuda") for entry in entries())
    monkeypatch.setenv(records.REHEARSE, "0")
    assert set(profile._CASES) <= {entry.name for entry in entries()}


_CPU_ENTRIES = [
    "solve one tensor warm", "solve ResNet-50 cold", "rows 1000000x4", "forward block 32", "dx block 32", "dW block 32",
    "1 tokens block 32", "1 tokens single weights", "float8 block 32", "training step ViT-B/16 block 32",
]  # fmt: skip


@pytest.mark.parametrize("start", _CPU_ENTRIES)
def test_the_cases_are_right_on_the_reference(start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(records.REHEARSE, "1")
    entry = next(entry for entry in entries() if entry.name.startswith(start))
    work = entry.build(Settings("cpu", torch.float32, True, "reference"))
    graph = not start.startswith(("solve", "training"))  # the reference's solve waits, as it may
    found = measure.time_work(work, StandIn(), graph, 0.01, 1)
    assert "wrong" not in found and "graph_wrong" not in found, found


# ------------------------------------------------------------------------------------------- tests, tools, summary


def test_chosen_cases_are_spread_over_functions_and_backends() -> None:
    tests = [
        f"tests/a.py::{function}[{backend}-cuda-{i}]"
        for function, cases in (("many", 50), ("few", 2))
        for backend in ("triton", "cuda")
        for i in range(cases)
    ]
    chosen = pytest_plugin.choose(tests, 12)
    assert chosen == pytest_plugin.choose(tests[::-1], 12) and len(set(chosen)) == 12
    for part, least in (("many[triton", 4), ("many[cuda", 4), ("few[triton", 2), ("few[cuda", 2)):
        assert sum(part in name for name in chosen) >= least


def test_a_tool_is_found_in_the_folder_of_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "some-tool"
    program.parent.mkdir()
    program.write_text("")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert tools.find("some-tool") is None
    program.chmod(0o755)
    assert tools.find("some-tool") == str(program)


def test_the_table_of_ncu_is_read_with_its_units() -> None:
    text = '==PROF== Connected\n"ID","Kernel Name","gpu__time_duration.sum","a__issue_stalled_wait_per_x","else"\n'
    text += '"","","us","inst",""\n"0","_survey_kernel","1,024.5","2","9"\n==PROF== Disconnected\n'
    (kernel,) = profile.kernels(text)
    assert kernel == {
        "Kernel Name": "_survey_kernel",
        "gpu__time_duration.sum": "1,024.5 us",
        "a__issue_stalled_wait_per_x": "2 inst",
    }
    assert profile.kernels("==ERROR== no permission") == []


def test_backends_wait_for_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(records.FILE, str(tmp_path / "records"))
    assert backends.extension() is None and backends.ready() == ("triton",)
    records.add(build.STEP, extension="/there.so")
    assert backends.extension(wait=5) == "/there.so" and backends.ready() == ("triton", "cuda")


def test_a_failed_build_is_told_and_keeps_nobody_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(records.FILE, str(tmp_path / "records"))
    monkeypatch.setenv(records.REHEARSE, "1")
    monkeypatch.setattr(build, "commands", lambda *_: [python("print('x.cu: error: planted'); raise SystemExit(1)")])
    assert build.main() == 1
    assert backends.extension(wait=60) is None
    assert summary.lines("build", records.read()) == ["WRONG : x.cu: error: planted"]


def test_the_summary_tells_times_rates_peers_and_what_is_wrong() -> None:
    timed = {"us": 12.5, "spread": 0.01, "n": 20}
    case = {"step": "headline", "kind": "case"}
    right = {"case": "a", "eager": timed, "graph": {**timed, "us": 10.0}, "bytes": 20_000, "flops": 0}
    found = [
        {"step": "headline", "kind": "begins", "case": "a"},
        {**case, **right, "peers": {"copy": timed}, "counts": {"passes": 1.0}},
        {**case, "case": "b", "wrong": "AssertionError: no\nthe last line"},
    ]
    first, second = summary.lines("headline", found)
    assert "graph     10.0 eager     12.5 us" in first and "2 GB/s | copy 12.5, passes 1" in first
    assert second == "WRONG b: the last line"
    assert json.dumps(found)
    many = [{"step": "probes", "kind": "graph", "operator": f"o{i}", "wrong": "bad"} for i in range(40)]
    assert len(summary.lines("probes", many)) < 20


def test_an_entry_builds_on_the_device_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Settings] = []
    entry = Entry("x", "triton", lambda s: seen.append(s) or _work(lambda x: x))  # type: ignore[func-returns-value]
    for rehearse, device in (("1", "cpu"), ("0", "cuda")):
        monkeypatch.setenv(records.REHEARSE, rehearse)
        entry.work()
        assert (seen[-1].device, seen[-1].quick, seen[-1].backend) == (device, rehearse == "1", "triton")
    assert os.environ[records.REHEARSE] == "0"
