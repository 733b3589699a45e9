"""Augmented batches for any training loop: :class:`Loader`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from cifar_fast.data.augment import Draws, augment, draw_epoch
from cifar_fast.data.dataset import Dataset
from cifar_fast.data.tensors import Normalization
from cifar_fast.recipe import DTYPES, IMAGE_CHANNELS, IMAGE_SIZE, Recipe
from cifar_fast.utils.device import check_caches, default_dtype, fused_unavailable_reason, resolve_device, short_name
from cifar_fast.utils.errors import InputError, option

NO_AUGMENTATION = Recipe(crop_padding=0, flip=False, cutout_size=0)


class Loader:
    """Batches of one split of a data set. ``for images, labels in loader`` is an epoch.

    ``images`` are normalized, ``[B, 3, 32, 32]`` in channels_last. ``labels`` are int64 ``[B]``. Both are on
    ``device``, and no later batch overwrites them. They are bit for bit what :func:`cifar_fast.fit` trains on for the
    same draws. If the fused backend can run here, its kernel makes a batch in one launch. Otherwise torch gathers it.

    Each epoch draws from ``generator``, which belongs to the loader. The same seed gives the same epochs, and torch's
    default generators do not change.

    These attributes may be edited in place between epochs, or replaced by tensors on the same device:

    * ``images``, uint8 ``[N, 32, 32, 3]``, and ``labels``, int64 ``[N]``: copies of the arrays of the data set.
    * ``mean`` and ``std``, float32 ``[3]``: statistics of the training images' 0..255 values, per channel. They do not
      follow edits of ``images``.

    Args:
        split: train or test. Test images are normalized with ``mean`` and ``std`` of the training images.
        augment: True for the reference's crop, mirror and cutout, False for none. A :class:`Recipe` gives its
            ``crop_padding``, ``flip`` and ``cutout_size``. Default: True for train, False for test.
        shuffle, drop_last: as in torch's DataLoader. Default: True for train, False for test.
        seed: seed of the draws.
        device: auto, cpu, cuda or cuda:N.
        dtype: float16, bfloat16 or float32, as a name or a torch dtype. auto: the dtype of ``fit`` on that device.

    Raises:
        InputError: an argument cannot work here. Also raised at the start of an epoch, for an edited attribute.
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
        recipe = augment if isinstance(augment, Recipe) else Recipe() if augment else NO_AUGMENTATION
        self.recipe = dataclasses.replace(recipe, batch_size=batch_size)
        dtype_name = short_name(dtype) if isinstance(dtype, torch.dtype) else dtype
        if dtype_name not in ("auto", *DTYPES):
            raise InputError(f"unknown dtype {dtype_name!r}; the choices are auto, {', '.join(DTYPES)}")
        check_caches()
        resolved = resolve_device(str(device))
        self.dtype = getattr(torch, default_dtype(resolved)[0] if dtype_name == "auto" else dtype_name)
        self.images = torch.tensor(getattr(dataset, f"{split}_images"), device=resolved)
        self.labels = torch.tensor(getattr(dataset, f"{split}_labels"), device=resolved)
        self.device = self.images.device  # unlike resolved, it has the index of the GPU
        self.generator = torch.Generator(self.device).manual_seed(seed)
        normalization = Normalization.of(torch.from_numpy(dataset.train_images).to(self.device))
        self.mean, self.std = normalization.mean, normalization.std
        self._fused = fused_unavailable_reason(self.device) is None
        self._check()

    @property
    def batch_size(self) -> int:
        return self.recipe.batch_size

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        n = len(self.images)
        return n // self.batch_size if self.drop_last else -(-n // self.batch_size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self._check()
        images, labels, n = self.images, self.labels, len(self.images)
        draws = draw_epoch(n, device=self.device, recipe=self.recipe, generator=self.generator)
        if not self.shuffle:
            torch.arange(n, out=draws.permutation)
        table = Normalization(self.mean, self.std).table(self.dtype)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield self._batch(images, labels, draws.slice(start, start + self.batch_size), table)

    def _batch(
        self, images: torch.Tensor, labels: torch.Tensor, draws: Draws, table: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._fused:
            from cifar_fast.kernels import augment as augment_fused

            padding, cutout_size = self.recipe.crop_padding, self.recipe.cutout_size
            batch, batch_labels = augment_fused(
                images, draws.tensor, table, labels=labels, padding=padding, cutout_size=cutout_size
            )
            assert batch_labels is not None
            return batch, batch_labels
        # A row of pixels at a time: torch is several times slower on a CPU if the last dimension is the three colors.
        per_row = Normalization(self.mean.repeat(IMAGE_SIZE), self.std.repeat(IMAGE_SIZE))
        chosen = images[draws.permutation]
        normalized = per_row.apply(chosen.flatten(2), self.dtype).view(chosen.shape)
        in_order = draws.tensor.clone()
        torch.arange(len(draws), out=in_order[0])
        return augment(normalized, Draws(in_order), self.recipe), labels[draws.permutation]

    def _check(self) -> None:
        """Raise :class:`InputError` if the attributes do not make a batch."""
        n, shape = len(self.images), (IMAGE_SIZE, IMAGE_SIZE, IMAGE_CHANNELS)
        for name, tensor, dtype, expected in (
            ("images", self.images, torch.uint8, (n, *shape)),
            ("labels", self.labels, torch.int64, (n,)),
            ("mean", self.mean, torch.float32, (IMAGE_CHANNELS,)),
            ("std", self.std, torch.float32, (IMAGE_CHANNELS,)),
        ):
            if not isinstance(tensor, torch.Tensor):
                raise InputError(f"{name} of a loader must be a tensor, not {type(tensor).__name__}")
            given = (tensor.dtype, tuple(tensor.shape), tensor.device, tensor.is_contiguous())
            if given != (dtype, expected, self.device, True):
                raise InputError(
                    f"{name} of a loader must be contiguous {short_name(dtype)} of shape {expected} on "
                    f"{self.device}, not {short_name(tensor.dtype)} of shape {given[1]} on {tensor.device}"
                )
        if not self.std.all():
            raise InputError("a channel of train_images has the same value everywhere; it cannot be normalized")
        if len(self) == 0:
            raise InputError(
                f"{n} images are fewer than one batch of {self.batch_size}; give a smaller {option('batch_size')}"
            )
