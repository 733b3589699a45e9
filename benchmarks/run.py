"""``python -m benchmarks run``: measure every part in order, write results.json and make the report. It can resume."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.parts import PARTS, Bench, Skip
from benchmarks.report import write_report
from benchmarks.rows import rows_of
from cifar_fast import InputError
from cifar_fast.utils.device import device_guard, environment
from cifar_fast.utils.files import write_json

SCHEMA = 2
FIRST = ("ceilings", "parity")
"""Parts that always run, because the others depend on them."""


def run(output: Path, bench: Bench, settings: dict[str, Any], only: list[str]) -> int:
    """Run the parts of ``only`` that are not done, write the results after each, and return the exit code."""
    file = output / "results.json"
    results = load_or_start(file, settings, environment(bench.config.device))
    for name in [*FIRST, *(name for name in only if name not in FIRST)]:
        before = results["parts"].get(name, {})
        if "rows" in before and name != "kernels":  # some kernels may be left
            print(f"{name}: done before")
            continue
        if name not in FIRST and bench.late():
            print(f"{name} and all after it: no minutes left; run the same command again to resume")
            break
        bench.done = rows_of(results)
        begun, rows = time.perf_counter(), list(before.get("rows", []))
        try:
            with device_guard(bench.config.device):
                for row in PARTS[name](bench):
                    rows.append(asdict(row))
            part: dict[str, Any] = {"rows": rows}
        except Skip as reason:
            part = {"skipped": str(reason)}
        except Exception as error:  # a compiler, a driver, memory or a child process; the other parts may still work
            part = {"failed": " ".join(f"{type(error).__name__}: {error}".split())}
            if name == "kernels":
                part["rows"] = rows  # each row is valid alone, and they took minutes
        part["seconds"] = time.perf_counter() - begun
        results["parts"][name] = part
        write_json(file, results, f"--output {output}", "choose another folder")
        write_report(output)
        print(f"{name}: {part.get('skipped') or part.get('failed') or 'done'} ({part['seconds']:.0f} s)", flush=True)
        if name == "parity" and "failed" in part:
            print("the fused backend does not match eager: nothing more is measured")
            return 1
    wrong = any(not row.values for row in rows_of(results))
    return 1 if wrong or any("failed" in part for part in results["parts"].values()) else 0


def load_or_start(file: Path, settings: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """Return the results of an earlier run with the same settings on the same machine, or new ones."""
    fresh = dict(schema=SCHEMA, environment=facts, settings=settings, parts={})
    fresh = json.loads(json.dumps(fresh))  # turns tuples into lists, as in the file
    if not file.exists():
        return fresh
    try:
        before = json.loads(file.read_text())
        same = all(before[name] == fresh[name] for name in ("schema", "environment", "settings"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: not the results of a run ({error}); choose another --output") from None
    if not same:
        raise InputError(f"{file}: results of another machine, version or setting; choose another --output")
    return before
