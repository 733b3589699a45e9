import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cifar_fast import Recipe, draw_epoch
from cifar_fast.data.augment import Draws, augment

SIZE = 32


def one_by_one(images, draws, padding, cutout):
    """Apply the transformations of the reference to one image [S, S, C] after the other; return [B, C, S, S]."""
    result = []
    for k in range(len(draws)):
        image = images[draws.permutation[k]].permute(2, 0, 1)[None]
        x, y = divmod(int(draws.crop[k]), padding + 1)
        image = F.pad(image, (padding,) * 4, mode="reflect")[..., y : y + SIZE, x : x + SIZE]
        if draws.flip[k] == 0:
            image = image.flip(-1)
        x, y = divmod(int(draws.cutout[k]), SIZE - cutout + 1)
        image = image.clone()
        image[..., y : y + cutout, x : x + cutout] = 0
        result.append(image)
    return torch.cat(result)


def random_images(n, channels=3, seed=0):
    return torch.randn(n, SIZE, SIZE, channels, generator=torch.Generator().manual_seed(seed))


@pytest.mark.slow
def test_all_pairs_of_choices_match_reference():
    """Every pair of crop and cutout, crop and flip, flip and cutout; the third choice varies."""
    generator = torch.Generator().manual_seed(0)
    pairs = [(c, i % 2, k) for i, (c, k) in enumerate(itertools.product(range(25), range(625)))]
    pairs += [(c, f, k) for c, f, k in itertools.product(range(25), range(2), range(0, 625, 13))]
    pairs += [((f + k) % 25, f, k) for f, k in itertools.product(range(2), range(625))]
    crop, flip, cutout = torch.tensor(pairs).T.contiguous()
    images = random_images(50)
    draws = Draws(torch.stack((torch.randint(50, (len(pairs),), generator=generator), crop, flip, cutout)))
    for i in range(0, len(pairs), 2000):
        part = draws.slice(i, i + 2000)
        assert torch.equal(augment(images, part, Recipe()), one_by_one(images, part, 4, 8))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 31), st.integers(0, 32), st.integers(1, 4), st.integers(0, 2**31))
def test_other_padding_cutout_and_channels_match_reference(padding, cutout, channels, seed):
    torch.manual_seed(seed)
    recipe = Recipe(crop_padding=padding, cutout_size=cutout)
    draws = draw_epoch(9, device="cpu", recipe=recipe)
    images = random_images(9, channels, seed)
    batch = augment(images, draws, recipe)
    assert torch.equal(batch, one_by_one(images, draws, padding, cutout))
    assert batch.is_contiguous(memory_format=torch.channels_last)


def test_augment_leaves_dataset_unchanged():
    images = random_images(20)
    before = images.clone()
    augment(images, draw_epoch(20, device="cpu"), Recipe())
    assert torch.equal(images, before)


def test_images_are_only_shuffled_without_crop_flip_and_cutout():
    recipe = Recipe(crop_padding=0, flip=False, cutout_size=0)
    images = random_images(20)
    draws = draw_epoch(20, device="cpu", recipe=recipe)
    assert torch.equal(augment(images, draws, recipe), images[draws.permutation].permute(0, 3, 1, 2))


def test_draws_are_the_four_calls_of_the_reference():
    torch.manual_seed(11)
    expected = torch.randperm(100), torch.randint(25, (100,)), torch.randint(2, (100,)), torch.randint(625, (100,))
    torch.manual_seed(11)
    draws = draw_epoch(100, device="cpu")
    for drawn, call in zip((draws.permutation, draws.crop, draws.flip, draws.cutout), expected, strict=True):
        assert torch.equal(drawn, call)


@pytest.mark.gpu
def test_gpu_batch_equals_cpu_batch():
    draws = draw_epoch(64, device="cuda")
    on_cpu = Draws(draws.tensor.cpu())
    images = random_images(64)
    assert torch.equal(augment(images.cuda(), draws, Recipe()).cpu(), augment(images, on_cpu, Recipe()))
