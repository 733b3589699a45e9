#!/usr/bin/env bash
# A process group survives destroy_process_group if torch.distributed.nn was imported after init_process_group.
#
# Guess: destroy_process_group ends the group's threads, whatever was imported in between.
# Versions: torch 2.14.1 (Linux wheel), numpy 2.4.6, Python 3.10 to 3.13.
# Behavior: after destroy_process_group, gloo's threads have ended if the module was imported before
#   init_process_group. Imported after it, the module keeps the group, and three of its threads run until the process
#   ends. torch.compile and torch.export import the module, so the import is easily the later one. Import the module first.
# Source: torch/distributed/nn/functional.py has the default argument group=group.WORLD, which Python evaluates when it
#   defines the function. Seen as processes that now and then aborted at their end, with such a thread on the stack.
# Output seen on 2026-11-29:
#   imported before: 0 threads of the group are left
#   imported after: 3 threads of the group are left
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy==2.4.6
cat >"$folder/group.py" <<'PYTHON'
import os
import sys
import tempfile
import time

from torch import distributed

(when,) = sys.argv[1:]


def threads():
    return len(os.listdir("/proc/self/task"))


if when == "before":
    import torch.distributed.nn
before = threads()
with tempfile.TemporaryDirectory() as folder:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    import torch.distributed.nn  # does nothing the second time

    assert threads() > before
    distributed.destroy_process_group()
    time.sleep(1)
left = threads() - before
print(f"imported {when}: {left} threads of the group are left", flush=True)
os._exit(0 if (left == 0) == (when == "before") else 1)
PYTHON
"$folder/venv/bin/python" "$folder/group.py" before
"$folder/venv/bin/python" "$folder/group.py" after
