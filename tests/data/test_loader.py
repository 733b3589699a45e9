"""Loader: its batches equal those of the trainer, both with torch's gather and with the kernel."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DistributedSampler

from cifar_fast import Dataset, InputError, Loader, Recipe, draw_epoch
from cifar_fast.data.augment import augment
from tests.helpers import normalize, small_dataset

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
UNCHANGED = dict(augment=False, shuffle=False)


@pytest.fixture
def gather(monkeypatch):
    """Disable the kernel, so that the loader gathers with torch."""
    monkeypatch.setenv("TRITON_INTERPRET", "1" if DEVICE.type == "cuda" else "0")


@pytest.fixture(params=["gather", "few_programs"])
def either_path(request):
    request.getfixturevalue(request.param)


def trainer_batches(dataset, recipe, dtype, epochs, seed):
    """Yield the images and labels that the eager backend trains on for the same draws."""
    images, _ = normalize(dataset, DEVICE, dtype)
    labels = torch.tensor(dataset.train_labels, device=DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(seed)
    for _ in range(epochs):
        draws = draw_epoch(len(labels), device=DEVICE, recipe=recipe, generator=generator)
        for start in range(0, len(draws) - recipe.batch_size + 1, recipe.batch_size):
            batch = draws.slice(start, start + recipe.batch_size)
            yield augment(images, batch, recipe), labels[batch.permutation]


def same(ours, theirs):
    return len(ours) == len(theirs) and all(
        torch.equal(a, b) and a.dtype == b.dtype for x, y in zip(ours, theirs) for a, b in zip(x, y)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", [Recipe(batch_size=4), Recipe(batch_size=4, crop_padding=1, cutout_size=3)])
def test_two_epochs_equal_the_batches_of_the_trainer(either_path, dtype, recipe):
    dataset = small_dataset(train=10, test=6)
    loader = Loader(dataset, 4, augment=recipe, seed=3, dtype=dtype)
    batches = [*loader, *loader]
    assert same(batches, list(trainer_batches(dataset, recipe, dtype, 2, seed=3)))
    assert len(batches) == 2 * len(loader) == 4
    assert all(images.is_contiguous(memory_format=torch.channels_last) for images, _ in batches)


@pytest.mark.gpu
def test_gpu_half_precision_batches_equal_those_of_the_trainer():
    dataset, recipe = small_dataset(train=10, test=6), Recipe(batch_size=4)
    expected = list(trainer_batches(dataset, recipe, torch.float16, 1, seed=0))
    assert same([*Loader(dataset, 4, dtype="auto")], expected)


def test_same_seed_gives_same_epochs_and_leaves_default_generator_alone(small, gather):
    ours, again, other = Loader(small, 32, seed=1), Loader(small, 32, seed=1), Loader(small, 32, seed=2)
    state = torch.get_rng_state()
    first, second = list(ours), list(ours)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert same(list(again), first) and same(list(again), second)
    assert not same(first, second) and not same(list(other), first)


def test_test_split_is_complete_in_order_and_normalized_as_train(small, either_path):
    loader = Loader(small, 16, split="test")
    images, labels = (torch.cat(parts) for parts in zip(*loader))
    assert [len(batch) for _, batch in loader] == [16, 16, 8] and len(loader) == 3
    assert torch.equal(images, normalize(small, DEVICE, torch.float32)[1].permute(0, 3, 1, 2))
    assert labels.tolist() == small.test_labels.tolist()


def test_edits_show_in_the_next_epoch_and_not_in_the_dataset(either_path):
    dataset = small_dataset(train=10, test=6)
    loader, digest = Loader(dataset, 5, **UNCHANGED), dataset.digest
    clean = list(loader)
    loader.labels[3] = 7
    loader.images[4] = loader.images[0]
    (images, labels), _ = loader
    assert labels.tolist() == [0, 1, 2, 7, 1] and torch.equal(images[4], clean[0][0][0])
    assert torch.equal(images[:4], clean[0][0][:4]), "the statistics do not change"
    dataset = dataclasses.replace(dataset)  # a copy, because a data set keeps its digest
    assert dataset.digest == digest and clean[0][1].tolist() == [0, 1, 2, 0, 1], "earlier batches do not change"


def test_images_and_statistics_can_be_replaced(small, either_path):
    loader = Loader(small, 8, **UNCHANGED)
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
def test_wrong_edit_is_refused_at_the_next_epoch(small, edit, words):
    loader = Loader(small, 8)
    vars(loader).update(edit)
    with pytest.raises(InputError) as caught:
        next(iter(loader))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(split="validation"), "split must be train or test, not 'validation'"),
        (dict(batch_size=97), "96 images are fewer than one batch of 97; give a smaller batch_size"),
        (dict(batch_size=0), "batch_size must be at least 1, not 0"),
        (dict(dtype="int8"), "unknown dtype 'int8'; the choices are auto, float16, bfloat16, float32"),
        (dict(dtype=torch.float64), "unknown dtype 'float64'"),
        (dict(device="tpu"), "unknown device 'tpu'"),
        (dict(memory_format="nhwc"), "unknown memory format 'nhwc'; the choices are contiguous_format, channels_last"),
        (dict(memory_format=torch.preserve_format), "unknown memory format 'preserve_format'"),
        (dict(rank=2, world_size=2), "rank must lie in 0 to world_size - 1, which is 1, not 2"),
        (dict(rank=1), "rank must lie in 0 to world_size - 1, which is 0, not 1"),
        (dict(world_size=2), "world_size is 2, and torch.distributed is not initialized; give rank too"),
        (dict(rank=0.0, world_size=2), "rank must be a whole number, not 0.0"),
        (dict(batch_size=49, rank=0, world_size=2), "96 images are fewer than one batch of 49 for each of 2 ranks"),
    ],
)
def test_wrong_arguments_are_refused(small, arguments, words):
    with pytest.raises(InputError) as caught:
        Loader(small, **arguments)
    assert words in str(caught.value)


def test_own_loop_learns(small, gather):
    torch.manual_seed(0)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    train, test = Loader(small, 16), Loader(small, 40, split="test")
    for _ in range(30):
        for images, labels in train:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    correct = torch.cat([model(images).argmax(1) == labels for images, labels in test])
    assert np.mean(correct.tolist()) > 0.9


@pytest.mark.parametrize("memory_format", ["contiguous_format", torch.contiguous_format])
def test_batches_in_contiguous_format_have_the_same_values_and_can_be_viewed(either_path, memory_format):
    dataset = small_dataset(train=10, test=6)
    ours, theirs = list(Loader(dataset, 4, memory_format=memory_format)), list(Loader(dataset, 4))
    assert same(ours, theirs)
    assert [images.view(4, -1).shape for images, _ in ours] == [(4, 3072)] * 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_unnormalized_batches_hold_the_pixel_values_and_cut_out_the_mean_color(either_path, dtype):
    dataset = small_dataset(train=10, test=6)
    normalized, raw = Loader(dataset, 10), Loader(dataset, 10, normalize=False, dtype=dtype)
    (theirs, _), (ours, _) = next(iter(normalized)), next(iter(raw))
    mean, std = normalized.mean.view(3, 1, 1), normalized.std.view(3, 1, 1)
    cut = theirs == 0
    assert cut.any() and torch.equal(ours.float(), torch.where(cut, mean.round(), (theirs * std + mean).round()))
    (plain, _), *_ = Loader(dataset, 10, normalize=False, dtype=dtype, **UNCHANGED)
    assert torch.equal(plain, raw.images.permute(0, 3, 1, 2).to(plain.dtype))


def test_constant_channel_can_be_loaded_without_normalization(small, gather):
    images = np.zeros_like(small.train_images)
    loader = Loader(dataclasses.replace(small, train_images=images), 32, normalize=False)
    assert not any(batch.any() for batch, _ in loader)


def test_loader_keeps_the_data_set(small, gather):
    assert Loader(small, 8).dataset is small


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_an_epoch_as_torch_samplers_do(either_path, world_size):
    dataset, batch_size = small_dataset(train=17, test=11), 2
    for drop_last in (False, True):
        whole = list(Loader(dataset, 1, seed=3, drop_last=False))
        ranks = [
            Loader(dataset, batch_size, seed=3, drop_last=drop_last, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        shares = [list(loader) for loader in ranks]
        assert {len(loader) for loader in ranks} == {len(share) for share in shares} == {len(shares[0])}
        for rank, share in enumerate(shares):
            sampler = DistributedSampler(range(17), world_size, rank, shuffle=False, drop_last=drop_last)
            chosen = [whole[position] for position in sampler]
            chosen = chosen[: len(chosen) // batch_size * batch_size] if drop_last else chosen
            for k, parts in enumerate(zip(*chosen)):
                assert torch.equal(torch.cat([batch[k] for batch in share]), torch.cat(parts))


def test_ranks_share_the_test_images_in_order(gather):
    dataset = small_dataset(train=6, test=5)
    labels = [torch.cat([y for _, y in Loader(dataset, 2, split="test", rank=r, world_size=2)]) for r in range(2)]
    assert [part.tolist() for part in labels] == [dataset.test_labels[[0, 2, 4]].tolist(), [1, 0, 0]]


def ranks_of_a_group(rank, folder, dataset):
    """Write the labels that this rank gets, with a loader made before the group and one made in it."""
    before = Loader(dataset, 4, device="cpu")
    alone = len(list(before))
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    every = Loader(dataset, 4, device="cpu", world_size=1)
    labels = [
        torch.cat([y for _, y in loader]).tolist() for loader in (before, Loader(dataset, 4, device="cpu"), every)
    ]
    (folder / f"{rank}.json").write_text(json.dumps([alone, *labels]))
    torch.distributed.destroy_process_group()


@pytest.mark.nightly
def test_processes_of_a_group_get_different_images_unless_asked_otherwise(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    images, labels = small_dataset(train=24, test=6).train_images, np.arange(24)
    dataset = Dataset("npz", "many.npz", images, labels, images, labels)
    torch.multiprocessing.spawn(ranks_of_a_group, (tmp_path, dataset), nprocs=2)
    ours, theirs = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert ours[0] == theirs[0] == 6
    for k in (1, 2):
        assert len(ours[k]) == len(theirs[k]) == 12 and sorted(ours[k] + theirs[k]) == list(range(24))
    assert ours[3] == theirs[3] and sorted(ours[3]) == list(range(24))
