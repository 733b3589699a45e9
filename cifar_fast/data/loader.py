"""Augmented batches for any training loop: :class:`Loader`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from numbers import Integral
from typing import Any

import torch
from torch import distributed

from cifar_fast.data.augment import Draws, augment, draw_epoch
from cifar_fast.data.from_python import as_whole_dataset
from cifar_fast.data.tensors import Normalization
from cifar_fast.recipe import DTYPES, IMAGE_CHANNELS, IMAGE_SIZE, MEMORY_FORMATS, Recipe
from cifar_fast.utils.device import check_caches, default_dtype, fused_unavailable_reason, resolve_device, short_name
from cifar_fast.utils.errors import InputError, option

NO_AUGMENTATION = Recipe(crop_padding=0, flip=False, cutout_size=0)


class Loader:
    """Batches of one split of a data set. ``for images, labels in loader`` is an epoch.

    ``images`` are normalized, ``[B, 3, 32, 32]`` in ``memory_format``. ``labels`` are int64 ``[B]``. Both are on
    ``device``, and no later batch overwrites them. They are bit for bit what :func:`cifar_fast.fit` trains on for the
    same draws. If the fused backend can run here, its kernel makes a batch in one launch. Otherwise torch gathers it.

    Each epoch draws from ``generator``, which belongs to the loader. The same seed gives the same epochs, and torch's
    default generators do not change.

    If several processes share an epoch, each gets its share, as from torch's DistributedSampler. All draw the same
    permutation, so give all ranks the same seed. Rank r of w takes the positions r, r + w, r + 2w, ... of it. All ranks
    have equally many images: ``drop_last`` leaves out the last ones for this; otherwise the first ones are used again.

    The attribute ``dataset`` is the data set that was given. The attributes below may be edited in place between
    epochs, or replaced by tensors on the same device:

    * ``images``, uint8 ``[N, 32, 32, 3]``, and ``labels``, int64 ``[N]``: copies of the arrays of the data set.
    * ``mean`` and ``std``, float32 ``[3]``: statistics of the training images' 0..255 values, per channel. They do not
      follow edits of ``images``.

    Args:
        dataset: a :class:`Dataset`, or what :func:`cifar_fast.fit` takes. If it has one split, the split is ``train``.
        split: train or test. Test images are normalized with ``mean`` and ``std`` of the training images.
        augment: True for the reference's crop, mirror and cutout, False for none. A :class:`Recipe` gives its
            own; one that alternates its mirroring counts the loader's epochs. Default: True for train, False for test.
        normalize: False leaves the pixel values 0..255 as they are, in ``dtype``. The square of the cutout then has the
            mean color, rounded to whole numbers.
        shuffle, drop_last: as in torch's DataLoader. Default: True for train, False for test.
        seed: seed of the draws.
        device: auto, cpu, cuda or cuda:N.
        dtype: float16, bfloat16 or float32, as a name or a torch dtype. auto: the dtype of ``fit`` on that device.
        memory_format: channels_last or contiguous_format (NCHW), as a name or a torch memory format.
        rank, world_size: which share of each epoch this process gets, and how many shares there are. None asks
            torch.distributed at each epoch; if it is not initialized, there is one share. ``world_size=1`` gives each
            process all images. ``batch_size`` and ``len`` count for one process.

    Raises:
        InputError: an argument cannot work here. Also raised at the start of an epoch, for an edited attribute.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int = Recipe.batch_size,
        *,
        split: str = "train",
        augment: bool | Recipe | None = None,
        shuffle: bool | None = None,
        drop_last: bool | None = None,
        seed: int = 0,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "float32",
        memory_format: str | torch.memory_format = "channels_last",
        normalize: bool = True,
        rank: int | None = None,
        world_size: int | None = None,
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
        format_name = short_name(memory_format) if isinstance(memory_format, torch.memory_format) else memory_format
        if format_name not in MEMORY_FORMATS:
            raise InputError(f"unknown memory format {format_name!r}; the choices are {', '.join(MEMORY_FORMATS)}")
        self.memory_format: torch.memory_format = getattr(torch, format_name)
        self.dataset, self.normalize = dataset, normalize
        dataset = as_whole_dataset(dataset, split)
        self._rank, self._world_size = rank, world_size
        self._share()
        check_caches()
        resolved = resolve_device(str(device))
        self.dtype = getattr(torch, default_dtype(resolved)[0] if dtype_name == "auto" else dtype_name)
        self.images = torch.tensor(getattr(dataset, f"{split}_images"), device=resolved)
        self.labels = torch.tensor(getattr(dataset, f"{split}_labels"), device=resolved)
        self.device = self.images.device  # unlike resolved, it has the index of the GPU
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self._epoch = 0
        normalization = Normalization.of(torch.from_numpy(dataset.train_images).to(self.device))
        self.mean, self.std = normalization.mean, normalization.std
        self._fused = fused_unavailable_reason(self.device) is None
        self._check()

    @property
    def batch_size(self) -> int:
        return self.recipe.batch_size

    def _share(self) -> tuple[int, int]:
        """Return the rank and the number of ranks, now; torch.distributed may have been initialized since before."""
        shared = distributed.is_available() and distributed.is_initialized()
        world_size = self._world_size
        if world_size is None:
            world_size = distributed.get_world_size() if shared else 1
        rank = self._rank
        if rank is None and world_size > 1 and not shared:
            raise InputError(f"world_size is {world_size}, and torch.distributed is not initialized; give rank too")
        if rank is None:
            rank = distributed.get_rank() if world_size > 1 else 0
        for name, value in (("rank", rank), ("world_size", world_size)):
            if not isinstance(value, Integral) or isinstance(value, bool):
                raise InputError(f"{name} must be a whole number, not {value!r}")
        if not 0 <= rank < world_size:
            raise InputError(f"rank must lie in 0 to world_size - 1, which is {world_size - 1}, not {rank}")
        return int(rank), int(world_size)

    def _share_size(self, world_size: int) -> int:
        """Return the number of images of each rank in an epoch."""
        n = len(self.images)
        return n // world_size if self.drop_last else -(-n // world_size)

    def _batches(self, images: int) -> int:
        return images // self.batch_size if self.drop_last else -(-images // self.batch_size)

    def __len__(self) -> int:
        """Return the number of batches in an epoch of this process."""
        return self._batches(self._share_size(self._share()[1]))

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self._check()
        images, labels, n = self.images, self.labels, len(self.images)
        rank, world_size = self._share()
        how: dict[str, Any] = dict(recipe=self.recipe, generator=self.generator, shuffle=self.shuffle)
        draws = draw_epoch(n, device=self.device, epoch=self._epoch, **how)
        self._epoch += 1
        if world_size > 1:
            end = world_size * self._share_size(world_size)
            draws = Draws(draws.tensor[:, torch.arange(rank, end, world_size, device=self.device) % n])
        normalization, offset = Normalization(self.mean, self.std), None
        if (
            not self.normalize
        ):  # Cutout sets zeros. The values are exact in each dtype with a whole number as the offset.
            normalization = Normalization(self.mean.round(), torch.ones_like(self.std))
            offset = normalization.mean.to(self.dtype).view(-1, 1, 1)
        table = normalization.table(self.dtype)
        for start in range(0, self._batches(len(draws)) * self.batch_size, self.batch_size):
            chosen = draws.slice(start, start + self.batch_size)
            batch, batch_labels = self._batch(images, labels, chosen, normalization, table)
            yield batch if offset is None else batch.add_(offset), batch_labels

    def _batch(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        draws: Draws,
        normalization: Normalization,
        table: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._fused:
            from cifar_fast.kernels import augment as augment_fused

            recipe = self.recipe
            options: dict[str, Any] = dict(padding=recipe.crop_padding, cutout_size=recipe.cutout_size)
            options["both_sides"] = recipe.crop_both_sides
            batch, batch_labels = augment_fused(images, draws.tensor, table, labels=labels, **options)
            assert batch_labels is not None
            return batch.contiguous(memory_format=self.memory_format), batch_labels
        # A row of pixels at a time: torch is several times slower on a CPU if the last dimension is the three colors.
        per_row = Normalization(normalization.mean.repeat(IMAGE_SIZE), normalization.std.repeat(IMAGE_SIZE))
        chosen = images[draws.permutation]
        normalized = per_row.apply(chosen.flatten(2), self.dtype).view(chosen.shape)
        in_order = draws.tensor.clone()
        torch.arange(len(draws), out=in_order[0])
        return augment(normalized, Draws(in_order), self.recipe, self.memory_format), labels[draws.permutation]

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
        if self.normalize and not self.std.all():
            raise InputError("a channel of train_images has the same value everywhere; it cannot be normalized")
        if len(self) == 0:
            ranks = self._share()[1]
            share = f" for each of {ranks} ranks" if ranks > 1 else ""
            raise InputError(
                f"{n} images are fewer than one batch of {self.batch_size}{share}; give a smaller "
                f"{option('batch_size')}"
            )
