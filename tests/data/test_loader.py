"""Batches for a loop of one's own: those of the trainer, by the torch gather, and by the kernel where it can run."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cifar_fast import InputError, Loader, Recipe, draw_epoch
from cifar_fast.data.augment import augment
from tests.helpers import normalize, small_dataset

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
AS_GIVEN = dict(augment=False, shuffle=False)


@pytest.fixture
def gather(monkeypatch):
    """The torch gather, as where no kernel can run."""
    monkeypatch.setenv("TRITON_INTERPRET", "1" if DEVICE.type == "cuda" else "0")


@pytest.fixture(params=["gather", "few_programs"])
def either_path(request):
    request.getfixturevalue(request.param)


def fed(dataset, recipe, dtype, epochs, seed):
    """What the trainer's eager backend makes of the same draws: images and labels of each batch."""
    train_images, _ = normalize(dataset, DEVICE, dtype)
    train_labels = torch.tensor(dataset.train_labels, device=DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(seed)
    for _ in range(epochs):
        draws = draw_epoch(len(train_labels), device=DEVICE, recipe=recipe, generator=generator)
        for start in range(0, len(draws) - recipe.batch_size + 1, recipe.batch_size):
            batch = draws.slice(start, start + recipe.batch_size)
            yield augment(train_images, batch, recipe), train_labels[batch.permutation]


def same(ours, theirs):
    return len(ours) == len(theirs) and all(
        torch.equal(a, b) and a.dtype == b.dtype for x, y in zip(ours, theirs) for a, b in zip(x, y)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", [Recipe(batch_size=4), Recipe(batch_size=4, crop_padding=1, cutout_size=3)])
def test_two_epochs_are_what_the_trainer_feeds_for_the_same_draws_bit_for_bit(either_path, dtype, recipe):
    dataset = small_dataset(train=10, test=6)
    loader = Loader(dataset, 4, augment=recipe, seed=3, dtype=dtype)
    batches = [*loader, *loader]
    assert same(batches, list(fed(dataset, recipe, dtype, 2, seed=3))) and len(batches) == 2 * len(loader) == 4
    assert all(images.is_contiguous(memory_format=torch.channels_last) for images, _ in batches)


@pytest.mark.gpu
def test_on_a_gpu_half_precision_is_the_trainers_too():
    dataset, recipe = small_dataset(train=10, test=6), Recipe(batch_size=4)
    assert same([*Loader(dataset, 4, dtype="auto")], list(fed(dataset, recipe, torch.float16, 1, seed=0)))


def test_a_seed_gives_its_epochs_whatever_is_drawn_elsewhere_and_leaves_torchs_generator_alone(small, gather):
    ours, again, other = Loader(small, 32, seed=1), Loader(small, 32, seed=1), Loader(small, 32, seed=2)
    state = torch.get_rng_state()
    first, second = list(ours), list(ours)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert same(list(again), first) and same(list(again), second)
    assert not same(first, second) and not same(list(other), first)


def test_the_test_images_come_whole_in_their_order_normalized_as_the_training_images_are(small, either_path):
    loader = Loader(small, 16, split="test")
    images, labels = (torch.cat(parts) for parts in zip(*loader))
    assert [len(batch) for _, batch in loader] == [16, 16, 8] and len(loader) == 3
    assert torch.equal(images, normalize(small, DEVICE, torch.float32)[1].permute(0, 3, 1, 2))
    assert labels.tolist() == small.test_labels.tolist()


def test_edits_of_labels_and_images_show_in_the_next_epoch_and_not_in_the_data_set(either_path):
    dataset = small_dataset(train=10, test=6)
    loader, before = Loader(dataset, 5, **AS_GIVEN), dataset.digest
    clean = list(loader)
    loader.labels[3] = 7
    loader.images[4] = loader.images[0]
    (images, labels), _ = loader
    assert labels.tolist() == [0, 1, 2, 7, 1] and torch.equal(images[4], clean[0][0][0])
    assert torch.equal(images[:4], clean[0][0][:4]), "the statistics are still the data set's"
    dataset = dataclasses.replace(dataset)
    assert dataset.digest == before and clean[0][1].tolist() == [0, 1, 2, 0, 1], "a batch is the reader's"


def test_images_of_ones_own_take_the_place_of_the_data_sets_and_len_follows(small, either_path):
    loader = Loader(small, 8, **AS_GIVEN)
    loader.images, loader.labels = loader.images[:20], torch.arange(20, device=DEVICE)
    loader.mean, loader.std = torch.zeros(3, device=DEVICE), torch.full((3,), 255.0, device=DEVICE)
    images, labels = (torch.cat(parts) for parts in zip(*loader))
    assert len(loader) == 2 and labels.tolist() == list(range(16))
    assert torch.equal(images, loader.images[:16].permute(0, 3, 1, 2) / 255)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (dict(labels=torch.zeros(96, device=DEVICE)), "labels of a loader must be contiguous int64 of shape (96,) on"),
        (dict(labels=np.zeros(96, int)), "labels of a loader must be a tensor, not ndarray"),
        (dict(labels=torch.zeros(9, dtype=torch.int64, device=DEVICE)), "not int64 of shape (9,)"),
        (dict(images=torch.zeros(96, 3, 32, 32, device=DEVICE).byte()), "uint8 of shape (96, 32, 32, 3)"),
        (dict(std=torch.tensor([1.0, 0.0, 1.0], device=DEVICE)), "the same value everywhere"),
    ],
)
def test_an_edit_that_no_batch_can_be_made_of_is_refused_when_an_epoch_starts(small, edit, words):
    loader = Loader(small, 8)
    vars(loader).update(edit)
    with pytest.raises(InputError) as caught:
        next(iter(loader))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (dict(split="validation"), "split must be train or test, not 'validation'"),
        (dict(batch_size=97), "96 images are fewer than one batch of 97; give a smaller batch_size"),
        (dict(batch_size=0), "batch_size must be at least 1, not 0"),
        (dict(dtype="int8"), "unknown dtype 'int8'; there are auto, float16, bfloat16, float32"),
        (dict(dtype=torch.float64), "unknown dtype 'float64'"),
        (dict(device="tpu"), "unknown device 'tpu'"),
    ],
)
def test_what_cannot_work_is_refused(small, how, words):
    with pytest.raises(InputError) as caught:
        Loader(small, **how)
    assert words in str(caught.value)


def test_a_loop_of_ones_own_learns_and_is_scored_with_it(small, gather):
    torch.manual_seed(0)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    train, test = Loader(small, 16), Loader(small, 40, split="test")
    for _ in range(30):
        for images, labels in train:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    right = torch.cat([model(images).argmax(1) == labels for images, labels in test])
    assert np.mean(right.tolist()) > 0.9
