"""The synthetic data set: ten textures, generated and not downloaded.

The class of an image is its pattern (stripes, rings, bricks, ...). Scale, position, two colors, their contrast, a
brightness gradient and noise are random and independent of the class. Neither a mean image nor a color therefore tells
the classes apart. A mirror, a small shift or a missing square does not change the pattern.

All arithmetic is on integers, and numpy guarantees that the streams of ``RandomState`` never change. The same seed
therefore gives the same bytes on every machine.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cifar_fast.recipe import IMAGE_SIZE

Pattern = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def _root(square: np.ndarray) -> np.ndarray:
    """Return the integer part of the square root of a small integer. It is exact: IEEE 754 rounds roots correctly."""
    return np.sqrt(square.astype(np.float32)).astype(np.int16)


# Each function takes the column x and row y of a pixel and the scale s of the texture. The lowest bit of its result
# selects one of the two colors.
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
    """Generate images, uint8 ``[count, 32, 32, 3]``, and their labels, int64 ``[count]``, balanced and shuffled."""
    random = np.random.RandomState(seed)

    def integers(low: int, high: int, *shape: int) -> np.ndarray:
        """Draw from ``low`` to ``high - 1``, in a shape that broadcasts with ``[count, row, column, channel]``."""
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
