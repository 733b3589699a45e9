"""``python -m benchmarks run``: every part in order, resumable; rows in results.json, and the report made of them."""

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
from cifar_fast.utils.files import atomic_write, os_error_as_input_error

SCHEMA = 2
FIRST = ("ceilings", "parity")
"""Parts that the others need, and that run whatever is asked for."""


def run(output: Path, bench: Bench, settings: dict[str, Any], only: list[str]) -> int:
    """Run what is not done yet of ``only``, writing after each part; gives 1 where a part failed or a result is off."""
    file = output / "results.json"
    results = start(file, settings, environment(bench.plan.device))
    for name in [*FIRST, *(name for name in only if name not in FIRST)]:
        before = results["parts"].get(name, {})
        if "rows" in before and name != "kernels":  # of which some may be left
            print(f"{name}: done before")
            continue
        if name not in FIRST and bench.late():
            print(f"{name} and what follows: no minutes left; start again to go on")
            break
        bench.done = rows_of(results)
        begun, rows = time.perf_counter(), list(before.get("rows", []))
        try:
            with device_guard(bench.plan.device):
                for row in PARTS[name](bench):
                    rows.append(asdict(row))
            part: dict[str, Any] = {"rows": rows}
        except Skip as reason:
            part = {"skipped": str(reason)}
        except Exception as error:  # compiler, driver, memory, a child process: the rest can still be measured
            part = {"failed": " ".join(f"{type(error).__name__}: {error}".split())}
            if name == "kernels":
                part["rows"] = rows  # they stand each for itself, and took minutes
        part["seconds"] = time.perf_counter() - begun
        results["parts"][name] = part
        with os_error_as_input_error(f"--output {output}"), atomic_write(file) as temporary:
            temporary.write_text(json.dumps(results, indent=1) + "\n")
        write_report(output)
        print(f"{name}: {part.get('skipped') or part.get('failed') or 'done'} ({part['seconds']:.0f} s)", flush=True)
        if name == "parity" and "failed" in part:
            print("parity is not given: nothing more is measured")
            return 1
    wrong = any(not row.values for row in rows_of(results))
    return 1 if wrong or any("failed" in part for part in results["parts"].values()) else 0


def start(file: Path, settings: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """The results so far of this machine and these settings; :class:`InputError` for another's."""
    fresh = json.loads(json.dumps(dict(schema=SCHEMA, environment=facts, settings=settings, parts={})))  # no tuples
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
