"""The embedded data set: ten textures, drawn rather than downloaded.

An image's class is its pattern (stripes, rings, bricks, ...). Scale, position, the two colours,
their contrast, a slow change of brightness and noise are random and say nothing about it, so that
neither a mean image nor a colour tells the classes apart, while a mirror, a small shift or a
missing square leaves the pattern what it was.

Every operation is on whole numbers, and the random numbers come from numpy's frozen
``RandomState`` streams: the same seed gives the same bytes on every machine.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cifar_fast.recipe import IMAGE_SIZE

Pattern = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def _root(square: np.ndarray) -> np.ndarray:
    """The whole part of a small whole number's square root; IEEE 754 rounds a root correctly, so it is exact."""
    return np.sqrt(square.astype(np.float32)).astype(np.int16)


# Each takes the column x and row y of a pixel, and the texture's scale s; the lowest bit of what it gives
# chooses the pixel's colour.
PATTERNS: dict[str, Pattern] = {
    "bricks": lambda x, y, s: (y % (2 * s) == 0) | ((x + y // (2 * s) * 2 * s) % (4 * s) == 0),
    "checkerboard": lambda x, y, s: x // s + y // s,
    "columns": lambda x, y, s: x // s,
    "diagonals": lambda x, y, s: (x + y) // (s + 1),
    "dots": lambda x, y, s: (x % (2 * s + 2) < s) & (y % (2 * s + 2) < s),
    "grid": lambda x, y, s: (x % (2 * s + 1) == 0) | (y % (2 * s + 1) == 0),
    "rings": lambda x, y, s: _root(x * x + y * y) // s,
    "rows": lambda x, y, s: y // s,
    "squares": lambda x, y, s: np.maximum(abs(x), abs(y)) // s,
    "zigzag": lambda x, y, s: (y + abs(x % (4 * s) - 2 * s)) // s,
}


def textures(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """``count`` images, uint8 ``[count, 32, 32, 3]``, and their labels, int64 ``[count]``, balanced and shuffled."""
    random = np.random.RandomState(seed)

    def integers(low: int, high: int, *shape: int) -> np.ndarray:
        """Uniform on ``low`` to ``high - 1``, ready to be combined with ``[count, row, column, channel]``."""
        return random.randint(low, high, (count, *shape), dtype=np.int16).reshape(
            count, *shape, *[1] * (3 - len(shape))
        )

    labels = np.arange(count, dtype=np.int64) % len(PATTERNS)
    random.shuffle(labels)
    row, column = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE].astype(np.int16)[:, None, :, :, None]
    y = row - integers(6, IMAGE_SIZE - 6)
    x = (column - integers(6, IMAGE_SIZE - 6)) * (2 * integers(0, 2) - 1)
    scale = integers(2, 5)
    ink = np.empty((count, IMAGE_SIZE, IMAGE_SIZE, 1), np.int16)
    for label, pattern in enumerate(PATTERNS.values()):
        chosen = labels == label
        ink[chosen] = pattern(x[chosen], y[chosen], scale[chosen]) & 1

    background = integers(40, 216, 1, 1, 3)
    contrast = integers(12, 72, 1, 1, 3) * (2 * integers(0, 2, 1, 1, 3) - 1)
    shade = integers(-2, 3) * (row - IMAGE_SIZE // 2) + integers(-2, 3) * (column - IMAGE_SIZE // 2)
    pixels = background + ink * contrast + shade
    pixels += integers(-40, 41, IMAGE_SIZE, IMAGE_SIZE, 3)
    return np.clip(pixels, 0, 255).astype(np.uint8), labels
