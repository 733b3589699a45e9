"""A seeded, stratified division of images into those to train on and those held out."""

from __future__ import annotations

import numpy as np

from cifar_fast.utils.errors import InputError


def stratified_split(labels: np.ndarray, held_out: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the images to keep and of those to hold out, each in ascending order.

    Each class has its share of the held-out images, to the nearest image, and keeps at least one image. The same labels
    and seed give the same division everywhere.

    Args:
        labels: integers ``[N]`` from 0.
        held_out: a fraction between 0 and 1, or a whole number of images from 1.
        seed: any whole number from 0.

    Raises:
        InputError: ``held_out`` leaves nothing on one side, or a class would lose all its images.
    """
    counts = np.bincount(labels)
    n, most = len(labels), int((counts - 1).clip(0).sum())
    wanted = held_out if isinstance(held_out, (int, np.integer)) else round(held_out * n) if 0 < held_out < 1 else 0
    if not 1 <= wanted <= most:
        raise InputError(
            f"must be a fraction between 0 and 1 or a number of images, and hold out 1 to {most} of the {n} images, so "
            f"that each class keeps one, not {held_out}"
        )
    shares = counts * wanted / n
    taken = np.floor(shares).astype(np.int64)
    for _ in range(int(wanted - taken.sum())):
        taken[np.where(taken < counts - 1, shares - taken, -np.inf).argmax()] += 1
    # Unlike its successor, RandomState draws the same numbers in each version of numpy.
    order = np.random.RandomState(np.random.MT19937(seed)).permutation(n)
    chosen = np.sort(np.concatenate([order[labels[order] == label][:count] for label, count in enumerate(taken)]))
    return np.delete(np.arange(n), chosen), chosen
