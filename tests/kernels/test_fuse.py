"""Exchange of torch's modules for the fused norm, and back."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from cifar_fast.kernels import BatchNormAct2d, fuse_norms, unfuse_norms
from tests.helpers import DEVICE

pytestmark = pytest.mark.usefixtures("engine", "few_programs")


class Network(nn.Module):
    """One norm has a name of its own and is used twice, the other is inside a Sequential."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = BatchNormAct2d(4, eps=1e-3, momentum=None, alpha=0.1, pool=2)
        self.rest = nn.Sequential(nn.Conv2d(4, 4, 1), BatchNormAct2d(4, affine=False, alpha=0.2), nn.Conv2d(4, 4, 1))

    def forward(self, x):
        return self.norm(self.rest(self.norm(self.conv(x))))


def network():
    torch.manual_seed(0)
    model = Network().to(DEVICE)
    model.norm.weight.data.uniform_(0.5, 1.5)
    return model


IMAGES = torch.randn(3, 3, 10, 10, generator=torch.Generator().manual_seed(0)).to(DEVICE)


@pytest.mark.parametrize("training", [True, False])
def test_unfused_model_computes_the_same(training):
    fused, plain = (model.train(training) for model in (network(), unfuse_norms(network())))
    for _ in range(2):
        ys = [model(IMAGES) for model in (fused, plain)]
        torch.testing.assert_close(*ys, rtol=1e-4, atol=1e-5)
        for y in ys:
            y.square().sum().backward()
    for mine, its in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad, rtol=1e-3, atol=1e-4)
    for mine, its in zip(fused.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(module, BatchNormAct2d) for module in plain.modules())


def test_there_and_back_keeps_names_tensors_options_and_modes():
    model = network()
    model.norm.eval()
    model.norm.bias.requires_grad_(False)
    before, shown = dict(model.named_parameters()) | dict(model.named_buffers()), repr(model)
    assert unfuse_norms(model) is model and fuse_norms(unfuse_norms(model)) is model
    after = dict(model.named_parameters()) | dict(model.named_buffers())
    assert list(after) == list(before) and all(after[name] is tensor for name, tensor in before.items())
    assert repr(model) == shown and not model.norm.training and model.rest[1].training
    assert not model.norm.bias.requires_grad


@pytest.mark.parametrize("pool", [1, 2])
def test_a_lone_norm_is_replaced_there_and_back(pool):
    norm = BatchNormAct2d(4, alpha=0.1, pool=pool)
    plain = unfuse_norms(norm)
    assert [type(module) for module in plain] == [*[nn.MaxPool2d] * (pool - 1), nn.BatchNorm2d, nn.CELU]
    back = fuse_norms(plain)
    assert repr(back) == repr(norm) and back.weight is norm.weight


def test_a_module_used_twice_stays_one_module():
    norm = BatchNormAct2d(4, alpha=0.1)
    model = nn.ModuleDict({"first": norm, "second": nn.Sequential(norm)})
    unfuse_norms(model)
    assert model["first"] is model["second"][0]
    fuse_norms(model)
    assert model["first"] is model["second"][0] and type(model["first"]) is BatchNormAct2d


def test_fuses_any_sequential_under_the_same_names():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.BatchNorm2d(4), nn.CELU(0.1), nn.BatchNorm2d(4), nn.CELU(0.2)
    plain = nn.Sequential(*layers).to(DEVICE)
    fused = fuse_norms(copy.deepcopy(plain))
    kinds = [type(layer) for layer in fused]
    assert kinds == [nn.Conv2d, nn.Identity, BatchNormAct2d, nn.Identity, BatchNormAct2d, nn.Identity]
    assert (fused[2].pool, fused[2].alpha, fused[4].pool, fused[4].alpha) == (2, 0.1, 1, 0.2)
    assert list(fused.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(fused(IMAGES), plain(IMAGES), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("layers", "pool"),
    [
        ((nn.MaxPool2d(3), nn.BatchNorm2d(3), nn.CELU()), 1),
        ((nn.MaxPool2d(2, stride=1), nn.BatchNorm2d(3), nn.CELU()), 1),
        ((nn.MaxPool2d(2, padding=1), nn.BatchNorm2d(3), nn.CELU()), 1),
        ((nn.MaxPool2d(2, ceil_mode=True), nn.BatchNorm2d(3), nn.CELU()), 1),
        ((nn.MaxPool2d((2, 2)), nn.BatchNorm2d(3), nn.CELU()), 2),
        ((nn.BatchNorm2d(3), nn.Hardswish()), None),
        ((nn.BatchNorm2d(3, eps=0), nn.CELU()), None),
        ((nn.BatchNorm2d(3), nn.CELU(-1.0)), None),
        ((nn.SyncBatchNorm(3), nn.CELU()), None),
    ],
    ids=str,
)
def test_fuses_only_what_the_kernel_computes(layers, pool):
    fused = fuse_norms(nn.Sequential(*layers))
    assert [layer.pool for layer in fused if isinstance(layer, BatchNormAct2d)] == ([] if pool is None else [pool])
    assert pool == 2 or type(fused[0]) is type(layers[0]) or type(layers[0]) is nn.BatchNorm2d


def test_tools_take_the_unfused_model():
    model = unfuse_norms(network()).eval()
    expected = model(IMAGES)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(IMAGES), expected)
    torch.testing.assert_close(torch.export.export(model, (IMAGES,)).module()(IMAGES), expected)
    folded = fuse_conv_bn_eval(model.rest[0], model.rest[1].norm)
    assert isinstance(folded, nn.Conv2d)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in converted.modules()) == 2
