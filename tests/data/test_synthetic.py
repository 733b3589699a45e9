import hashlib

import numpy as np
import pytest

from cifar_fast import load_dataset
from cifar_fast.data.synthetic import PATTERNS, textures


def test_same_seed_gives_same_bytes():
    images, labels = textures(500, seed=3)
    digest = hashlib.sha256(images.tobytes() + labels.astype("<i8").tobytes()).hexdigest()
    assert digest == "178cbf11914d0b20741d0bf102f481fa4639a435578b170bc2439e2ca0a7447c"
    assert load_dataset("synthetic").digest == "734dcc32b25126b8f07e08d89f026eef1f997579bdc00071a77bfe787d6f45ff"


def test_another_seed_gives_other_images():
    assert not np.array_equal(textures(50, seed=0)[0], textures(50, seed=1)[0])


def test_classes_are_balanced_and_named():
    dataset = load_dataset("synthetic", log=None)
    assert dataset.class_names == tuple(PATTERNS)
    assert set(np.bincount(dataset.train_labels)) == {1000}
    assert set(np.bincount(dataset.test_labels)) == {200}


@pytest.mark.slow
def test_simple_rules_do_not_tell_the_classes():
    """Nearest mean image, mean color and nearest neighbor. Chance is 10 %."""
    dataset = load_dataset("synthetic", log=None)
    train, test = (
        images.reshape(len(images), -1).astype(np.float32)
        for images in (dataset.train_images, dataset.test_images[:500])
    )
    labels = dataset.test_labels[:500]

    def nearest(points, queries, classes):
        distances = (points**2).sum(1) - 2 * queries @ points.T
        return 100 * np.mean(classes[distances.argmin(1)] == labels)

    means = np.stack([train[dataset.train_labels == k].mean(0) for k in range(10)])
    assert nearest(means, test, np.arange(10)) < 25
    colors, queries = (pixels.reshape(len(pixels), -1, 3).mean(1) for pixels in (train, test))
    assert nearest(colors, queries, dataset.train_labels) < 20
    assert nearest(train, test, dataset.train_labels) < 50
