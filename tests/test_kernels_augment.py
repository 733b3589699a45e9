import importlib
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cifar_fast import Recipe
from cifar_fast.augment import Draws
from cifar_fast.augment import augment as eager_augment
from cifar_fast.backends import normalize, planar
from kernels.augment import DTYPES, augment, augment_reference, normalization_table, plan_augment
from kernels.launch import interpreted

module = importlib.import_module("kernels.augment")  # the package gives the function under this name
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class Pictures:
    """A data set on the device: its bytes, its labels, and both ways to their normalised values."""

    def __init__(self, images, labels, dtype, test_images=None):
        self.images = torch.tensor(images, device=DEVICE)
        self.labels = torch.tensor(labels, device=DEVICE)
        dataset = SimpleNamespace(source="pictures", train_images=images, test_images=images if test_images is None else test_images)
        self.normalized, self.test_normalized = normalize(dataset, DEVICE, dtype)
        self.table = normalization_table(planar(self.images), dtype)

    def eager(self, draws, padding=4, cutout_size=8):
        recipe = Recipe(crop_padding=padding, cutout_size=cutout_size)
        return eager_augment(self.normalized, draws, recipe), self.labels[draws.permutation]

    def launch(self, draws, **options):
        return augment(self.images, *choices(draws), self.table, labels=self.labels, **options)


def random_pictures(n, size=32, channels=3, dtype=torch.float16, seed=0):
    random = np.random.RandomState(seed)
    images = random.randint(0, 256, (n, size, size, channels)).astype(np.uint8)
    images[0], images[1] = 0, 255  # no channel has the same value everywhere
    return Pictures(images, random.randint(0, 10, n), dtype)


