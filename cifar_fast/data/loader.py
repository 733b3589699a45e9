"""Augmented batches for a training loop of one's own: :class:`Loader`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from cifar_fast.backends.select import resolve_backend
from cifar_fast.data.augment import Draws, augment, draw_epoch
from cifar_fast.data.dataset import Dataset
from cifar_fast.data.tensors import Normalization
from cifar_fast.recipe import IMAGE_CHANNELS, IMAGE_SIZE, Recipe
from cifar_fast.utils.device import fused_unavailable_reason, short_name
from cifar_fast.utils.errors import InputError

PLAIN = Recipe(crop_padding=0, flip=False, cutout_size=0)
"""Changes no image."""


class Loader:
    """Batches of one split of a data set, for any loop: ``for images, labels in loader`` is an epoch.

    ``images`` are ``[B, 3, 32, 32]``, normalized, in channels_last, ``labels`` int64 ``[B]``; both on ``device``, and
    the reader's own: no later batch writes to them. They are what :func:`cifar_fast.fit` trains on for the same draws,
    bit for bit. Where the fused backend can run, a batch is one launch of its kernel; elsewhere a gather in torch.

    Each ``iter`` is an epoch with draws of its own, from ``generator``, which is the loader's alone: one seed gives the
    same epochs, and torch's own generators stay as they are.

    May be edited in place, or replaced by others on the same device, between epochs:

    * ``images``, uint8 ``[N, 32, 32, 3]``, and ``labels``, int64 ``[N]``, copies of the data set's;
    * ``mean`` and ``std``, float32 ``[3]``, those of the data set's training images' 0..255 values, per channel. Edits
      of ``images`` do not move them.

    Args:
        split: train or test. The test images are normalized as the training images are.
        augment: True for the reference's crop, mirror and cutout, False for none; or a :class:`Recipe`, for its
            ``crop_padding``, ``flip`` and ``cutout_size``.
        shuffle, drop_last: as torch's DataLoader. All three are by default True of train and False of test.
        seed: of the draws.
        device: auto, cpu, cuda, cuda:N.
        dtype: float16, bfloat16 or float32, by name or torch's; auto is what ``fit`` computes in on that device.

    Raises:
        InputError: something given cannot work here; at the start of an epoch too, for what has been edited.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int = Recipe.batch_size,
        *,
        split: str = "train",
        augment: bool | Recipe | None = None,
        shuffle: bool | None = None,
        drop_last: bool | None = None,
        seed: int = 0,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "float32",
    ) -> None:
        if split not in ("train", "test"):
            raise InputError(f"split must be train or test, not {split!r}")
        training = split == "train"
        augment, self.shuffle, self.drop_last = (
            training if given is None else given for given in (augment, shuffle, drop_last)
        )
        recipe = augment if isinstance(augment, Recipe) else Recipe() if augment else PLAIN
        self.recipe = dataclasses.replace(recipe, batch_size=batch_size)
        plan = resolve_backend("eager", str(device), short_name(dtype) if isinstance(dtype, torch.dtype) else dtype)
        self.images = torch.tensor(getattr(dataset, f"{split}_images"), device=plan.device)
        self.device, self.dtype = self.images.device, plan.dtype  # with its number, where it is a GPU
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.labels = torch.tensor(getattr(dataset, f"{split}_labels"), device=self.device)
        normalization = Normalization.of(torch.tensor(dataset.train_images, device=self.device))
        self.mean, self.std = normalization.mean, normalization.std
        self._fused = fused_unavailable_reason(self.device) is None
        self._check()

    @property
    def batch_size(self) -> int:
        return self.recipe.batch_size

    def __len__(self) -> int:
        """Batches of an epoch."""
        n = len(self.images)
        return n // self.batch_size if self.drop_last else -(-n // self.batch_size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self._check()
        images, labels, n = self.images, self.labels, len(self.images)
        draws = draw_epoch(n, device=self.device, recipe=self.recipe, generator=self.generator)
        if not self.shuffle:
            torch.arange(n, out=draws.permutation)
        every_byte = torch.arange(256, dtype=torch.uint8, device=self.device).view(256, 1, 1, 1)
        table = self._normalize(every_byte.expand(256, 1, 1, IMAGE_CHANNELS)).view(256, IMAGE_CHANNELS).T.contiguous()
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield self._batch(images, labels, draws.slice(start, start + self.batch_size), table)

    def _batch(
        self, images: torch.Tensor, labels: torch.Tensor, draws: Draws, table: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._fused:
            from cifar_fast.kernels import augment as augment_fused

            how = dict(padding=self.recipe.crop_padding, cutout_size=self.recipe.cutout_size)
            batch, chosen = augment_fused(images, draws.tensor, table, labels=labels, **how)
            assert chosen is not None
            return batch, chosen
        # Of the batch alone, so that edits show: the whole data set's normalized images are not kept.
        normalized = self._normalize(images[draws.permutation])
        in_turn = draws.tensor.clone()
        torch.arange(len(draws), out=in_turn[0])
        return augment(normalized, Draws(in_turn), self.recipe), labels[draws.permutation]

    def _normalize(self, images: torch.Tensor) -> torch.Tensor:
        # A row of pixels at a time: torch is several times slower on a CPU where the last dimension is three colors.
        mean, std = (statistic.repeat(images.shape[2]) for statistic in (self.mean, self.std))
        return images.flatten(2).float().sub_(mean).div_(std).to(self.dtype).view(images.shape)

    def _check(self) -> None:
        """Raise :class:`InputError` for what no batch can be made of."""
        n, shape = len(self.images), (IMAGE_SIZE, IMAGE_SIZE, IMAGE_CHANNELS)
        for name, tensor, dtype, wanted in (
            ("images", self.images, torch.uint8, (n, *shape)),
            ("labels", self.labels, torch.int64, (n,)),
            ("mean", self.mean, torch.float32, (IMAGE_CHANNELS,)),
            ("std", self.std, torch.float32, (IMAGE_CHANNELS,)),
        ):
            if not isinstance(tensor, torch.Tensor):
                raise InputError(f"{name} of a loader must be a tensor, not {type(tensor).__name__}")
            given = (tensor.dtype, tuple(tensor.shape), tensor.device, tensor.is_contiguous())
            if given != (dtype, wanted, self.device, True):
                raise InputError(
                    f"{name} of a loader must be contiguous {short_name(dtype)} of shape {wanted} on "
                    f"{self.device}, not {short_name(tensor.dtype)} of shape {given[1]} on {tensor.device}"
                )
        if not self.std.all():
            raise InputError("a channel of train_images has the same value everywhere; it cannot be normalized")
        if len(self) == 0:
            raise InputError(f"{n} images are fewer than one batch of {self.batch_size}; give a smaller batch_size")
