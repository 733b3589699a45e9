#!/usr/bin/env bash
# DALI's out-of-bounds policy "reflect" repeats the edge. numpy's and torch's "reflect" do not.
#
# Guess: "reflect" names the same padding everywhere: 3 2 1 | 0 1 2, without the edge twice.
# Versions: nvidia-dali-cuda120 2.4.0 (operators on a CPU; no GPU is needed), numpy 2.4.6, Python 3.11.
# Behavior: fn.slice(out_of_bounds_policy="reflect") is numpy's "symmetric". numpy's "reflect" is called "reflect_101". A
#   crop that is ported by its name alone runs, and shifts every padded image by a pixel.
# Source: documentation of nvidia.dali.fn.slice. OpenCV's borders have the same names.
# Output seen on 2026-11-29:
#   reflect: 2 1 0 0 1 2 3, numpy's symmetric
#   reflect_101: 3 2 1 0 1 2 3, numpy's reflect
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet nvidia-dali-cuda120==2.4.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
from nvidia.dali import fn, pipeline_def

row = np.arange(4, dtype=np.uint8)
for policy, mode in (("reflect", "symmetric"), ("reflect_101", "reflect")):

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def pipeline():
        given = fn.external_source(source=lambda: [row])
        return fn.slice(given, start=[-3], shape=[7], axes=[0], out_of_bounds_policy=policy)

    sliced = pipeline().run()[0].as_array()[0]
    assert (sliced == np.pad(row, (3, 0), mode=mode)).all(), sliced
    print(f"{policy}: {' '.join(map(str, sliced))}, numpy's {mode}")
PYTHON
