"""Exchange of torch's max-pool, batch norm and activation for :class:`BatchNormAct2d`, and back."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from .batch_norm_act import BatchNormAct2d

ModelType = TypeVar("ModelType", bound=nn.Module)


class UnfusedNorm(nn.Sequential):
    """Torch's own modules for the options and the tensors of a :class:`BatchNormAct2d`."""

    def __init__(self, fused: BatchNormAct2d) -> None:
        super().__init__()
        if fused.pool > 1:
            self.add_module("pool", nn.MaxPool2d(fused.pool))
        self.add_module("norm", _with_tensors_of(fused, nn.BatchNorm2d(*_options(fused, fused.epsilon), device="meta")))
        self.add_module("activation", make_activation(fused.activation, fused.alpha))
        self.train(fused.training)


def make_activation(name: str, alpha: float) -> nn.Module:
    """Return torch's module for the activation ``name`` of :func:`batch_norm_act`."""
    if name == "celu":
        return nn.CELU(alpha)
    modules = {"none": nn.Identity, "relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU}
    return nn.GELU(approximate="tanh") if name == "gelu_tanh" else modules[name]()


def activation_options(module: nn.Module) -> dict[str, Any] | None:
    """Return the options ``activation`` and ``alpha`` for torch's ``module``, or None for any other module."""
    if type(module) is nn.CELU:
        return dict(activation="celu", alpha=module.alpha) if module.alpha > 0 else None
    if type(module) is nn.GELU:
        return dict(activation="gelu_tanh" if module.approximate == "tanh" else "gelu")
    names: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.SiLU: "silu"}
    return dict(activation=names[type(module)]) if type(module) in names else None


def unfuse_norms(model: ModelType) -> ModelType | UnfusedNorm:
    """Replace each :class:`BatchNormAct2d` of ``model`` in place by torch's modules, and return ``model``.

    This serves tools that read, replace or translate torch's own modules: ``torch.fx``, feature extractors, ONNX,
    quantization, ``SyncBatchNorm``. :func:`fuse_norms` undoes it.

    The norm ``NAME`` becomes a ``Sequential`` of ``pool`` (if there is a max-pool), ``norm`` and ``activation``. Its
    weight is then called ``NAME.norm.weight``. Parameters and buffers remain the same objects, so optimizers keep
    working. Hooks of the replaced modules are lost. If ``model`` itself is such a norm, the result is another module.
    """
    return _replace(model, lambda module: UnfusedNorm(module) if type(module) is BatchNormAct2d else module)


def fuse_norms(model: ModelType) -> ModelType | BatchNormAct2d:
    """Put :class:`BatchNormAct2d` into ``model`` in place, and return ``model``.

    This undoes :func:`unfuse_norms`. In any other ``Sequential`` it also replaces each ``BatchNorm2d`` with a ``CELU``,
    ``ReLU``, ``GELU`` or ``SiLU`` after it, and a ``MaxPool2d(2)`` before it if there is one. There the names of the
    tensors do not change, because an ``Identity`` takes the place of the pool and of the activation. Parameters and
    buffers remain the same objects.
    """

    def fuse(module: nn.Module) -> nn.Module:
        if not isinstance(module, nn.Sequential):
            return module
        names, layers = list(module._modules), list(module)
        for i, (norm, activation) in enumerate(itertools.pairwise(layers)):
            options = activation_options(activation)
            if isinstance(module, UnfusedNorm) and type(activation) is nn.Identity:
                options = dict(activation="none")
            if options is None or type(norm) is not nn.BatchNorm2d or norm.eps <= 0:
                continue
            has_pool = i > 0 and _is_pool(layers[i - 1])
            options |= dict(pool=2 if has_pool else 1, device="meta")
            fused = _with_tensors_of(norm, BatchNormAct2d(*_options(norm, norm.eps), **options))
            if isinstance(module, UnfusedNorm):
                return fused
            module.add_module(names[i], fused)
            for k in (i - 1, i + 1) if has_pool else (i + 1,):
                module.add_module(names[k], nn.Identity().train(layers[k].training))
        return module

    return _replace(model, fuse)


def _replace(model: nn.Module, change: Callable[[nn.Module], nn.Module]):
    """Replace every module of ``model`` by ``change`` of it, inner modules first, and each module once."""
    changed: dict[nn.Module, nn.Module] = {}

    def visit(module: nn.Module) -> nn.Module:
        if module not in changed:
            for name, child in list(module._modules.items()):
                if child is not None and (new := visit(child)) is not child:
                    module.add_module(name, new)
            changed[module] = change(module)
        return changed[module]

    return visit(model)


def _options(norm: nn.BatchNorm2d, eps: float) -> tuple[int, float, float | None, bool, bool]:
    return norm.num_features, eps, norm.momentum, norm.affine, norm.track_running_stats


NormType = TypeVar("NormType", bound=nn.BatchNorm2d)


def _with_tensors_of(source: nn.BatchNorm2d, norm: NormType) -> NormType:
    """Return ``norm`` with the tensors and the mode of ``source``."""
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        setattr(norm, name, getattr(source, name))
    return norm.train(source.training)


def _is_pool(layer: nn.Module) -> bool:
    """Return whether ``layer`` is a max-pool of 2 x 2 windows side by side."""
    if type(layer) is not nn.MaxPool2d or layer.return_indices or layer.ceil_mode:
        return False
    sizes = layer.kernel_size, layer.stride, layer.padding, layer.dilation
    return all(size in (value, (value, value)) for size, value in zip(sizes, (2, 2, 0, 1)))
