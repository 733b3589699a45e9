"""Custom models inside of torch's wrappers, and weights that do not fit."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from cifar_fast import InputError, Recipe, fit, load_model
from tests.helpers import HOW, small_dataset

RECIPE = Recipe(epochs=1, batch_size=8)


class Net(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, classes)

    def forward(self, images):
        return self.head(self.body(images).mean((2, 3)))


def compiled_in_parallel(net):
    return nn.DataParallel(torch.compile(net))


WRAPPERS = [torch.compile, nn.DataParallel, AveragedModel, compiled_in_parallel]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_wrapped_model_trains_and_loads_as_the_model_inside(tmp_path, wrap):
    dataset, start = small_dataset(train=32, test=8), Net()
    plain = fit(RECIPE, dataset, model=start, **HOW)
    wrapped = fit(RECIPE, dataset, model=wrap(start), output=tmp_path / "out", **HOW)
    made = fit(RECIPE, dataset, model=lambda: wrap(Net()), seed=5, **HOW)
    fresh = fit(RECIPE, dataset, model=Net, seed=5, **HOW)
    for ours, theirs in ((wrapped, plain), (made, fresh)):
        assert (ours.model, ours.model_digest, list(ours.state_dict)) == (
            theirs.model, theirs.model_digest, list(theirs.state_dict),
        )  # fmt: skip
        assert all(torch.equal(ours.state_dict[name], tensor) for name, tensor in theirs.state_dict.items())
    expected = load_model(tmp_path / "out", Net()).predict(dataset.test_images)
    assert torch.equal(load_model(tmp_path / "out", wrap(Net())).predict(dataset.test_images), expected)


class Inner(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        return self.net(images)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: Inner(Net()), "lacks net.body.0.weight; it has body.0.weight, which the model lacks"),
        (lambda: Net(classes=4), r"head.weight is \(3, 4\), not \(4, 4\)"),
    ],
)
def test_weights_that_do_not_fit_are_an_error_with_the_first_key(tmp_path, other, words):
    fit(RECIPE, small_dataset(train=32, test=8), model=Net, output=tmp_path / "out", **HOW)
    with pytest.raises(InputError, match=rf"model.pt: the state dict does not fit \w+: (it )?{words}") as caught:
        load_model(tmp_path / "out", other())
    assert "\n" not in str(caught.value) and "give the model that was trained" in str(caught.value)
