"""Print a table of faults, and of what became of the results: ``python -m tests.faults``."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

BASE = "CIFAR_FAST_FAULTS"
"""Variable with the folder to work in, for the process that has loaded the shim."""


def main() -> int:
    """Run the command and return its exit code: 1 unless all results are as without a fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--sample", type=int, metavar="N", help="about N kills for each scenario (default: all)")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="scenarios whose names begin so")
    args = parser.parse_args()
    if BASE not in os.environ:
        return run_with_shim()
    from tests.faults.harness import CLASSES, Harness

    columns = (
        "command",
        "fault",
        "cases",
        *CLASSES,
        "epochs trained twice, at most",
        "drafts left, at most",
        "seconds",
    )
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    all_same = True
    harness = Harness(Path(os.environ[BASE]))
    for scenario in harness.scenarios():
        if not scenario.name.startswith(tuple(args.only)):
            continue
        start = time.monotonic()
        outcomes = list(harness.outcomes(scenario, args.sample))
        seconds = f"{time.monotonic() - start:.0f}"
        for fault in dict.fromkeys(one.fault for one in outcomes):
            own = [one for one in outcomes if one.fault == fault]
            counts = Counter(one.found for one in own)
            most = [max(one.repeated for one in own), max(one.drafts for one in own)]
            cells = [scenario.name, fault, len(own), *(counts[name] for name in CLASSES), *most, seconds]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
        for one in outcomes:
            if one.found != CLASSES[0]:
                all_same = False
                print(f"{scenario.name}, {one.fault} at {one.operation}: {one.found}, {one.detail}", file=sys.stderr)
    return 0 if all_same else 1


def run_with_shim() -> int:
    """Compile the shim, run this command again with it, and return the exit code."""
    memory = Path("/dev/shm")  # a sync takes no time there
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        shim, base = Path(folder) / "shim.so", Path(folder) / "base"
        source = Path(__file__).with_name("shim.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", shim, source, "-ldl"], check=True)
        base.mkdir()
        environment = os.environ | {"LD_PRELOAD": str(shim), BASE: str(base), "OMP_NUM_THREADS": "1"}
        return subprocess.run([sys.executable, "-m", "tests.faults", *sys.argv[1:]], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
