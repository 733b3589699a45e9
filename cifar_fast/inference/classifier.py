"""A trained network in use: :func:`load_model` reads ``model.pt``, and what it gives takes images as they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from cifar_fast.model import CNN
from cifar_fast.recipe import IMAGE_CHANNELS, IMAGE_SIZE, Recipe
from cifar_fast.training.results import FORMAT
from cifar_fast.utils.errors import InputError, first_line
from cifar_fast.utils.files import CHECKPOINT, MODEL


class Classifier(nn.Module):
    """A trained ``model``, the plain :class:`CNN` or one's own, behind the normalization that it was trained with.

    ``recipe`` and ``class_names`` are the training's; ``mean`` and ``std``, buffers ``[3]``, are those of the training
    images' 0..255 values. As any module it goes to a device by ``to``.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self, model: nn.Module, recipe: Recipe, class_names: Sequence[str], mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.model, self.recipe, self.class_names = model, recipe, tuple(class_names)
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits ``[N, classes]`` of ``images``, uint8 ``[N, 32, 32, 3]``, on the module's device."""
        return self.model(((images - self.mean) / self.std).permute(0, 3, 1, 2).contiguous())

    @torch.no_grad()
    def predict(
        self, images: np.ndarray | torch.Tensor, *, flip_average: bool = False, batch_size: int = 512
    ) -> torch.Tensor:
        """Probabilities ``[N, classes]``, on the module's device, of ``images``, uint8 ``[N, 32, 32, 3]``, on any.

        With ``flip_average`` they are those of the mean of the logits of each image and of its mirror. With a label
        smoothing of s an image's own class was trained towards 1 - s + s / classes, not towards 1.

        Raises:
            InputError: images of another type or shape.
        """
        if not isinstance(images, torch.Tensor):
            images = torch.from_numpy(np.require(images, requirements=["C_CONTIGUOUS", "WRITEABLE"]))
        shape = (IMAGE_SIZE, IMAGE_SIZE, IMAGE_CHANNELS)
        if images.dtype != torch.uint8 or images.shape[1:] != shape:
            raise InputError(f"images must be uint8 of shape (N, 32, 32, 3), not {images.dtype} of {(*images.shape,)}")
        found = []
        for batch in images.split(batch_size):
            batch = batch.to(self.mean.device)
            logits = self(batch)
            if flip_average:
                logits = (logits + self(batch.flip(2))) / 2
            found.append(logits.softmax(dim=1))
        return torch.cat(found)


def load_model(path: str | Path, model: nn.Module | None = None) -> Classifier:
    """The network of the ``model.pt`` at ``path``, a file or a training's folder: on the CPU in float32, in eval mode.

    Whichever backend and dtype it was trained in. Of a training with a model of one's own, ``model`` is such a one; it
    gets the weights. Raises :class:`InputError` where it cannot be had.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        if not (path / MODEL).exists() and (path / CHECKPOINT).exists():
            raise InputError(f"{path}: that training has not ended; go on with it by cifar-fast train --resume {path}")
        path = path / MODEL
    cure = f"name the {MODEL} of a training that has ended, or its folder"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or first_line(error)}); {cure}") from None
    except Exception:  # a damaged file fails in as many ways as there are bytes, and torch then advises to trust it
        raise InputError(f"{path}: no file of torch.save with plain tensors, or damaged; {cure}") from None
    if not (isinstance(saved, dict) and "format" in saved):
        raise InputError(f"{path}: holds no recipe beside the weights, as before version 0.1; train again, or {cure}")
    if saved["format"] != FORMAT:
        raise InputError(f"{path}: is of format {saved['format']}, not {FORMAT}; use the version that wrote it")
    name = saved.get("model")  # which files of before lack
    if (model is None) != (name is None):
        raise InputError(
            f"{path}: holds the weights of {name or 'the recipe'}, "
            + ("a model of one's own: load_model(path, model) with one gives it them" if name else "give no model")
        )
    try:
        recipe = Recipe(**saved["recipe"])
        if model is None:  # under a generator that is not torch's own, which is the caller's
            model = CNN(recipe, len(saved["class_names"]), torch.Generator())
        model.to("cpu", torch.float32).load_state_dict(saved["state_dict"])
        return Classifier(model, recipe, saved["class_names"], saved["mean"], saved["std"]).eval()
    except Exception as error:  # another project's file, or another file of this one's
        raise InputError(f"{path}: holds no network ({type(error).__name__}: {first_line(error)}); {cure}") from None
