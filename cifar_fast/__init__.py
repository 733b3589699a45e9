"""cifar_fast: the reference CIFAR-10 recipe, fast and trustworthy.

Importing the package does nothing and imports nothing heavy: each name below is loaded when it is
first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cifar_fast.data.augment import Draws, draw_epoch
    from cifar_fast.data.dataset import Dataset
    from cifar_fast.data.loader import Loader
    from cifar_fast.data.sources import load_dataset
    from cifar_fast.experiments.report import make_report, welch
    from cifar_fast.experiments.sweep import Sweep, fit_sweep
    from cifar_fast.inference.classifier import Classifier, load_model
    from cifar_fast.inference.export import export_model
    from cifar_fast.model import CNN
    from cifar_fast.recipe import Recipe
    from cifar_fast.training.fit import fit
    from cifar_fast.training.metrics import confidence_interval_95
    from cifar_fast.training.results import Result
    from cifar_fast.utils.errors import Diverged, InputError, StopTraining

__version__ = "0.1.0"

_MODULE_OF = {
    "CNN": "model",
    "Classifier": "inference.classifier",
    "Dataset": "data.dataset",
    "Diverged": "utils.errors",
    "Draws": "data.augment",
    "InputError": "utils.errors",
    "Loader": "data.loader",
    "Recipe": "recipe",
    "Result": "training.results",
    "StopTraining": "utils.errors",
    "Sweep": "experiments.sweep",
    "confidence_interval_95": "training.metrics",
    "draw_epoch": "data.augment",
    "export_model": "inference.export",
    "fit": "training.fit",
    "fit_sweep": "experiments.sweep",
    "load_dataset": "data.sources",
    "load_model": "inference.classifier",
    "make_report": "experiments.report",
    "welch": "experiments.report",
}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
