"""What a step found, in a few lines for the screen."""

from __future__ import annotations

from collections import Counter

from bench.gpu.records import Record

_WRONG = 12  # lines of what is wrong, for each step
_STALLS = 3
_FOUND = 8


def lines(step: str, found: list[Record]) -> list[str]:
    """Of the step's records."""
    own = [record for record in found if record["step"] == step]
    describe = {"facts": _facts, "build": _build, "headline": _headline, "suite": _suite, "sanitize": _sanitize}
    told = describe.get(step, _profile if step == "profile" else _probes)(own)
    wrong = [f"WRONG {_subject(r)}: {_first(r)}" for r in own if r.get("wrong") or r.get("graph_wrong")]
    more = [f"... and {len(wrong) - _WRONG} more in gpu.jsonl"] if len(wrong) > _WRONG else []
    return [line[:200] for line in told + wrong[:_WRONG] + more]


def _subject(record: Record) -> str:
    for name in ("case", "test", "job", "name", "operator"):
        if record.get(name):
            return str(record[name])
    return str(record.get("kind", ""))


def _first(record: Record) -> str:
    """The last line of a report says what was raised."""
    text = str(record.get("wrong") or f"graph: {record.get('graph_wrong')}").strip()
    return text.splitlines()[-1][:160]


def _facts(own: list[Record]) -> list[str]:
    told = []
    for record in own:
        if record["kind"] == "machine":
            keys = ("device", "driver", "cuda", "torch", "python", "cores", "revision", "date")
            told.append(", ".join(f"{key} {record.get(key)}" for key in keys))
        elif record["kind"] == "software":
            told.append(", ".join(f"{name} {version}" for name, version in record["packages"].items()))
            told.append("not found: " + (", ".join(n for n, path in record["tools"].items() if not path) or "nothing"))
        elif "value" in record:
            told.append(f"{record['name']} {record['value']} {record['unit']}")
    return told


def _build(own: list[Record]) -> list[str]:
    return [f"built in {record['seconds']} s" for record in own if record.get("extension")]


def _probes(own: list[Record]) -> list[str]:
    counts = Counter((r.get("backend", ""), r["kind"], not r.get("wrong")) for r in own if "operator" in r)
    groups = sorted({key[:2] for key in counts})
    told = [f"{b} {kind}: {counts[b, kind, True]} right, {counts[b, kind, False]} wrong" for b, kind in groups]
    first = [r["first"] for r in own if "first" in r]
    return told + ([f"{len(first)} cases compiled and checked, {max(first)} s at most"] if first else [])


def _headline(own: list[Record]) -> list[str]:
    told = []
    for record in own:
        if record["kind"] != "case" or "eager" not in record:
            continue
        eager, graph = record["eager"]["us"], (record.get("graph") or {}).get("us")
        best = graph or eager
        rate = f"{1e-6 * record['flops'] / best:7.1f} TFLOP/s" if record["flops"] else ""
        if not rate and record["bytes"]:
            rate = f"{1e-3 * record['bytes'] / best:7.0f} GB/s"
        peers = ", ".join(f"{name} {peer['us']:g}" for name, peer in record["peers"].items())
        counted = "".join(f", {name} {n:g}" for name, n in record.get("counts", {}).items())
        told.append(f"{record['case']:42} graph {graph or '-':>8} eager {eager:>8} us {rate} | {peers}{counted}")
    left = sum(record["kind"] == "left out" for record in own)
    return told + ([f"{left} cases left out for want of time"] if left else [])


def _suite(own: list[Record]) -> list[str]:
    counts: dict[str, Counter[str]] = {}
    for record in own:
        if record["kind"] == "test":
            counts.setdefault(record["part"], Counter())[record["outcome"]] += 1
    return [f"{part}: " + ", ".join(f"{n} {outcome}" for outcome, n in c.items()) for part, c in counts.items()]


def _sanitize(own: list[Record]) -> list[str]:
    runs = [record for record in own if record["kind"] == "run" and "summary" in record]
    told = [f"{r['tool']} {r['backend']}: {r['probes']} operators, {r['summary']}" for r in runs]
    probed = Counter((r["tool"], r["backend"]) for r in own if r["kind"] == "probe")
    ended = {(r["tool"], r["backend"]) for r in runs}
    told += [
        f"{tool} {backend}: stopped after {n} operators"
        for (tool, backend), n in probed.items()
        if (tool, backend) not in ended
    ]
    return (
        told + [f"found: {r['text']}" for r in own if r["kind"] == "found" and "COMPUTE-SANITIZER" not in r["text"]][:8]
    )


def _profile(own: list[Record]) -> list[str]:
    told = []
    for record in own:
        if record["kind"] != "kernel":
            continue
        stalls = {
            name.split("issue_stalled_")[1].split("_per_")[0]: float(value.split()[0].replace(",", ""))
            for name, value in record.items()
            if "issue_stalled_" in name and value[:1].isdigit()
        }
        most = sorted(stalls.items(), key=lambda pair: -pair[1])[:_STALLS]
        told.append(
            f"{record['case']}: {record['Kernel Name'][:40]} {record.get('gpu__time_duration.sum')},"
            f" {record.get('dram__bytes.sum')}, stalls {', '.join(f'{n} {v:g}' for n, v in most)}"
        )
    return told
