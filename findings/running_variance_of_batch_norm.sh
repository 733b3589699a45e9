#!/usr/bin/env bash
# flax and Keras keep the biased variance of a batch in batch norm's running variance; torch, tinygrad and MLX the unbiased one.
#
# Guess: the running variance is the average of the variances that the batches were normalized by, everywhere.
# Versions: torch 2.14.1, tinygrad 0.14.0 (its emulator in Python), mlx 0.32.4 (CPU), flax 0.12.8 with jax 0.10.2, keras 3.15.1
#   (jax backend), numpy 2.4.6, Python 3.11.
# Behavior: after one batch of 8 values per channel, flax and Keras have 0.9 + 0.1 times the variance with N, and the others
#   0.9 + 0.1 times the variance with N - 1. All normalize the batch itself by the variance with N. A port that continues the
#   training therefore needs a factor N / (N - 1); a port for inference needs none.
# Source: documentation of torch.nn.BatchNorm2d; seen as a difference of ported trainings.
# Output seen on 2026-11-29:
#   torch: unbiased
#   tinygrad: unbiased
#   mlx: unbiased
#   flax: biased
#   keras: biased
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 tinygrad==0.14.0 "mlx[cpu]==0.32.4" flax==0.12.8 jax==0.10.2 keras==3.15.1 numpy==2.4.6
DEV=PYTHON KERAS_BACKEND=jax "$folder/venv/bin/python" - <<'PYTHON'
import keras
import mlx.core
import mlx.nn
import numpy as np
import tinygrad
import torch
from flax import nnx
from tinygrad.helpers import Context

x = np.random.RandomState(0).randn(2, 2, 2, 3).astype(np.float32)
channels_first = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
of_torch = torch.nn.BatchNorm2d(3)
of_torch(torch.from_numpy(channels_first))
of_tinygrad = tinygrad.nn.BatchNorm(3)
with Context(TRAINING=1):
    of_tinygrad(tinygrad.Tensor(channels_first)).realize()
of_mlx = mlx.nn.BatchNorm(3)
of_mlx(mlx.core.array(x))
of_flax = nnx.BatchNorm(3, momentum=0.9, rngs=nnx.Rngs(0))
of_flax(x)
of_keras = keras.layers.BatchNormalization(momentum=0.9)
of_keras(x, training=True)
kept = {
    "torch": of_torch.running_var.numpy(),
    "tinygrad": of_tinygrad.running_var.numpy(),
    "mlx": np.array(of_mlx.running_var),
    "flax": np.array(of_flax.var[...]),
    "keras": np.array(of_keras.moving_variance),
}
for name, value in kept.items():
    (kind,) = (
        kind
        for kind, ddof in (("biased", 0), ("unbiased", 1))
        if np.allclose(value, 0.9 + 0.1 * x.reshape(-1, 3).var(axis=0, ddof=ddof), atol=1e-5)
    )
    print(f"{name}: {kind}")
    assert (kind == "biased") == (name in ("flax", "keras"))
PYTHON
