"""The stratified division of images."""

import numpy as np
import pytest

from cifar_fast import InputError
from cifar_fast.data.split import stratified_split


@pytest.mark.parametrize(("held_out", "expected"), [(0.2, [20, 2, 1]), (23, [20, 2, 1]), (1, [1, 0, 0])])
def test_each_class_holds_out_its_share(held_out, expected):
    labels = np.random.RandomState(0).permutation(np.repeat([0, 1, 2], [100, 10, 5]))
    kept, chosen = stratified_split(labels, held_out, seed=3)
    assert np.bincount(labels[chosen], minlength=3).tolist() == expected
    assert sorted([*kept, *chosen]) == list(range(115)) and (np.diff(kept) > 0).all() and (np.diff(chosen) > 0).all()


def test_split_follows_the_seed_alone():
    labels = np.arange(60) % 3
    first, again, other = (stratified_split(labels, 0.5, seed)[1].tolist() for seed in (2**62, 2**62, 1))
    assert first == again != other
    assert stratified_split(np.arange(12) % 2, 4, 0)[1].tolist() == [0, 1, 6, 7]  # in any version of numpy


def test_each_class_keeps_an_image():
    labels = np.array([0, 0, 0, 1, 2])
    kept, _ = stratified_split(labels, 2, seed=0)
    assert sorted(labels[kept]) == [0, 1, 2]
    for held_out in (3, 0, -1, 0.0, 1.0, 1.5, 0.9, float("nan")):
        with pytest.raises(InputError, match="hold out 1 to 2 of the 5 images, so that each class keeps one"):
            stratified_split(labels, held_out, seed=0)
