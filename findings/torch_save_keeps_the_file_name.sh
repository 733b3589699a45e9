#!/usr/bin/env bash
# torch.save writes the name of the file into the file, so equal tensors have other bytes under another name.
#
# Guess: torch.save of equal tensors writes equal bytes, whatever the file is called.
# Versions: torch 2.14.1 (Linux wheel), numpy 2.4.6, Python 3.10 to 3.13.
# Behavior: the members of the zip file lie in a folder called like the file without its suffix. A file that is written
#   under a random name and then renamed therefore has other bytes, and another checksum, each time. Written to an open
#   file, the folder is "archive", and the bytes are equal.
# Source: torch/serialization.py gives the path to PyTorchFileWriter, which takes the folder's name from it. Seen as
#   weights of equal trainings with unequal checksums.
# Output seen on 2026-11-29:
#   another name: bytes differ, folders ['draft-1', 'draft-2']
#   another folder: bytes are equal, folders ['draft-1', 'draft-1']
#   an open file: bytes are equal, folders ['archive', 'archive']
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy==2.4.6
mkdir "$folder/one" "$folder/other"
cat >"$folder/save.py" <<'PYTHON'
import sys
import zipfile
from pathlib import Path

import torch

one, other = map(Path, sys.argv[1:])
value = {"weight": torch.arange(6.0)}


def save(path, opened=False):
    if opened:
        with open(path, "wb") as file:
            torch.save(value, file)
    else:
        torch.save(value, path)
    return path


def compare(what, *paths):
    equal = paths[0].read_bytes() == paths[1].read_bytes()
    folders = [zipfile.ZipFile(path).namelist()[0].split("/")[0] for path in paths]
    print(f"{what}: bytes {'are equal' if equal else 'differ'}, folders {folders}")


compare("another name", save(one / "draft-1.pt"), save(one / "draft-2.pt"))
compare("another folder", save(one / "draft-1.pt"), save(other / "draft-1.pt"))
compare("an open file", save(one / "draft-1.pt", opened=True), save(one / "draft-2.pt", opened=True))
PYTHON
expected="another name: bytes differ, folders ['draft-1', 'draft-2']
another folder: bytes are equal, folders ['draft-1', 'draft-1']
an open file: bytes are equal, folders ['archive', 'archive']"
output=$("$folder/venv/bin/python" -W ignore "$folder/save.py" "$folder/one" "$folder/other")
echo "$output"
[ "$output" = "$expected" ]