def random_draws(n, pictures, size=32, padding=4, cutout_size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    options = (pictures, (padding + 1) ** 2, 2, (size + 1 - cutout_size) ** 2)
    return Draws(*(torch.randint(option, (n,), generator=generator).to(DEVICE) for option in options))


def choices(draws):
    return draws.permutation, draws.crop, draws.flip, draws.cutout


def bits(batch):
    """The batch as integers, NHWC, so that zeros of both signs differ and NaN equals itself."""
    return batch.permute(0, 2, 3, 1).contiguous().view(torch.int32 if batch.dtype == torch.float32 else torch.int16)


def assert_same(launched, expected):
    """Batch and labels alike to the bit, the batch in channels_last."""
    assert launched[0].dtype == expected[0].dtype and launched[0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(bits(launched[0]), bits(expected[0]))
    assert torch.equal(launched[1], expected[1])


@every_dtype
def test_every_crop_with_every_flip_has_the_bits_of_the_eager_path(dtype):
    pictures = random_pictures(20, dtype=dtype)
    draws = random_draws(50, 20)
    crop, flip = torch.tensor(list(itertools.product(range(25), range(2))), device=DEVICE).T.contiguous()
    draws = Draws(draws.permutation, crop, flip, draws.cutout)
    assert_same(pictures.launch(draws), pictures.eager(draws))


@pytest.fixture
def whole_pictures(monkeypatch):
    """Under the interpreter, which takes its time for each program, a program is a whole picture."""
    if interpreted():
        monkeypatch.setattr(module, "parameters", lambda *_: {"block": 4096, "num_warps": 4})


def test_every_cutout_with_every_flip_has_the_bits_of_the_eager_path(whole_pictures):
    pictures = random_pictures(20)
    cutout, flip = torch.tensor(list(itertools.product(range(625), range(2))), device=DEVICE).T.contiguous()
    draws = random_draws(1250, 20)
    draws = Draws(draws.permutation, draws.crop, flip, cutout)
    assert_same(pictures.launch(draws), pictures.eager(draws))


@pytest.mark.slow
def test_every_crop_with_every_cutout_has_the_bits_of_the_eager_path():
    pictures = random_pictures(20, channels=1)  # colours do not matter to where a pixel comes from, and cost the interpreter time
    crop, cutout = torch.tensor(list(itertools.product(range(25), range(625))), device=DEVICE).T.contiguous()
    draws = random_draws(15625, 20)
    draws = Draws(draws.permutation, crop, draws.flip, cutout)
    for i in range(0, len(draws), 3125):
        part = draws.slice(i, i + 3125)
        assert_same(pictures.launch(part, out_channels=1), pictures.eager(part))


def test_every_crop_flip_and_cutout_together_has_the_bits_of_the_eager_path_on_small_pictures():
    pictures = random_pictures(20, size=5)
    crop, flip, cutout = torch.tensor(list(itertools.product(range(25), range(2), range(16))), device=DEVICE).T.contiguous()
    draws = Draws(random_draws(800, 20).permutation, crop, flip, cutout)
    assert_same(pictures.launch(draws, cutout_size=2), pictures.eager(draws, cutout_size=2))


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_any_size_channels_padding_and_cutout_has_the_bits_of_the_eager_path(data):
    size, channels = data.draw(st.integers(1, 24), "size"), data.draw(st.integers(1, 4), "channels")
    out_channels = data.draw(st.integers(channels, 8), "out_channels")
    options = dict(padding=data.draw(st.integers(0, size - 1), "padding"), cutout_size=data.draw(st.integers(0, size), "cutout_size"))
    dtype, seed = data.draw(st.sampled_from(DTYPES), "dtype"), data.draw(st.integers(0, 2**31), "seed")

    pictures = random_pictures(4, size, channels, dtype, seed)
    draws = random_draws(3, 4, size, **options, seed=seed)
    batch, labels = pictures.launch(draws, out_channels=out_channels, **options)
    assert_same((batch[:, :channels].contiguous(memory_format=torch.channels_last), labels), pictures.eager(draws, **options))
    assert batch.stride() == (size * size * out_channels, 1, size * out_channels, out_channels)
    assert not bits(batch[:, channels:]).any()
    reference = augment_reference(pictures.images, *choices(draws), pictures.table, out_channels=out_channels, **options)
    assert torch.equal(bits(batch), bits(reference))


@every_dtype
def test_real_pictures_and_their_labels_are_those_of_the_eager_path(shared, dtype):
    with np.load(shared("data/cifar10-mini.npz")) as data:
        pictures = Pictures(data["train_images"][:500], data["train_labels"][:500].astype(np.int64), dtype)
    draws = random_draws(16, 500)
    assert_same(pictures.launch(draws), pictures.eager(draws))


@every_dtype
def test_the_table_holds_the_bits_of_normalised_training_and_test_pictures(shared, dtype):
    with np.load(shared("data/cifar10-mini.npz")) as data:
        train, test, labels = data["train_images"][:500], data["test_images"][:100], data["train_labels"][:500].astype(np.int64)
    pictures = Pictures(train, labels, dtype, test)
    channel = torch.arange(3, device=DEVICE)
    for images, normalized in ((train, pictures.normalized), (test, pictures.test_normalized)):
        looked_up = pictures.table[channel, torch.tensor(images, device=DEVICE).int()]
        assert torch.equal(bits(looked_up.permute(0, 3, 1, 2)), bits(normalized.permute(0, 3, 1, 2)))


def test_the_table_of_a_channel_with_one_value_is_refused():
    images = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8)
    images[..., 1] = 7
    with pytest.raises(ValueError, match="same value everywhere"):
        normalization_table(images, torch.float32)


def test_a_step_counter_walks_through_the_epochs_batches():
    pictures = random_pictures(20)
    draws = random_draws(4 * 7 + 3, 20)
    step = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    for k in range(4):
        assert_same(pictures.launch(draws, step=step, batch_size=7), pictures.eager(draws.slice(k * 7, (k + 1) * 7)))
        step += 1


@pytest.mark.parametrize(("size", "out_channels"), [(32, 3), (32, 4), (19, 3), (7, 8)])
@every_dtype
def test_every_element_of_the_output_is_written_and_none_beside_it(dtype, size, out_channels):
    pictures, draws = random_pictures(4, size, dtype=dtype), random_draws(2, 4, size, cutout_size=5)
    around = torch.full((4, size, size, out_channels), float("nan"), dtype=dtype, device=DEVICE)
    labels_around = torch.full((4,), -1, device=DEVICE)
    out, out_labels = around[1:3].permute(0, 3, 1, 2), labels_around[1:3]
    batch, labels = pictures.launch(draws, out=out, out_labels=out_labels, out_channels=out_channels, cutout_size=5)
    assert batch is out and labels is out_labels
    assert_same((batch[:, :3].contiguous(memory_format=torch.channels_last), labels), pictures.eager(draws, cutout_size=5))
    assert not bits(batch[:, 3:]).any()
    assert around[[0, 3]].isnan().all() and labels_around[[0, 3]].tolist() == [-1, -1]


def test_a_cutout_is_zero_whatever_the_table_holds():
    pictures = random_pictures(4)
    batch, _ = augment(pictures.images, *choices(random_draws(2, 4)), torch.full_like(pictures.table, float("nan")))
    assert (batch == 0).sum(dim=(1, 2, 3)).tolist() == [8 * 8 * 3] * 2
    assert batch.isnan().sum() == 2 * (32 * 32 - 8 * 8) * 3


def test_without_labels_the_batch_is_the_same_and_there_are_none():
    pictures, draws = random_pictures(4), random_draws(3, 4)
    batch, labels = augment(pictures.images, *choices(draws), pictures.table)
    assert labels is None
    assert torch.equal(bits(batch), bits(pictures.eager(draws)[0]))


def test_pictures_beyond_two_gigabytes_are_found():
    n = 2**31 // 3072 + 2
    images = torch.empty(n, 32, 32, 3, dtype=torch.uint8, device=DEVICE)  # of which only what is touched takes memory, on a CPU
    images[-1] = torch.randint(0, 256, (32, 32, 3), generator=torch.Generator().manual_seed(0))
    indices, zero = torch.tensor([n - 1], device=DEVICE), torch.tensor([0], device=DEVICE)
    table = torch.randn(3, 256, device=DEVICE)
    batch, _ = augment(images, indices, zero, zero, zero, table)
    assert torch.equal(batch, augment_reference(images[-1:], zero, zero, zero, zero, table))


def test_the_data_set_and_the_choices_are_not_written_to():
    pictures, draws = random_pictures(4), random_draws(3, 4)
    inputs = (pictures.images, *choices(draws), pictures.table, pictures.labels)
    before = [tensor.clone() for tensor in inputs]
    pictures.launch(draws)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, before, strict=True))


