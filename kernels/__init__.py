"""Triton kernels of a training step, one file per operator."""

if __name__ != "cifar_fast.kernels":
    # A second copy of these modules would register the same operator names again, which torch refuses.
    raise ImportError("import cifar_fast.kernels, not kernels")

from .augment import augment, normalization_table
from .batch_norm_act import BatchNormAct2d, batch_norm_act
from .cross_entropy import cross_entropy
from .fuse import fuse_norms, unfuse_norms
from .record_step import StepState, record

__all__ = [
    "BatchNormAct2d",
    "StepState",
    "augment",
    "batch_norm_act",
    "cross_entropy",
    "fuse_norms",
    "normalization_table",
    "record",
    "unfuse_norms",
]
