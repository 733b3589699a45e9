"""The random draws of an epoch, and the augmentation in plain torch.

Shuffle, reflection-padded crop and mirror only move pixels, so a whole batch is one gather. Each output pixel has one
source pixel, computed from its row and column. The square of the cutout is then set to zero, the mean color.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from cifar_fast.recipe import IMAGE_SIZE, Recipe
from cifar_fast.utils.seeds import derive_seed

FLIPS = 4
"""Number of the random stream of a mirroring that alternates, besides the streams of ``Seeds``."""


@dataclass(frozen=True)
class Draws:
    """The random choices of an epoch of n images.

    ``tensor`` is int64 ``[4, n]``. Column k belongs to position k of the shuffled epoch. The rows are:

    * ``permutation``: the index of the image at that position.
    * ``crop``: ``x0 * offsets + y0``, the offset of the window in the padded image, for ``recipe.crop_offsets``.
    * ``flip``: 0 mirrors left to right, 1 does not. The published script encodes it so.
    * ``cutout``: ``x0 * (size - cutout_size + 1) + y0``, the upper left corner of the square.
    """

    tensor: torch.Tensor

    @property
    def permutation(self) -> torch.Tensor:
        return self.tensor[0]

    @property
    def crop(self) -> torch.Tensor:
        return self.tensor[1]

    @property
    def flip(self) -> torch.Tensor:
        return self.tensor[2]

    @property
    def cutout(self) -> torch.Tensor:
        return self.tensor[3]

    def __len__(self) -> int:
        return self.tensor.shape[1]

    def slice(self, start: int, stop: int) -> Draws:
        """Return the choices at positions ``start`` to ``stop``, as a view."""
        return Draws(self.tensor[:, start:stop])


def draw_epoch(
    n: int,
    *,
    device: torch.device | str,
    recipe: Recipe | None = None,
    generator: torch.Generator | None = None,
    order: torch.Generator | None = None,
    epoch: int = 0,
    shuffle: bool = True,
) -> Draws:
    """Draw the choices of one epoch of ``n`` images.

    The calls and their order are the reference script's, so the same seed gives the same epoch.

    Args:
        device: device of the draws and of both generators.
        recipe: gives crop, flip and cutout. The reference recipe by default.
        generator: generator of all draws. The default generator of the device by default.
        order: generator of the permutation. ``generator`` by default.
        epoch: number of the epoch from 0, for a recipe that alternates the mirroring. Its mirroring in epoch 0 is drawn
            from the first seed of ``generator``, so every epoch of a run knows it.
        shuffle: False keeps the order of the images. The other draws are the same.
    """
    recipe = recipe or Recipe()
    options: dict[str, Any] = dict(device=device, generator=generator)
    permutation = torch.randperm(n, device=device, generator=generator if order is None else order)
    if not shuffle:
        torch.arange(n, out=permutation)
    crop = torch.randint(recipe.crop_offsets**2, (n,), **options)
    if recipe.flip and recipe.alternate_flip:
        seed = torch.initial_seed() if generator is None else generator.initial_seed()
        of_image = torch.Generator(device).manual_seed(derive_seed(seed, FLIPS))
        first = torch.randint(2, (n,), device=device, generator=of_image)[permutation]
        flip = first if epoch % 2 == 0 else 1 - first
    else:
        flip = torch.randint(0 if recipe.flip else 1, 2, (n,), **options)
    cutout = torch.randint((IMAGE_SIZE + 1 - recipe.cutout_size) ** 2, (n,), **options)
    return Draws(torch.stack((permutation, crop, flip, cutout)))


def augment(
    images: torch.Tensor,
    draws: Draws,
    recipe: Recipe,
    memory_format: torch.memory_format = torch.channels_last,
    normalize: Callable[[torch.Tensor], torch.Tensor] = lambda pixels: pixels,
) -> torch.Tensor:
    """Gather, crop, mirror, normalize and cut out the batch that ``draws`` chooses from ``images``.

    Args:
        images: ``[N, S, S, C]`` of any dtype, contiguous.
        draws: the choices of B positions of an epoch, on the same device.
        recipe: gives crop and cutout.
        memory_format: of the result.
        normalize: function of ``[B, S, S, C]`` that is called before the cutout. Normalizing a batch gives the same
            bits as normalizing all images first, and needs less memory.

    Returns:
        ``[B, C, S, S]`` in ``memory_format``, in the dtype of ``normalize``. No two batches share memory.
    """
    size, channels = images.shape[2], images.shape[3]
    padding, cutout = recipe.crop_padding, recipe.cutout_size
    pixel = torch.arange(size, device=images.device)

    crops = recipe.crop_offsets
    column = torch.where(draws.flip[:, None] == 0, size - 1 - pixel, pixel)  # [B, S]
    row = _reflect(pixel + (draws.crop % crops)[:, None] - padding, size)
    column = _reflect(column + (draws.crop // crops)[:, None] - padding, size)
    source = ((draws.permutation[:, None] * size + row) * size)[:, :, None] + column[:, None, :]  # [B, S, S]
    batch = images.view(-1, channels).index_select(0, source.view(-1)).view(*source.shape, channels)
    batch = normalize(batch)

    corners = size + 1 - cutout
    top, left = (draws.cutout % corners)[:, None], (draws.cutout // corners)[:, None]
    in_rows = (pixel >= top) & (pixel < top + cutout)
    in_columns = (pixel >= left) & (pixel < left + cutout)
    batch.masked_fill_((in_rows[:, :, None] & in_columns[:, None, :])[..., None], 0)
    return batch.permute(0, 3, 1, 2).contiguous(memory_format=memory_format)


def _reflect(index: torch.Tensor, size: int) -> torch.Tensor:
    """Reflect indices outside 0 to ``size - 1``: -1 becomes 1, ``size`` becomes ``size - 2``."""
    return size - 1 - (size - 1 - index.abs()).abs()