@pytest.mark.parametrize("optional", [True, False], ids=["labels and step", "neither"])
def test_the_operator_keeps_torchs_contract(optional):
    pictures, draws = random_pictures(4), random_draws(2, 4)
    step = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    labels, step, out_labels = (pictures.labels, step, torch.zeros_like(draws.crop)) if optional else (None, None, None)
    out = torch.zeros(2, 32, 32, 3, dtype=torch.float16, device=DEVICE)
    arguments = (pictures.images, *choices(draws), pictures.table, labels, step, out, out_labels, 4, 8)
    torch.library.opcheck(torch.ops.cifar_fast.augment.default, arguments)


@every_dtype
def test_it_compiles_without_a_graph_break(dtype):
    pictures, draws = random_pictures(8, dtype=dtype), random_draws(4, 8)
    step = torch.ones(1, dtype=torch.int64, device=DEVICE)

    @torch.compile(fullgraph=True)
    def compiled(*inputs):
        batch, labels = augment(*inputs, labels=pictures.labels, step=step, batch_size=2, out_channels=4)
        return batch[:, :3].relu(), labels + 1

    batch, labels = compiled(pictures.images, *choices(draws), pictures.table)
    expected, expected_labels = pictures.eager(draws.slice(2, 4))
    assert torch.equal(batch, expected.relu())
    assert torch.equal(labels, expected_labels + 1)


def test_a_plan_of_meta_tensors_is_one_launch_of_whole_blocks():
    def meta(*shape, dtype=torch.int64):
        return torch.empty(shape, dtype=dtype, device="meta")

    images, table = meta(50_000, 32, 32, 3, dtype=torch.uint8), meta(3, 256, dtype=torch.float16)
    drawn = [meta(50_000) for _ in range(4)]
    (launch,) = plan_augment(images, *drawn, table, meta(512, 32, 32, 3, dtype=torch.float16), step=meta(1))
    assert launch.grid[0] == 512
    assert launch.grid[1] * launch.constants["BLOCK"] == 32 * 32 * 3
    batch, labels = augment(images, *drawn, table, labels=meta(50_000), step=meta(1), batch_size=512)
    assert batch.shape == (512, 3, 32, 32) and labels.shape == (512,)


