"""A data set as tensors on a device, and its normalization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from cifar_fast.data.dataset import ARRAYS, Dataset
from cifar_fast.kernels import normalization_table
from cifar_fast.recipe import IMAGE_CHANNELS

if TYPE_CHECKING:
    pass
from typing import TYPE_CHECKING, NamedTuple

from cifar_fast.utils.errors import InputError

if TYPE_CHECKING:
    pass


PADDED_CHANNELS = 8
"""Channels of a batch: three colors and zeros, so that a pixel in half precision is one 128-bit access, as tensor cores
want it.

Not chosen by measurement yet: 3 and 4 are the others to try.
"""


def byte_tensors(
    dataset: Dataset, device: torch.device, dtype: torch.dtype, channels: int = PADDED_CHANNELS
) -> tuple[Tensors, torch.Tensor]:
    """``dataset`` on ``device``, and the normalization table ``[3, 256]`` in ``dtype``.

    The training images stay bytes, which :func:`kernels.augment` normalizes; the test images are normalized by the
    table too, in channels_last with ``channels`` channels, of which those after the colors are zeros.
    """
    train_images, train_labels, test_images, test_labels = (
        torch.from_numpy(array).to(device)
        for array in (dataset.train_images, dataset.train_labels, dataset.test_images, dataset.test_labels)
    )
    table = normalization_table(as_nchw(train_images), dtype)
    test_images = table[torch.arange(IMAGE_CHANNELS, device=device), test_images.int()]
    test_images = F.pad(test_images, (0, channels - IMAGE_CHANNELS)).permute(0, 3, 1, 2)
    return Tensors(train_images, train_labels, test_images, test_labels), table


class Tensors(NamedTuple):
    """A data set on the device, its images normalized.

    ``train_images`` are ``[N, S, S, C]``, to gather from, ``test_images`` ``[N, C, S, S]`` in the batches' memory
    format; labels are int64 ``[N]``.
    """

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


def normalized_tensors(
    dataset: Dataset, device: torch.device, dtype: torch.dtype, memory_format: torch.memory_format
) -> Tensors:
    """``dataset`` on ``device``, its images normalized in ``dtype``, the test images in ``memory_format``."""
    train_images, test_images = normalize(dataset, device, dtype)
    train_labels, test_labels = (
        torch.from_numpy(labels).to(device) for labels in (dataset.train_labels, dataset.test_labels)
    )
    test_images = test_images.permute(0, 3, 1, 2).contiguous(memory_format=memory_format)
    return Tensors(train_images, train_labels, test_images, test_labels)


def normalize(dataset: Dataset, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Training and test images ``[N, 32, 32, 3]`` as ``dtype`` on ``device``, less the mean, over the deviation.

    Both are those of the training images' 0..255 values, per channel, the deviation with N - 1.
    """
    train, test = (torch.tensor(images, device=device) for images in (dataset.train_images, dataset.test_images))
    mean, std = channel_statistics(train)
    if not std.all():
        raise InputError(
            f"{dataset.source}: a channel of train_images has the same value everywhere; it cannot be normalized"
        )
    return ((train - mean) / std).to(dtype), ((test - mean) / std).to(dtype)


def channel_statistics(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (with N - 1) of the bytes ``images`` ``[N, S, S, C]``, float32 ``[C]`` each."""
    std, mean = torch.std_mean(as_nchw(images).float(), dim=(0, 1, 2), unbiased=True)
    return mean, std


def as_nchw(images: torch.Tensor) -> torch.Tensor:
    """The same ``[N, S, S, C]``, NCHW in memory as torchvision's arrays: sums over it have the script's bits."""
    return images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation (with N - 1) of the training images' 0..255 values, per channel.

    ``mean`` and ``std`` are float32 ``[C]``, on the device of the images that they normalize.
    """

    mean: torch.Tensor
    std: torch.Tensor

    @classmethod
    def of(cls, images: torch.Tensor) -> Normalization:
        """Compute it from uint8 images ``[N, S, S, C]``."""
        return cls(*channel_statistics(images))

    def apply(self, images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Normalize uint8 images ``[..., C]`` in float32 and round them to ``dtype``."""
        return ((images - self.mean) / self.std).to(dtype)

    def table(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the normalized value ``[C, 256]`` of each byte, as the augmentation kernel reads it."""
        every_byte = torch.arange(256, dtype=torch.uint8, device=self.mean.device)[:, None]
        return self.apply(every_byte, dtype).T.contiguous()


@dataclass(frozen=True)
class DeviceData:
    """A data set on a device, its images as bytes.

    Images are uint8 ``[N, 32, 32, 3]``, labels int64 ``[N]``. On a CPU they share the memory of the data set's arrays.
    """

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    normalization: Normalization
    num_classes: int


def device_data(dataset: Dataset, device: torch.device) -> DeviceData:
    """Copy ``dataset`` to ``device`` and compute its normalization there."""
    train_images, train_labels, test_images, test_labels = (
        torch.from_numpy(getattr(dataset, name)).to(device) for name in ARRAYS
    )
    normalization = Normalization.of(train_images)
    return DeviceData(train_images, train_labels, test_images, test_labels, normalization, dataset.num_classes)
