#!/usr/bin/env bash
# torch's ONNX export of a bfloat16 convolution with batch norm writes an invalid file, unless optimize=False.
#
# Guess: a model whose tensors all are bfloat16 is exported to a file that onnx's checker accepts, from opset 22 on, where Conv
#   knows bfloat16.
# Versions: torch 2.14.1, onnxscript 0.7.2, onnx 1.23.2, numpy 2.4.6, Python 3.11.
# Behavior: the optimizer folds the norm into the convolution and leaves float32 weights beside bfloat16 images. The export
#   reports success. With optimize=False, or without the norm, the file is valid.
# Source: seen as an error of the checker; the export itself prints no warning about it.
# Output seen on 2026-11-29:
#   optimize=True: Conv, invalid: W has inconsistent type tensor(float)
#   optimize=False: Conv, BatchNormalization, valid
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 onnxscript==0.7.2 onnx==1.23.2 numpy==2.4.6
"$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import onnx
import torch

model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).eval().bfloat16()
images = torch.zeros(1, 3, 8, 8, dtype=torch.bfloat16)
valid = {}
for optimize in (True, False):
    program = torch.onnx.export(model, (images,), dynamo=True, optimize=optimize, opset_version=22, verbose=False)
    proto = program.model_proto
    nodes = ", ".join(node.op_type for node in proto.graph.node)
    try:
        onnx.checker.check_model(proto, full_check=True)
        valid[optimize] = "valid"
    except onnx.shape_inference.InferenceError as error:
        valid[optimize] = f"invalid: {str(error).partition('): ')[2]}"
    print(f"optimize={optimize}: {nodes}, {valid[optimize]}")
assert valid[True].startswith("invalid") and valid[False] == "valid"
PYTHON
