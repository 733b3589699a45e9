"""The augmentation kernel, interpreted without a GPU and compiled with one."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cifar_fast import Recipe
from cifar_fast.data.augment import Draws
from cifar_fast.data.augment import augment as eager_augment
from cifar_fast.kernels.augment import (
    DTYPES,
    augment,
    augment_op,
    augment_reference,
    crop_offsets,
    example_launches,
    normalization_table,
)
from tests.helpers import DEVICE, normalize

pytestmark = pytest.mark.usefixtures("engine")

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class Images:
    """A data set on the device, augmented by torch or by the kernel."""

    def __init__(self, images, labels, dtype, test_images=None):
        self.images = torch.tensor(images, device=DEVICE)
        self.labels = torch.tensor(labels, device=DEVICE)
        dataset = SimpleNamespace(
            source="images", train_images=images, test_images=images if test_images is None else test_images
        )
        self.normalized, self.test_normalized = normalize(dataset, DEVICE, dtype)
        nchw = self.images.permute(0, 3, 1, 2).contiguous()  # sums over this layout have the bits of eager
        self.table = normalization_table(nchw.permute(0, 2, 3, 1), dtype)

    def eager(self, draws, padding=4, cutout_size=8, both_sides=False):
        recipe = Recipe(crop_padding=padding, cutout_size=cutout_size, crop_both_sides=both_sides)
        return eager_augment(self.normalized, draws, recipe), self.labels[draws.permutation]

    def launch(self, draws, padding=4, cutout_size=8, **options):
        settings = dict(padding=padding, cutout_size=cutout_size)
        return augment(self.images, draws.tensor, self.table, labels=self.labels, **settings, **options)


def random_images(n, size=32, channels=3, dtype=torch.float16, seed=0):
    random = np.random.RandomState(seed)
    images = random.randint(0, 256, (n, size, size, channels)).astype(np.uint8)
    images[0], images[1] = 0, 255  # no channel has the same value everywhere
    return Images(images, random.randint(0, 10, n), dtype)


def random_draws(n, images, size=32, padding=4, cutout_size=8, seed=0, both_sides=False):
    generator = torch.Generator().manual_seed(seed)
    options = (images, crop_offsets(padding, both_sides) ** 2, 2, (size + 1 - cutout_size) ** 2)
    return Draws(torch.stack([torch.randint(option, (n,), generator=generator) for option in options]).to(DEVICE))


def with_rows(draws, **rows):
    """Return ``draws`` with some of its rows replaced."""
    names = ("permutation", "crop", "flip", "cutout")
    return Draws(torch.stack([rows.get(name, getattr(draws, name)) for name in names]))


def bits(batch):
    """Return the batch as integers in NHWC, so that 0 and -0 differ and NaN equals itself."""
    return batch.permute(0, 2, 3, 1).contiguous().view(torch.int32 if batch.dtype == torch.float32 else torch.int16)


def assert_same(launched, expected):
    """Check that batch and labels are equal bit for bit, and that the batch is in channels_last."""
    assert launched[0].dtype == expected[0].dtype and launched[0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(bits(launched[0]), bits(expected[0]))
    assert torch.equal(launched[1], expected[1])


@pytest.mark.slow  # the interpreter
@every_dtype
def test_every_crop_and_flip_equals_eager(dtype, few_programs):
    images = random_images(20, dtype=dtype)
    draws = random_draws(50, 20)
    crop, flip = torch.tensor(list(itertools.product(range(25), range(2))), device=DEVICE).T.contiguous()
    draws = with_rows(draws, crop=crop, flip=flip)
    assert_same(images.launch(draws), images.eager(draws))


def test_crops_to_both_sides_are_the_windows_of_the_padded_image():
    images = random_images(3, size=6)
    crop = torch.arange(25, device=DEVICE)
    draws = with_rows(random_draws(25, 3, size=6, cutout_size=0), crop=crop, flip=torch.ones_like(crop))
    batch, _ = images.launch(draws, padding=2, cutout_size=0, both_sides=True)
    padded = F.pad(images.normalized.permute(0, 3, 1, 2)[draws.permutation], (2, 2, 2, 2), mode="reflect")
    for one, window, place in zip(batch, padded, crop.tolist()):
        x, y = divmod(place, 5)
        assert torch.equal(one, window[:, y : y + 6, x : x + 6])


@pytest.mark.slow  # the interpreter
def test_every_cutout_equals_eager(few_programs):
    images, draws = random_images(20), random_draws(625, 20)
    draws = with_rows(draws, cutout=torch.arange(625, device=DEVICE))
    assert_same(images.launch(draws), images.eager(draws))


@pytest.mark.slow  # the interpreter
def test_all_combinations_of_draws_equal_eager_on_small_images():
    images = random_images(20, size=5)
    crop, flip, cutout = torch.tensor(
        list(itertools.product(range(25), range(2), range(9))), device=DEVICE
    ).T.contiguous()
    draws = with_rows(random_draws(450, 20), crop=crop, flip=flip, cutout=cutout)
    assert_same(images.launch(draws, cutout_size=3), images.eager(draws, cutout_size=3))


@pytest.mark.slow  # the interpreter
@settings(deadline=None, max_examples=40)
@given(st.data())
def test_any_size_channels_padding_and_cutout_equals_eager(data):
    size, channels = data.draw(st.integers(1, 24), "size"), data.draw(st.integers(1, 4), "channels")
    out_channels = data.draw(st.integers(channels, 8), "out_channels")
    options = dict(
        padding=data.draw(st.integers(0, size - 1), "padding"),
        cutout_size=data.draw(st.integers(0, size), "cutout_size"),
        both_sides=data.draw(st.booleans(), "both_sides"),
    )
    dtype, seed = data.draw(st.sampled_from(DTYPES), "dtype"), data.draw(st.integers(0, 2**31), "seed")

    images = random_images(4, size, channels, dtype, seed)
    draws = random_draws(3, 4, size, **options, seed=seed)
    batch, labels = images.launch(draws, out_channels=out_channels, **options)
    assert_same(
        (batch[:, :channels].contiguous(memory_format=torch.channels_last), labels), images.eager(draws, **options)
    )
    assert batch.stride() == (size * size * out_channels, 1, size * out_channels, out_channels)
    assert not bits(batch[:, channels:]).any()
    reference = augment_reference(images.images, draws.tensor, images.table, out_channels=out_channels, **options)
    assert torch.equal(bits(batch), bits(reference))


@every_dtype
def test_real_images_and_labels_equal_eager(shared, dtype):
    with np.load(shared("data/cifar10-mini.npz")) as data:
        images = Images(data["train_images"][:500], data["train_labels"][:500].astype(np.int64), dtype)
    draws = random_draws(16, 500)
    assert_same(images.launch(draws), images.eager(draws))


@every_dtype
def test_table_equals_normalized_training_and_test_images(shared, dtype):
    with np.load(shared("data/cifar10-mini.npz")) as data:
        train, test, labels = (
            data["train_images"][:500],
            data["test_images"][:100],
            data["train_labels"][:500].astype(np.int64),
        )
    images = Images(train, labels, dtype, test)
    channel = torch.arange(3, device=DEVICE)
    for array, normalized in ((train, images.normalized), (test, images.test_normalized)):
        looked_up = images.table[channel, torch.tensor(array, device=DEVICE).int()]
        assert torch.equal(bits(looked_up.permute(0, 3, 1, 2)), bits(normalized.permute(0, 3, 1, 2)))


def test_table_refuses_a_constant_channel():
    images = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8)
    images[..., 1] = 7
    with pytest.raises(ValueError, match="same value everywhere"):
        normalization_table(images, torch.float32)


def test_step_selects_the_batch_of_the_epoch():
    images = random_images(20)
    draws = random_draws(4 * 7 + 3, 20)
    step = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    for k in range(4):
        assert_same(images.launch(draws, step=step, batch_size=7), images.eager(draws.slice(k * 7, (k + 1) * 7)))
        step += 1


@pytest.mark.parametrize(("size", "out_channels"), [(32, 3), (32, 4), (19, 3), (7, 8)])
@every_dtype
def test_writes_the_whole_output_and_nothing_else(dtype, size, out_channels, monkeypatch):
    """Allocate the results in the middle of memory filled with NaN."""
    images, draws = random_images(4, size, dtype=dtype), random_draws(2, 4, size, cutout_size=5)
    around = torch.full((4, size, size, out_channels), float("nan"), dtype=dtype, device=DEVICE)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_strided", lambda *shape, **how: around[1:3].permute(0, 3, 1, 2))
        batch, labels = images.launch(draws, out_channels=out_channels, cutout_size=5)
    assert batch.data_ptr() == around[1].data_ptr()
    assert_same(
        (batch[:, :3].contiguous(memory_format=torch.channels_last), labels), images.eager(draws, cutout_size=5)
    )
    assert not bits(batch[:, 3:]).any()
    assert around[[0, 3]].isnan().all()


def test_cutout_is_zero_even_if_the_table_is_nan():
    images = random_images(4)
    table = torch.full_like(images.table, float("nan"))
    batch, _ = augment(images.images, random_draws(2, 4).tensor, table, padding=4, cutout_size=8)
    assert (batch == 0).sum(dim=(1, 2, 3)).tolist() == [8 * 8 * 3] * 2
    assert batch.isnan().sum() == 2 * (32 * 32 - 8 * 8) * 3


def test_batch_without_labels():
    images, draws = random_images(4), random_draws(3, 4)
    batch, labels = augment(images.images, draws.tensor, images.table, padding=4, cutout_size=8)
    assert labels is None
    assert torch.equal(bits(batch), bits(images.eager(draws)[0]))


def test_images_beyond_two_gigabytes():
    n = 2**31 // 3072 + 2
    images = torch.empty(n, 32, 32, 3, dtype=torch.uint8, device=DEVICE)  # on a CPU only accessed pages take memory
    images[-1] = torch.randint(0, 256, (32, 32, 3), generator=torch.Generator().manual_seed(0))
    first = torch.zeros(4, 1, dtype=torch.int64, device=DEVICE)
    last = first.clone()
    last[0] = n - 1
    table = torch.randn(3, 256, device=DEVICE)
    batch, _ = augment(images, last, table, padding=4, cutout_size=8)
    expected = augment_reference(images[-1:], first, table, out_channels=3, padding=4, cutout_size=8)
    assert torch.equal(batch, expected)


def test_inputs_are_unchanged():
    images, draws = random_images(4), random_draws(3, 4)
    inputs = (images.images, draws.tensor, images.table, images.labels)
    before = [tensor.clone() for tensor in inputs]
    images.launch(draws)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, before, strict=True))


@pytest.mark.parametrize("optional", [True, False], ids=["labels and step", "neither"])
def test_opcheck(optional):
    images, draws = random_images(4), random_draws(2, 4)
    step = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    labels, step = (images.labels, step) if optional else (None, None)
    torch.library.opcheck(augment_op, (images.images, draws.tensor, images.table, labels, step, 2, 3, 4, 8, False))


@pytest.mark.slow  # a compiler
def test_compiles_without_graph_break():
    images, draws = random_images(8), random_draws(4, 8)
    step = torch.ones(1, dtype=torch.int64, device=DEVICE)
    settings = dict(batch_size=2, out_channels=4, padding=4, cutout_size=8)

    @torch.compile(fullgraph=True)
    def compiled(*inputs):
        batch, labels = augment(*inputs, labels=images.labels, step=step, **settings)
        return batch[:, :3].relu(), labels + 1

    batch, labels = compiled(images.images, draws.tensor, images.table)
    expected, expected_labels = images.eager(draws.slice(2, 4))
    assert torch.equal(batch, expected.relu())
    assert torch.equal(labels, expected_labels + 1)


def test_rows_of_draws_may_lie_apart():
    """A slice of the draws of an epoch is a view whose rows lie further apart than they are long."""
    images, draws = random_images(20), random_draws(12, 20)
    assert_same(images.launch(draws.slice(5, 9)), images.eager(draws.slice(5, 9)))


def test_launch_has_full_blocks_and_reads_only_the_batch():
    settings = dict(n=50_000, batch_size=512, size=32, padding=4, cutout_size=8, both_sides=False, dtype=torch.float16)
    (launch,) = example_launches(out_channels=3, **settings)
    assert launch.grid[0] == 512
    assert launch.grid[1] * launch.constants["BLOCK"] == 32 * 32 * 3
    assert launch.bytes_read == 512 * (3072 + 5 * 8) + 3 * 256 * 2 + 8
    assert launch.bytes_written == 512 * (3072 * 2 + 8)


GOOD = random_images(4, size=8)
GOOD_DRAWS = random_draws(3, 4, size=8).tensor


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(images=GOOD.images.int()), TypeError, "images must be uint8, not torch.int32"),
        (dict(images=GOOD.images[:, :7]), ValueError, r"images must be a non-empty tensor of shape \[N, S, S, C\]"),
        (dict(images=GOOD.images[:0]), ValueError, r"images must be a non-empty tensor of shape \[N, S, S, C\]"),
        (dict(images=GOOD.images.permute(0, 2, 1, 3)), ValueError, "images must be contiguous"),
        (dict(images=GOOD.images.repeat(1, 1, 1, 3)), ValueError, "images must have at most 8 channels, not 9"),
        (dict(table=GOOD.table.double()), TypeError, "table must be float16 or bfloat16 or float32, not torch.float64"),
        (dict(table=GOOD.table[:2]), ValueError, r"table must have the shape \[3, 256\], not \[2, 256\]"),
        (dict(table=GOOD.table.T.contiguous().T), ValueError, "table must be contiguous"),
        (dict(draws=GOOD_DRAWS.int()), TypeError, "each row of draws must be int64, not torch.int32"),
        (dict(draws=GOOD_DRAWS[:, :0]), ValueError, r"draws must have the shape \[4, n\] with n > 0, not \[4, 0\]"),
        (dict(draws=GOOD_DRAWS[:3]), ValueError, r"draws must have the shape \[4, n\] with n > 0, not \[3, 3\]"),
        (dict(draws=GOOD_DRAWS[0]), ValueError, r"draws must have the shape \[4, n\]"),
        (dict(draws=GOOD_DRAWS.T.contiguous().T), ValueError, "each row of draws must be contiguous"),
        (dict(draws=GOOD_DRAWS.to("meta")), RuntimeError, "each row of draws must be on .* like images, not on meta"),
        (dict(labels=GOOD.labels.int()), TypeError, "labels must be int64, not torch.int32"),
        (dict(labels=GOOD.labels[:3]), ValueError, r"labels must have the shape \[4\], not \[3\]"),
        (dict(step=GOOD.labels[:1]), ValueError, "step and batch_size must be given together"),
        (dict(batch_size=2), ValueError, "step and batch_size must be given together"),
        (dict(step=GOOD.labels[:2], batch_size=2), ValueError, r"step must have the shape \[1\], not \[2\]"),
        (dict(step=GOOD.labels[:1].int(), batch_size=2), TypeError, "step must be int64, not torch.int32"),
        (
            dict(step=GOOD.labels[:1], batch_size=4),
            ValueError,
            "batch_size must be between 1 and 3, the number of columns of draws, not 4",
        ),
        (dict(step=GOOD.labels[:1], batch_size=2.0), TypeError, "batch_size must be an int, not 2.0"),
        (dict(out_channels=2), ValueError, "out_channels must be between 3 and 8, not 2"),
        (dict(out_channels=9), ValueError, "out_channels must be between 3 and 8, not 9"),
        (dict(padding=8), ValueError, "padding must be between 0 and 7, not 8"),
        (dict(cutout_size=-1), ValueError, "cutout_size must be between 0 and 8, not -1"),
        (dict(cutout_size=2.5), TypeError, "cutout_size must be an int, not 2.5"),
    ],
)
def test_refuses_wrong_arguments_in_one_line(changes, error, message):
    inputs = dict(images=GOOD.images, draws=GOOD_DRAWS, table=GOOD.table, padding=4, cutout_size=8)
    with pytest.raises(error, match=f"^{message}.*$") as caught:
        augment(**(inputs | changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("row", "value"), [(0, -1), (0, len(GOOD.images)), (1, 25), (1, -1), (3, 25**2), (3, -1)])
def test_draws_out_of_range_are_refused_on_a_cpu(monkeypatch, row, value):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    draws = GOOD_DRAWS.cpu().clone()
    draws[row, 1] = value
    with pytest.raises(IndexError, match="column 1 of draws is out of range"):
        augment(GOOD.images.cpu(), draws, GOOD.table.cpu(), padding=4, cutout_size=8)


def test_step_after_the_last_batch_is_refused_on_a_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs = GOOD.images.cpu(), GOOD_DRAWS.cpu(), GOOD.table.cpu()
    with pytest.raises(IndexError, match="step 3 of 1 images is outside the 3 columns of draws"):
        augment(*inputs, step=torch.tensor([3]), batch_size=1, padding=4, cutout_size=8)


@pytest.mark.gpu
@pytest.mark.parametrize("out_channels", [3, 4, 8])
@every_dtype
def test_batch_of_512_equals_eager_on_a_gpu(dtype, out_channels):
    images, draws = random_images(5000, dtype=dtype), random_draws(512, 5000)
    batch, labels = images.launch(draws, out_channels=out_channels)
    assert_same((batch[:, :3].contiguous(memory_format=torch.channels_last), labels), images.eager(draws))
    assert not bits(batch[:, 3:]).any()


@pytest.mark.gpu
@every_dtype
def test_replays_of_a_graph_walk_through_the_epoch(dtype):
    images, draws = random_images(5000, dtype=dtype), random_draws(5 * 512 + 100, 5000)
    step = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles the kernel, which is not possible during capture
        images.launch(draws, step=step, batch_size=512)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = images.launch(draws, step=step, batch_size=512)
        step.add_(1)
    for _ in range(2):
        step.zero_()
        for k in range(5):
            graph.replay()
            assert_same(captured, images.eager(draws.slice(k * 512, (k + 1) * 512)))
