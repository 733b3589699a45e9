"""cifar_fast: the reference CIFAR-10 recipe, fast and trustworthy.

Importing the package does nothing and imports nothing heavy: each name below is loaded when it is
first used.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cifar_fast.augment import Draws, draw_epoch
    from cifar_fast.classifier import Classifier, load_model
    from cifar_fast.data import Dataset, load_dataset
    from cifar_fast.errors import Diverged, InputError
    from cifar_fast.loader import Loader
    from cifar_fast.model import CNN
    from cifar_fast.recipe import Recipe
    from cifar_fast.report import make_report
    from cifar_fast.results import Result
    from cifar_fast.runs import fit
    from cifar_fast.sweep import Sweep, fit_sweep

__version__ = "0.1.0"

# The kernels are installed as cifar_fast.kernels; in a checkout their folder stands beside this one.
_HERE = os.path.dirname(__file__)
if not os.path.isdir(os.path.join(_HERE, "kernels")):
    __path__.append(os.path.dirname(_HERE))

_MODULE_OF = {
    "CNN": "model",
    "Classifier": "classifier",
    "Dataset": "data",
    "Diverged": "errors",
    "Draws": "augment",
    "InputError": "errors",
    "Loader": "loader",
    "Recipe": "recipe",
    "Result": "results",
    "Sweep": "sweep",
    "draw_epoch": "augment",
    "fit": "runs",
    "fit_sweep": "sweep",
    "load_dataset": "data",
    "load_model": "classifier",
    "make_report": "report",
}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
