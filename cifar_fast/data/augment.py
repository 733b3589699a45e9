"""The epoch's random draws, and the augmentation in plain torch.

Shuffle, reflection-padded crop, mirror and cutout only move pixels about, so a whole batch is one
gather: every output pixel has one source pixel, found by arithmetic on its row and column. The
square of the cutout is then set to zero, which is the mean color of normalized images.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from cifar_fast.recipe import IMAGE_SIZE, Recipe


@dataclass(frozen=True)
class Draws:
    """An epoch's random choices, one int64 ``tensor`` ``[4, n]``; column k belongs to position k after the shuffle.

    Its rows: ``permutation``, which image stands there; ``crop``, option ``x0 * (padding + 1) + y0``, the window's
    offset in the padded image; ``flip``, 0 mirrors left to right and 1 does not (the published script's encoding, kept
    for parity); ``cutout``, option ``x0 * (size - cutout_size + 1) + y0``, the square's upper left corner.
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
        """The choices at positions ``start`` to ``stop``, as a view."""
        return Draws(self.tensor[:, start:stop])


def draw_epoch(
    n: int,
    *,
    device: torch.device | str,
    recipe: Recipe | None = None,
    generator: torch.Generator | None = None,
    order: torch.Generator | None = None,
) -> Draws:
    """Draw one epoch's choices for ``n`` images from ``generator`` (default: that of ``device``), the permutation from
    ``order`` (default: ``generator``).

    The calls and their order are the reference script's, so the same seed gives the same epoch.
    """
    recipe = recipe or Recipe()
    crops = (recipe.crop_padding + 1) ** 2
    cutouts = (IMAGE_SIZE + 1 - recipe.cutout_size) ** 2
    order = generator if order is None else order
    with _in_default(order):
        permutation = torch.randperm(n, device=device, generator=order)
    with _in_default(generator):
        where: dict[str, Any] = dict(device=device, generator=generator)
        crop = torch.randint(crops, (n,), **where)
        flip = torch.randint(0 if recipe.flip else 1, 2, (n,), **where)
        cutout = torch.randint(cutouts, (n,), **where)
    return Draws(torch.stack((permutation, crop, flip, cutout)))


_default_lock = threading.Lock()


@contextlib.contextmanager
def _in_default(generator: torch.Generator | None) -> Iterator[None]:
    """Have a GPU's default generator where ``generator`` is meanwhile, and back where it was.

    A GPU draws from ``generator`` itself; what stands in for one may know the default alone, and move that on.
    """
    if generator is None or generator.device.type != "cuda":
        yield
        return
    with _default_lock:
        index = torch.cuda.current_device() if generator.device.index is None else generator.device.index
        default = torch.cuda.default_generators[index]
        before, start = default.get_state(), generator.get_offset()
        default.set_state(generator.get_state())
        try:
            yield
        finally:
            if default.get_offset() != start:
                generator.set_offset(default.get_offset())
            default.set_state(before)


def augment(
    images: torch.Tensor, draws: Draws, recipe: Recipe, memory_format: torch.memory_format = torch.channels_last
) -> torch.Tensor:
    """The batch that ``draws`` chooses from ``images``: gathered, cropped, mirrored, cut out.

    Args:
        images: normalized images ``[N, S, S, C]`` of any dtype, contiguous.
        draws: the choices of B positions of an epoch, on the same device.

    Returns:
        ``[B, C, S, S]`` in ``memory_format``, dtype of ``images``; no two batches share memory.
    """
    size, channels = images.shape[2], images.shape[3]
    padding, cutout = recipe.crop_padding, recipe.cutout_size
    pixel = torch.arange(size, device=images.device)

    crops = padding + 1
    column = torch.where(draws.flip[:, None] == 0, size - 1 - pixel, pixel)  # [B, S]
    row = _reflect(pixel + (draws.crop % crops)[:, None] - padding, size)
    column = _reflect(column + (draws.crop // crops)[:, None] - padding, size)
    source = ((draws.permutation[:, None] * size + row) * size)[:, :, None] + column[:, None, :]  # [B, S, S]
    batch = images.view(-1, channels).index_select(0, source.view(-1)).view(*source.shape, channels)

    corners = size + 1 - cutout
    top, left = (draws.cutout % corners)[:, None], (draws.cutout // corners)[:, None]
    in_rows = (pixel >= top) & (pixel < top + cutout)
    in_columns = (pixel >= left) & (pixel < left + cutout)
    batch.masked_fill_((in_rows[:, :, None] & in_columns[:, None, :])[..., None], 0)
    return batch.permute(0, 3, 1, 2).contiguous(memory_format=memory_format)


def _reflect(index: torch.Tensor, size: int) -> torch.Tensor:
    """Reflection padding as index arithmetic: -1 is 1, ``size`` is ``size - 2``; the border does not repeat."""
    return size - 1 - (size - 1 - index.abs()).abs()
