"""Train on your own images: files in folders, or arrays in one .npz file.

    python examples/own_images.py [DIRECTORY]

This makes a small data set of two classes in DIRECTORY (default: a temporary one), as files and as arrays. It trains on
both and shows that they contain the same data. The commands for such files are:

    cifar-fast train --dataset folder --data-dir DIRECTORY/images
    cifar-fast train --dataset npz --data-dir DIRECTORY/images.npz
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cifar_fast import Recipe, fit, load_dataset

SPLITS = {"train": 128, "test": 40}
CLASSES = ("dark", "light")


def make_images(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return noisy images, uint8 ``[n, 32, 32, 3]``, and labels ``[n]``. Class 1 is brighter."""
    random = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    images = random.integers(0, 100, (n, 32, 32, 3)) + 120 * labels[:, None, None, None]
    return images.astype(np.uint8), labels


def main() -> None:
    if len(sys.argv) > 1:
        run(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as directory:
            run(Path(directory))


def run(directory: Path) -> None:
    # Files go to images/train/CLASS/*.png and images/test/CLASS/*.png. Classes are numbered in alphabetical order, and
    # images are sorted by their names.
    arrays: dict[str, Any] = {"class_names": np.array(CLASSES)}
    for seed, (split, n) in enumerate(SPLITS.items()):
        images, labels = make_images(n, seed)
        order = np.argsort(labels, kind="stable")
        arrays |= {f"{split}_images": images[order], f"{split}_labels": labels[order]}
        for i, (image, label) in enumerate(zip(images, labels)):
            path = directory / "images" / split / CLASSES[label] / f"{i:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    # The .npz file holds the four arrays, and optionally the names of the classes.
    np.savez(directory / "images.npz", **arrays)

    folder = load_dataset("folder", directory / "images")
    npz = load_dataset("npz", directory / "images.npz")
    print(f"{len(folder.train_images)} training images of {', '.join(folder.class_names)}")
    print(f"the same data in both forms: {folder.digest == npz.digest}")

    recipe = Recipe(epochs=2, batch_size=32, widths=(4, 8, 8, 8))
    for dataset in (folder, npz):
        result = fit(recipe, dataset, log=None)
        print(f"{dataset.name}: test accuracy {result.rows[-1].test_accuracy:.2f} %")


if __name__ == "__main__":
    main()