GOOD = random_pictures(4, size=8)
GOOD_DRAWS = random_draws(3, 4, size=8)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(images=GOOD.images.int()), TypeError, "images must be uint8, not torch.int32"),
        (dict(images=GOOD.images[:, :7]), ValueError, r"images must have the shape \[N, S, S, C\]"),
        (dict(images=GOOD.images[:0]), ValueError, r"images must have the shape \[N, S, S, C\], none of them 0"),
        (dict(images=GOOD.images.permute(0, 2, 1, 3)), ValueError, "images must be contiguous"),
        (dict(images=GOOD.images.repeat(1, 1, 1, 3)), ValueError, "images must have at most 8 channels, not 9"),
        (dict(table=GOOD.table.double()), TypeError, "table must be float16, bfloat16 or float32, not torch.float64"),
        (dict(table=GOOD.table[:2]), ValueError, r"table must have the shape \[3, 256\], not \[2, 256\]"),
        (dict(table=GOOD.table.T.contiguous().T), ValueError, "table must be contiguous"),
        (dict(indices=GOOD_DRAWS.permutation.int()), TypeError, "indices must be torch.int64, not torch.int32"),
        (dict(indices=GOOD_DRAWS.permutation[:0]), ValueError, "indices must not be empty"),
        (dict(indices=GOOD_DRAWS.permutation[None]), ValueError, r"indices must have the shape \[3\], not \[1, 3\]"),
        (dict(crop=GOOD_DRAWS.crop[:2]), ValueError, r"crop must have the shape \[3\], not \[2\]"),
        (dict(flip=GOOD_DRAWS.flip.bool()), TypeError, "flip must be torch.int64, not torch.bool"),
        (dict(cutout=GOOD_DRAWS.cutout.repeat(2)[::2]), ValueError, "cutout must be contiguous"),
        (dict(crop=GOOD_DRAWS.crop.to("meta")), RuntimeError, "crop must be on .*, as images are, not on meta"),
        (dict(labels=GOOD.labels.int()), TypeError, "labels must be torch.int64"),
        (dict(labels=GOOD.labels[:3]), ValueError, r"labels must have the shape \[4\], not \[3\]"),
        (dict(out_labels=GOOD_DRAWS.crop.clone()), ValueError, "out_labels needs labels"),
        (dict(labels=GOOD.labels, out_labels=GOOD.labels), ValueError, r"out_labels must have the shape \[3\], not \[4\]"),
        (dict(out=GOOD.normalized.permute(0, 3, 1, 2)), ValueError, r"out must have the shape \[3, 3, 8, 8\], not \[4, 3, 8, 8\]"),
        (dict(out=GOOD.normalized[:3].permute(0, 3, 1, 2).contiguous()), ValueError, "out must be NHWC in memory"),
        (dict(out=GOOD.normalized[:3].permute(0, 3, 1, 2).float()), TypeError, "out must be torch.float16, not torch.float32"),
        (dict(step=GOOD.labels[:1]), ValueError, "step and batch_size must be given together"),
        (dict(batch_size=2), ValueError, "step and batch_size must be given together"),
        (dict(step=GOOD.labels[:2], batch_size=2), ValueError, r"step must have the shape \[1\], not \[2\]"),
        (dict(step=GOOD.labels[:1].int(), batch_size=2), TypeError, "step must be torch.int64, not torch.int32"),
        (dict(step=GOOD.labels[:1], batch_size=4), ValueError, "batch_size must lie in 1 to 3, the length of indices, not 4"),
        (dict(step=GOOD.labels[:1], batch_size=2.0), TypeError, "batch_size must be an int, not 2.0"),
        (dict(out_channels=2), ValueError, "out_channels must lie in 3 to 8, not 2"),
        (dict(out_channels=9), ValueError, "out_channels must lie in 3 to 8, not 9"),
        (dict(padding=8), ValueError, "padding must lie in 0 to 7, not 8"),
        (dict(cutout_size=-1), ValueError, "cutout_size must lie in 0 to 8, not -1"),
        (dict(cutout_size=2.5), TypeError, "cutout_size must be an int, not 2.5"),
    ],
)
def test_what_cannot_be_right_is_refused_in_a_line(changes, error, message):
    names = ("images", "indices", "crop", "flip", "cutout", "table")
    inputs = dict(zip(names, (GOOD.images, *choices(GOOD_DRAWS), GOOD.table), strict=True))
    with pytest.raises(error, match=f"^{message}.*$") as caught:
        augment(**(inputs | changes))
    assert "\n" not in str(caught.value)


def test_a_cpu_tensor_without_the_interpreter_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        augment(*(tensor.cpu() for tensor in (GOOD.images, *choices(GOOD_DRAWS), GOOD.table)))


@pytest.mark.gpu
@pytest.mark.parametrize("out_channels", [3, 4, 8])
@every_dtype
def test_on_a_gpu_a_batch_of_512_has_the_bits_of_the_eager_path(dtype, out_channels):
    pictures, draws = random_pictures(5000, dtype=dtype), random_draws(512, 5000)
    batch, labels = pictures.launch(draws, out_channels=out_channels)
    assert_same((batch[:, :3].contiguous(memory_format=torch.channels_last), labels), pictures.eager(draws))
    assert not bits(batch[:, 3:]).any()


@pytest.mark.gpu
@every_dtype
def test_on_a_gpu_replays_of_a_captured_launch_walk_through_the_epoch(dtype):
    pictures, draws = random_pictures(5000, dtype=dtype), random_draws(5 * 512 + 100, 5000)
    step = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles the kernel, which a capture cannot
        pictures.launch(draws, step=step, batch_size=512)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = pictures.launch(draws, step=step, batch_size=512)
        step.add_(1)
    for _ in range(2):
        step.zero_()
        for k in range(5):
            graph.replay()
            assert_same(captured, pictures.eager(draws.slice(k * 512, (k + 1) * 512)))
