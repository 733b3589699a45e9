"""Hand-written Triton kernels for the two operations that the project exists to fuse, one file per operator."""

from .augment import augment, normalization_table
from .batch_norm_celu import BatchNormCELU2d, batch_norm_celu

__all__ = ["BatchNormCELU2d", "augment", "batch_norm_celu", "normalization_table"]
