"""A trained network as a file for other programs: safetensors, a program of torch.export, ONNX.

Each file has a text in JSON beside the weights: what ``model.pt`` holds besides them, and the version of cifar_fast.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from cifar_fast import __version__
from cifar_fast.inference import safetensors_file
from cifar_fast.inference.classifier import Classifier
from cifar_fast.inference.safetensors_file import KEY
from cifar_fast.model import NETWORKS
from cifar_fast.recipe import IMAGE_CHANNELS, IMAGE_SIZE
from cifar_fast.training.results import FORMAT
from cifar_fast.utils.errors import InputError, did_you_mean, first_cause, first_line, option, out_of_memory
from cifar_fast.utils.files import as_path, atomic_write, check_writable, os_error_as_input_error

SUFFIXES = {"safetensors": safetensors_file.SUFFIX, "torch-export": ".pt2", "onnx": ".onnx"}
"""The suffix of the file, for each format."""


def export_model(classifier: Classifier, path: str | Path, to: str | None = None) -> None:
    """Write ``classifier`` to ``path``, completely or not at all. A file that is there is replaced.

    ``safetensors`` holds the weights under the names of the plain model, and :func:`cifar_fast.load_model` reads it.
    ``torch-export`` and ``onnx`` hold the whole computation with the normalization, in eval mode and in the dtype of
    the weights: ``images``, uint8 ``[N, 32, 32, 3]`` for any N, to ``logits`` ``[N, classes]``.

    Args:
        classifier: a trained network, from :func:`cifar_fast.load_model`. It stays as it is.
        path: the file, in an existing folder.
        to: safetensors, torch-export or onnx. None takes the format from the suffix of ``path``.

    Raises:
        InputError: the format is unknown or its suffix is another one, a package that it needs is missing, the model
            cannot be traced, or the file cannot be written.
    """
    path = as_path(path, "path")
    to = format_of(path, to)
    check_output(path)
    data = WRITERS[to](copy.deepcopy(classifier).cpu().eval())
    with os_error_as_input_error(str(path), "choose another file"), atomic_write(path) as temporary:
        temporary.write_bytes(data)


def format_of(path: Path, to: str | None) -> str:
    """Return the format ``to``, or that of the suffix of ``path``.

    Raises:
        InputError: there is no such format, or ``path`` has not its suffix.
    """
    if to is None:
        to = next((name for name, suffix in SUFFIXES.items() if suffix == path.suffix), None)
        if to is None:
            *most, last = SUFFIXES.values()
            raise InputError(f"{path}: must end in {', '.join(most)} or {last}, which gives the format")
    if to not in SUFFIXES:
        hint = did_you_mean(to, SUFFIXES)
        raise InputError(f"unknown format {to!r} of {option('to')}; there are {', '.join(SUFFIXES)}{hint}")
    if path.suffix != SUFFIXES[to]:
        raise InputError(f"{path}: must end in {SUFFIXES[to]} for {option('to')} {to}")
    return to


def check_output(path: Path) -> None:
    """Raise :class:`InputError` unless ``path`` names a file, new or not, in a folder that can be written to."""
    if not path.parent.is_dir() or path.is_dir():
        raise InputError(f"{path}: must name a file in an existing folder")
    check_writable(path.parent, str(path), "choose another file")


def metadata(classifier: Classifier) -> dict[str, Any]:
    """Return what ``model.pt`` holds besides the weights, and the version of cifar_fast."""
    model = classifier.model
    return {
        "format": FORMAT,
        "version": __version__,
        "model": None if type(model) in NETWORKS.values() else type(model).__name__,
        "recipe": dataclasses.asdict(classifier.recipe),
        "class_names": list(classifier.class_names),
        "mean": classifier.mean.tolist(),
        "std": classifier.std.tolist(),
    }


@contextlib.contextmanager
def needs(to: str, packages: str) -> Iterator[None]:
    """Raise :class:`InputError` with pip's command if a package is missing, or if the model cannot be traced."""
    try:
        yield
    except ImportError as error:
        raise InputError(f"{option('to')} {to} needs {error.name or packages}: pip install {packages}") from None
    except Exception as error:  # torch's tracers have many types of errors
        if out_of_memory(error):
            raise
        cause = first_cause(error)
        why = f"{type(cause).__name__}: {first_line(cause)}"
        raise InputError(f"this model cannot be written as {to} ({why}); write safetensors") from error


def as_safetensors(classifier: Classifier) -> bytes:
    """Return the file with the weights."""
    with needs("safetensors", "safetensors"):
        return safetensors_file.to_bytes(classifier.model.state_dict(), metadata(classifier))


def as_torch_export(classifier: Classifier) -> bytes:
    """Return the file of ``torch.export.save``. Its extra file ``cifar_fast.json`` has the metadata."""
    buffer = io.BytesIO()
    with needs("torch-export", "torch"):
        program = torch.export.export(classifier, **_example())
        torch.export.save(program, buffer, extra_files={f"{KEY}.json": json.dumps(metadata(classifier))})
    return buffer.getvalue()


def as_onnx(classifier: Classifier) -> bytes:
    """Return the ONNX file. Its property ``cifar_fast`` has the metadata."""
    with needs("onnx", "onnx onnxscript"):
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401

        names: dict[str, Any] = dict(input_names=["images"], output_names=["logits"])
        program: Any = torch.onnx.export(classifier, **_example(), **names, dynamo=True, verbose=False)
        program.model.metadata_props[KEY] = json.dumps(metadata(classifier))
        return program.model_proto.SerializeToString()


def _example() -> dict[str, Any]:
    """Return the arguments of torch's tracers: an example of the input, and the size that may change."""
    images = torch.zeros(2, IMAGE_SIZE, IMAGE_SIZE, IMAGE_CHANNELS, dtype=torch.uint8)
    return dict(args=(images,), dynamic_shapes=({0: torch.export.Dim("N")},))


WRITERS: dict[str, Callable[[Classifier], bytes]] = {
    "safetensors": as_safetensors,
    "torch-export": as_torch_export,
    "onnx": as_onnx,
}
"""What makes the contents of the file, for each format."""
