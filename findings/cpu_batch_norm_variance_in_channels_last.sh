#!/usr/bin/env bash
# torch's CPU batch norm in training computes a far less exact variance in channels_last than in NCHW.
#
# Guess: the memory format changes the speed and the last bits, so both variances are off by about 1e-7 relative.
# Versions: torch 2.14.1 (CPU path of the Linux wheel), numpy 2.4.6, Python 3.10 to 3.13; one thread.
# Behavior: for float32 [512, 8, 32, 32] of N(0.5, 1), the saved variance is off by about 1e-4 in channels_last and by less
#   than 1e-6 in NCHW, against float64. With a mean of 1e4 instead of 0.5 it is useless in channels_last: off by a factor of 1000.
# Source: seen while two memory formats of one training were compared; torch.native_batch_norm returns the mean and the
#   inverse standard deviation that it used.
# Output seen on 2026-11-28:
#   mean 0.5, NCHW: relative error of the variance 1.1e-07
#   mean 0.5, channels_last: relative error of the variance 1.7e-04
#   mean 10000, NCHW: relative error of the variance 1.8e-07
#   mean 10000, channels_last: relative error of the variance 1.0e+03
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch

torch.set_num_threads(1)
errors = {}
for mean in (0.5, 1e4):
    x = torch.randn(512, 8, 32, 32, generator=torch.Generator().manual_seed(0)) + mean
    exact = x.double().var(dim=(0, 2, 3), unbiased=False)
    for name, layout in (("NCHW", torch.contiguous_format), ("channels_last", torch.channels_last)):
        given = x.contiguous(memory_format=layout)
        _, _, invstd = torch.native_batch_norm(given, None, None, None, None, True, 0.1, 0.0)
        variance = invstd.double() ** -2
        errors[mean, name] = float(((variance - exact) / exact).abs().max())
        print(f"mean {mean:g}, {name}: relative error of the variance {errors[mean, name]:.1e}")
assert errors[0.5, "NCHW"] < 1e-6 < 1e-5 < errors[0.5, "channels_last"]
assert errors[1e4, "NCHW"] < 1e-2 and errors[1e4, "channels_last"] > 0.1
PYTHON
