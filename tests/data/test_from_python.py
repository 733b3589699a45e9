"""Data sets that people have in Python: fit and Loader take them."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset, TensorDataset
from torchvision.datasets import FakeData, VisionDataset
from torchvision.transforms import v2

import cifar_fast
from cifar_fast import InputError, Loader, Recipe, fit
from cifar_fast.data.from_python import as_dataset
from tests.helpers import small_dataset

SMALL = small_dataset(train=36, test=12)
TRAIN, TEST = (SMALL.train_images, SMALL.train_labels), (SMALL.test_images, SMALL.test_labels)


class Pictures(VisionDataset):
    """A data set like torchvision's CIFAR10: arrays, class names, and PIL images as items."""

    classes = ("dark", "middle", "light")

    def __init__(self, arrays, **transforms):
        super().__init__("nowhere", **transforms)
        self.data, self.targets = arrays[0], arrays[1].tolist()

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        image, label = Image.fromarray(self.data[i]), self.targets[i]
        return self.transform(image) if self.transform else image, label


class Items(list):
    """A sequence of pairs (image, label), without arrays."""


def tensors(arrays, device="cpu"):
    return tuple(torch.from_numpy(array).to(device) for array in arrays)


def channels_first(arrays):
    return torch.from_numpy(arrays[0]).permute(0, 3, 1, 2), torch.from_numpy(arrays[1])


def items(arrays):
    return Items((Image.fromarray(image), int(label)) for image, label in zip(*arrays))


FORMS = {
    "arrays": lambda arrays: arrays,
    "tensors": tensors,
    "NCHW tensors": channels_first,
    "lists": lambda arrays: ([Image.fromarray(image) for image in arrays[0]], arrays[1].tolist()),
    "torchvision": Pictures,
    "torchvision with a transform": lambda arrays: Pictures(arrays, transform=v2.PILToTensor()),
    "subset": lambda arrays: Subset(Pictures(arrays), range(len(arrays[0]))),
    "TensorDataset": lambda arrays: TensorDataset(*tensors(arrays)),
    "items": items,
    "soft labels": lambda arrays: (arrays[0], np.eye(3)[arrays[1]]),
    "labels in a column": lambda arrays: (arrays[0], arrays[1][:, None].astype(np.uint8)),  # as Keras has them
}


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_give_the_same_data(form):
    train, test = FORMS[form](TRAIN), FORMS[form](TEST)
    dataset = as_dataset((train, test))
    assert dataset.digest == SMALL.digest == as_dataset({"train": train, "test": test}).digest
    named = form in ("torchvision", "torchvision with a transform", "subset")
    assert dataset.class_names == (Pictures.classes if named else ("0", "1", "2"))
    loader = Loader(train, 12, augment=False, shuffle=False, device="cpu")
    expected = Loader(SMALL, 12, augment=False, shuffle=False, device="cpu")
    assert torch.equal(loader.images, expected.images) and torch.equal(next(iter(loader))[0], next(iter(expected))[0])
    assert np.array_equal(Loader((train, test), 12, split="test", device="cpu").images, SMALL.test_images)


def hugging_face(arrays):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    features = {"img": datasets.Image(), "label": datasets.ClassLabel(names=list(Pictures.classes))}
    columns = {"img": [Image.fromarray(image) for image in arrays[0]], "label": arrays[1].tolist()}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def test_hugging_face_data_sets_are_read_in_their_order():
    train, test = hugging_face(TRAIN), hugging_face(TEST)
    dataset = as_dataset({"train": train, "test": test})
    assert dataset.digest == SMALL.digest and dataset.class_names == Pictures.classes
    reversed_images = as_dataset((train.select(range(35, -1, -1)), test)).train_images
    assert np.array_equal(reversed_images, SMALL.train_images[::-1])


def test_without_a_test_split_a_sixth_of_each_class_is_held_out_and_a_note_says_so():
    dataset = as_dataset(Pictures(TRAIN))
    train, test = np.bincount(dataset.train_labels), np.bincount(dataset.test_labels)
    assert train.tolist() == [10] * 3 and test.tolist() == [2] * 3
    assert dataset.notes == ("Pictures has no test split: 6 of its 36 images are held out for testing",)
    assert as_dataset(TRAIN).digest == dataset.digest
    together = np.concatenate([dataset.train_images, dataset.test_images])
    assert sorted(image.tobytes() for image in together) == sorted(image.tobytes() for image in TRAIN[0])


def test_fit_trains_on_a_torchvision_data_set(uncompiled):
    lines = []
    recipe = Recipe(epochs=1, batch_size=10, widths=(4, 8))
    result = fit(recipe, Pictures(TRAIN), backend="eager", device="cpu", dtype="float32", log=lines.append)
    (note,) = as_dataset(Pictures(TRAIN)).notes
    assert note in lines and note in result.notes and result.dataset["class_names"] == list(Pictures.classes)


FLOATS = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
WRONG = {
    "fit with a name": lambda: fit(Recipe(), "synthetic"),
    "fit with a number": lambda: fit(Recipe(), 5),
    "fit with nothing": lambda: fit(Recipe(), None),
    "fit with a class": lambda: fit(Recipe(), Pictures),
    "fit without a recipe": lambda: fit(SMALL, Recipe()),
    "fit with a dict as recipe": lambda: fit({"epochs": 1}, SMALL),
    "fit into a number": lambda: fit(Recipe(), SMALL, output=5),
    "fit from a list": lambda: fit(Recipe(), SMALL, resume=["runs/mine"]),
    "scaled images": lambda: fit(Recipe(), (TRAIN[0] / 255, TRAIN[1])),
    "a transform to floats": lambda: fit(Recipe(), Pictures(TRAIN, transform=FLOATS)),
    "other sizes": lambda: fit(Recipe(), FakeData(4, (3, 28, 28))),
    "images without labels": lambda: fit(Recipe(), TRAIN[0]),
    "images of different shapes": lambda: fit(Recipe(), ([TRAIN[0][0], TRAIN[0][0][:8]], [0, 1])),
    "a loader of torch": lambda: Loader(torch.utils.data.DataLoader(Pictures(TRAIN)), 4),
    "Loader with a name": lambda: Loader("cifar10"),
    "Loader of a test split alone": lambda: Loader(TEST, split="test"),
    "a list of results": lambda: cifar_fast.make_report([1, 2]),
    "results that are none": lambda: cifar_fast.make_report({"a": "runs/a"}),
    "the path of a sweep": lambda: cifar_fast.fit_sweep("spec.toml"),
    "a sweep without a path": lambda: cifar_fast.Sweep.load(None),
    "a recipe without a path": lambda: Recipe.load(5),
    "a model without a path": lambda: cifar_fast.load_model(None),
    "a result without a path": lambda: cifar_fast.Result.load(5),
    "a data set without a name": lambda: cifar_fast.load_dataset(None),
    "a data set in a number": lambda: cifar_fast.load_dataset("npz", 5),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_types_are_one_line(case):
    with pytest.raises(InputError) as caught:
        WRONG[case]()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400 and "object at 0x" not in message, message
