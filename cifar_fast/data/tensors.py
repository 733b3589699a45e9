"""A data set as tensors on a device, and its normalization."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from cifar_fast.data.dataset import Dataset


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation (with N - 1) of the training images' 0..255 values, per channel.

    ``mean`` and ``std`` are float32 ``[C]``, on the device of the images that they normalize.
    """

    mean: torch.Tensor
    std: torch.Tensor

    @classmethod
    def of(cls, images: torch.Tensor) -> Normalization:
        """Compute the statistics of uint8 images ``[N, S, S, C]``, with the bits of the reference script."""
        # In float32 the images take four times their memory. One channel at a time takes a third of that, and sums in
        # the same order as all channels of NCHW images at once.
        channel = torch.empty(images.shape[:-1], device=images.device)
        results = [torch.std_mean(channel.copy_(values), unbiased=True) for values in images.unbind(-1)]
        std, mean = (torch.stack(values) for values in zip(*results))
        return cls(mean, std)

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

    Images are uint8 ``[N, 32, 32, 3]``, labels int64 ``[N]``. On a CPU they share the memory of the data set's arrays,
    except for evaluated images of two splits: the first ``validation_count`` of them are the validation images, the
    others are the test images.
    """

    train_images: torch.Tensor
    train_labels: torch.Tensor
    evaluated_images: torch.Tensor
    evaluated_labels: torch.Tensor
    validation_count: int
    normalization: Normalization
    num_classes: int


def device_data(dataset: Dataset, device: torch.device) -> DeviceData:
    """Copy ``dataset`` to ``device`` and compute its normalization there."""

    def upload(*arrays: np.ndarray | None) -> torch.Tensor:
        tensors = [torch.from_numpy(array).to(device) for array in arrays if array is not None]
        return torch.cat(tensors) if tensors[1:] else tensors[0]

    images, labels = upload(dataset.train_images), upload(dataset.train_labels)
    evaluated_images = upload(dataset.validation_images, dataset.test_images)
    evaluated_labels = upload(dataset.validation_labels, dataset.test_labels)
    count = len(evaluated_labels) - len(dataset.test_labels)
    normalization = Normalization.of(images)
    return DeviceData(images, labels, evaluated_images, evaluated_labels, count, normalization, dataset.num_classes)
