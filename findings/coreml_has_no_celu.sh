#!/usr/bin/env bash
# coremltools cannot convert CELU, and converts alpha * elu(x / alpha), which is the same function.
#
# Guess: a converter that knows ELU, SELU's parts and GELU knows CELU too.
# Versions: coremltools 9.0, torch 2.14.1 (newer than the one that coremltools was tested with), numpy 2.4.6, Python 3.11.
# Behavior: ct.convert of torch.nn.CELU raises an error, traced or exported. The formula with ELU is converted, and differs from
#   torch's CELU by rounding. Only the conversion runs on Linux; predictions need macOS.
# Source: the list of operators in coremltools.converters.mil.frontend.torch.ops.
# Output seen on 2026-11-29:
#   CELU: refused
#   alpha * elu(x / alpha): converted
#   they differ by 6.0e-08 of the largest value
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 coremltools==9.0 numpy==2.4.6
"$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import coremltools
import torch

ALPHA = 0.075


class Elu(torch.nn.Module):
    def forward(self, x):
        return ALPHA * torch.nn.functional.elu(x / ALPHA)


x, outcome = torch.linspace(-1, 1, 1001), {}
for name, module in (("CELU", torch.nn.CELU(ALPHA)), ("alpha * elu(x / alpha)", Elu())):
    exported = torch.export.export(module.eval(), (x,)).run_decompositions({})
    try:
        coremltools.convert(exported, convert_to="mlprogram")
        outcome[name] = "converted"
    except NotImplementedError:
        outcome[name] = "refused"
    print(f"{name}: {outcome[name]}")
difference = float((Elu()(x) - torch.nn.functional.celu(x, ALPHA)).abs().max())
print(f"they differ by {difference:.1e} of the largest value")
assert list(outcome.values()) == ["refused", "converted"] and difference < 1e-6
PYTHON
