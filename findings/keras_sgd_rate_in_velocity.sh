#!/usr/bin/env bash
# Keras' SGD keeps the learning rate inside its velocity, so with momentum a changing rate gives other weights than torch's.
#
# Guess: momentum SGD with equal settings takes equal steps in both libraries.
# Versions: keras 3.15.1 (torch backend), torch 2.14.1, numpy 2.4.6, Python 3.11.
# Behavior: torch's velocity sums gradients and is multiplied by the rate of the step. Keras' velocity sums gradients that are
#   each multiplied by the rate of their own step. A constant rate gives equal weights. A schedule does not, with and without
#   Nesterov: at rate 0 torch does not move, and Keras still does.
# Source: documentation of keras.optimizers.SGD ("velocity = momentum * velocity - learning_rate * g") and torch.optim.SGD.
# Output seen on 2026-11-29:
#   constant rate, plain: torch 0.0951, keras 0.0951
#   constant rate, Nesterov: torch -0.2144, keras -0.2144
#   changing rate, plain: torch -1.3969, keras -2.4759
#   changing rate, Nesterov: torch -2.2572, keras -3.2283
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 keras==3.15.1 numpy==2.4.6
KERAS_BACKEND=torch CUDA_VISIBLE_DEVICES="" "$folder/venv/bin/python" - <<'PYTHON'
import keras
import torch

gradient = torch.tensor([1.0])
for name, rates in (("constant", [0.1] * 4), ("changing", [0.1, 0.6, 0.3, 0.1, 0.0])):
    for nesterov in (False, True):
        weight = torch.nn.Parameter(torch.tensor([1.0]))
        ours = torch.optim.SGD([weight], lr=0.1, momentum=0.9, nesterov=nesterov)
        variable = keras.Variable([1.0])
        theirs = keras.optimizers.SGD(0.1, momentum=0.9, nesterov=nesterov)
        for rate in rates:
            ours.param_groups[0]["lr"], weight.grad = rate, gradient.clone()
            ours.step()
            theirs.learning_rate = rate
            theirs.apply([gradient], [variable])
        values = weight.item(), float(keras.ops.convert_to_numpy(variable)[0])
        form = "Nesterov" if nesterov else "plain"
        print(f"{name} rate, {form}: torch {values[0]:.4f}, keras {values[1]:.4f}")
        assert (abs(values[0] - values[1]) < 1e-6) == (name == "constant")
PYTHON
