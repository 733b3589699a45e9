"""A trained network with its normalization, and :func:`load_model`, which reads it from a file."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cifar_fast.data.class_names import ClassNames
from cifar_fast.data.dataset import MAX_CLASSES
from cifar_fast.data.tensors import Normalization
from cifar_fast.inference import safetensors_file
from cifar_fast.model import cannot_be_scripted, load_weights, make_network, unwrap
from cifar_fast.recipe import IMAGE_CHANNELS, IMAGE_SIZE, Recipe
from cifar_fast.training.results import FORMAT, Result
from cifar_fast.utils.errors import InputError, first_line, option, out_of_memory
from cifar_fast.utils.files import MODEL, MODEL_SAFETENSORS, TRAINING, as_path, load_tensors, regular
from cifar_fast.utils.typed import are_finite


class Classifier(nn.Module):
    """A trained ``model`` that takes raw images, normalized as in its training.

    Args:
        model: the recipe's network, or the custom model that was trained.
        recipe: the recipe of the training.
        class_names: names of the classes, in the order of the logits.
        mean, std: per channel, of the training images' 0..255 values. They become buffers, float32 ``[3]``.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self, model: nn.Module, recipe: Recipe, class_names: Sequence[str], mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.model, self.recipe, self.class_names = model, recipe, ClassNames(class_names)
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def __prepare_scriptable__(self) -> Any:
        """Refuse ``torch.jit.script``, which calls this and cannot compile the normalization."""
        raise cannot_be_scripted()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits ``[N, classes]`` for uint8 images ``[N, 32, 32, 3]`` on the module's device."""
        if isinstance(images, torch.Tensor):  # some tracers have other objects
            _check_images(images)
        normalized = Normalization(self.mean, self.std).apply(images, self.mean.dtype)
        return self.model(normalized.permute(0, 3, 1, 2).contiguous())

    @torch.no_grad()
    def predict(
        self, images: np.ndarray | torch.Tensor, *, flip_average: bool = False, batch_size: int = 512
    ) -> torch.Tensor:
        """Return the probability of each class, in eval mode whatever mode the module is in.

        Training with a label smoothing of s aims at a probability of 1 - s + s / classes for the correct class, not
        at 1.

        Args:
            images: uint8 ``[N, 32, 32, 3]``, on any device.
            flip_average: average the logits of each image and its mirror image.
            batch_size: images per forward pass.

        Returns:
            Probabilities, float32 ``[N, classes]``, on the module's device.

        Raises:
            InputError: ``images`` has another dtype or shape.
        """
        if not isinstance(images, torch.Tensor):
            images = torch.from_numpy(np.require(images, requirements=["C_CONTIGUOUS", "WRITEABLE"]))
        _check_images(images)
        in_training = [module for module in self.modules() if module.training]
        self.eval()  # in training, each batch would change the statistics of the norms
        try:
            probabilities = []
            for batch in images.split(batch_size):
                batch = batch.to(self.mean.device)
                logits = self(batch)
                if flip_average:
                    logits = (logits + self(batch.flip(2))) / 2
                probabilities.append(logits.softmax(dim=1))
            return torch.cat(probabilities)
        finally:
            for module in in_training:
                module.training = True


def _check_images(images: torch.Tensor) -> None:
    # In a trace, sizes are tensors.
    if images.dtype != torch.uint8 or (
        not torch.jit.is_tracing() and images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, IMAGE_CHANNELS)
    ):
        raise InputError(
            f"images must be uint8 of shape (N, 32, 32, 3), not {images.dtype} of {tuple(map(int, images.shape))}; "
            "the classifier itself normalizes values from 0 to 255"
        )


def _without_weights(folder: Path) -> str:
    """Return why the folder of a training has no weights, and what to do."""
    with contextlib.suppress(InputError):
        result = Result.load(folder, weights=False)
        if not (result.runs or result.missing):
            return "all runs of this training diverged, so it has no weights; train again with other options"
    return f"this training is not finished; continue it with {option('resume')} {folder}"


def load_model(path: str | Path, model: nn.Module | None = None) -> Classifier:
    """Load a trained network on the CPU, in float32 and eval mode, whatever backend and dtype trained it.

    Args:
        path: ``model.pt``, its export as safetensors, or the folder of a finished training. In a folder without
            ``model.pt``, ``model.safetensors`` is read.
        model: an instance of the custom model that was trained. It gets the weights, and is taken out of a wrapper such
            as torch.compile's. None for the recipe's network.

    Raises:
        InputError: the file cannot be read, or its weights do not fit the model.
    """
    path = as_path(path, "path")
    if path.is_dir():
        found = next((name for name in (MODEL, MODEL_SAFETENSORS) if (path / name).exists()), None)
        if not found and (path / TRAINING).exists():
            raise InputError(f"{path}: {_without_weights(path)}")
        path = path / (found or MODEL)
    hint = f"choose the {MODEL} of a finished training, or its folder"
    safe = path.suffix == safetensors_file.SUFFIX
    try:
        saved = safetensors_file.read(regular(path)) if safe else load_tensors(path)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or first_line(error)}); {hint}") from None
    except Exception as error:  # a damaged file raises many types of errors, with torch's advice to trust the file
        if out_of_memory(error):
            raise
        writer = "safetensors" if safe else "torch.save with plain tensors"
        raise InputError(f"{path}: damaged, or not written by {writer}; {hint}") from None
    if not (isinstance(saved, dict) and "format" in saved):
        raise InputError(f"{path}: has no recipe beside the weights; {hint}")
    if type(saved["format"]) is not int or saved["format"] != FORMAT:
        raise InputError(f"{path}: has format {saved['format']}, not {FORMAT}; use the version that wrote it")
    class_name = saved.get("model")
    if not (class_name is None or isinstance(class_name, str)):
        raise InputError(f"{path}: holds no name of a model but {type(class_name).__name__}; {hint}")
    if class_name and model is None:
        raise InputError(f"{path}: holds the weights of the custom model {class_name}; call load_model(path, model)")
    if model is not None and not class_name:
        raise InputError(f"{path}: holds the weights of the recipe's network; call load_model(path) without a model")
    custom = model
    try:
        recipe = Recipe(**saved["recipe"])
        class_names = ClassNames(saved["class_names"])
        for name in ("mean", "std"):
            if not are_finite(saved[name], IMAGE_CHANNELS):
                raise InputError(f"{name} is no list of three numbers")
        if not 2 <= len(class_names) <= MAX_CLASSES:
            raise InputError(f"it names {len(class_names)} classes; there must be 2 to {MAX_CLASSES}")
        if model is None and 2 * recipe.weights(len(class_names)) > path.stat().st_size:
            raise InputError("its recipe has more weights than the file holds")
        if model is None:  # with a generator of its own, because torch's default one belongs to the caller
            model = make_network(recipe, len(class_names), torch.Generator())
        model = unwrap(model).to("cpu", torch.float32)
        load_weights(model, saved["state_dict"])
        return Classifier(model, recipe, class_names, saved["mean"], saved["std"]).eval()
    except InputError as error:
        raise InputError(
            f"{path}: {error.message}; {hint if custom is None else 'give the model that was trained'}"
        ) from None
    except Exception as error:  # the file of another project, or another kind of file of this one
        if out_of_memory(error):
            raise
        cause = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"{path}: holds no network that can be loaded ({cause}); {hint}") from None
