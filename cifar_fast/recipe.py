"""The reference recipe as data: the only place with its constants."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np

from cifar_fast.utils.errors import InputError, did_you_mean, option
from cifar_fast.utils.files import as_path

BACKENDS = ("eager", "compiled", "fused")
DTYPES = ("float16", "bfloat16", "float32")
MEMORY_FORMATS = ("contiguous_format", "channels_last")
ACTIVATIONS = ("celu", "relu", "gelu", "silu")

IMAGE_SIZE = 32
"""Height and width of an image, in pixels."""

IMAGE_CHANNELS = 3

MAX_INTEGER = 2**31 - 1
"""The largest integer in a recipe; torch and the kernels can index with it."""


def _constant(default: Any, help: str, choices: tuple[str, ...] | None = None, item: Any = None) -> Any:
    """Return a field. ``item`` is an example item, or several of different types, if the default is an empty tuple."""
    item = default[0] if isinstance(default, tuple) and default else item
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "item": item})


@dataclass(frozen=True)
class Block:
    """Shape of a convolution block: 3x3 convolution, optional 2x2 max-pool, batch norm, activation.

    ``index`` counts from 1. ``c_in`` and ``c_out`` are the channels of the convolution. ``size`` is the height and
    width of its input and output in pixels. ``pool`` is 2 if the max-pool follows, else 1.
    """

    index: int
    c_in: int
    c_out: int
    size: int
    pool: int

    @property
    def out_size(self) -> int:
        """Height and width of the block's output, in pixels."""
        return self.size // self.pool

    @property
    def keeps_shape(self) -> bool:
        """True if output and input have the same shape: the same number of channels, hence no max-pool."""
        return self.c_in == self.c_out

    @property
    def name(self) -> str:
        """The shape of the convolution's output and whether a max-pool follows, such as "128x32x32, pool"."""
        return f"{self.c_out}x{self.size}x{self.size}{', pool' if self.pool == 2 else ''}"


@dataclass(frozen=True)
class Recipe:
    """Architecture, augmentation and schedule of "94% on CIFAR-10 in 94 lines and 94 seconds".

    The defaults are the reference. Any field can be changed, for example to measure what a part is worth. Each field
    is also a flag of the command line, with the same help text. An invalid value raises :class:`InputError`.
    """

    epochs: int = _constant(24, "passes over the training images")
    batch_size: int = _constant(512, "images per step; the last incomplete batch of an epoch is dropped")
    widths: tuple[int, ...] = _constant(
        (64, 128, 128, 128, 256, 512, 512, 512),
        "output channels of each 3x3 convolution; a 2x2 max-pool follows each one that doubles the channels",
    )
    celu_alpha: float = _constant(0.075, "alpha of CELU; other activations ignore it")
    output_scale: float = _constant(1 / 8, "factor on the logits before the loss")
    label_smoothing: float = _constant(0.2, "label smoothing of the cross entropy")
    momentum: float = _constant(0.9, "momentum of SGD")
    weight_decay: float = _constant(
        5e-4, "weight decay for a loss averaged over the batch; it is multiplied by the batch size for the optimizer"
    )
    lr_knots: tuple[float, ...] = _constant(
        (0.0, 1.0, 5.0),
        "points in time of the learning rates, in any unit; the rate is linear between them; the last one is the end "
        "of training",
    )
    lr_values: tuple[float, ...] = _constant(
        (0.1, 0.6, 0.0),
        "learning rate at each knot, for a loss averaged over the batch; the optimizer gets it divided by the batch "
        "size",
    )
    crop_padding: int = _constant(
        4,
        "reflection padding in pixels for random crops; the offset of a crop is 0 to this number, so crops never "
        "reach the far border; 0: no crop",
    )
    flip: bool = _constant(True, "mirror each image left to right with probability 1/2")
    cutout_size: int = _constant(8, "side in pixels of the square that is set to the mean color; 0: no cutout")
    activation: str = _constant("celu", "activation after each batch norm", ACTIVATIONS)
    batch_norm: bool = _constant(True, "batch norm after each convolution; without it no layer has a bias")
    residual: bool = _constant(
        False, "add the input of each convolution block to its output if both have the same number of channels"
    )
    nesterov: bool = _constant(True, "Nesterov momentum instead of plain momentum")
    decay_norms_and_biases: bool = _constant(
        True, "weight decay on all parameters, not only on the weights of the convolutions and the linear layer"
    )
    init_scale: float = _constant(1.0, "factor on the initial weights of the convolutions and the linear layer")
    label_noise: float = _constant(0.0, "fraction of training labels replaced by another class, uniformly at random")
    label_noise_seed: int = _constant(0, "seed of the label noise, which is the same in every run")
    train_subset: int = _constant(
        0,
        "train on this many images, balanced over the classes, the same subset in every run; smaller subsets are "
        "nested in larger ones; 0: all images",
    )
    classes: tuple[int | str, ...] = _constant(
        (),
        "train and test on these classes only, given by name or number and renumbered from 0 in this order",
        item=(0, ""),
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = _coerce(field.default, getattr(self, field.name), field.name, field.metadata["item"])
            object.__setattr__(self, field.name, value)

        def require(condition: bool, name: str, must: str) -> None:
            if not condition:
                value = getattr(self, name)
                shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
                raise InputError(f"{option(name)} must {must}, not {shown}")

        lowest = {"epochs": 1, "batch_size": 1, "weight_decay": 0, "label_noise_seed": 0, "train_subset": 0}
        for name, number in lowest.items():
            require(getattr(self, name) >= number, name, f"be at least {number}")
        for name in ("celu_alpha", "output_scale", "init_scale"):
            require(getattr(self, name) > 0, name, "be above 0")
        for name in ("label_smoothing", "label_noise"):
            require(0 <= getattr(self, name) <= 1, name, "lie in 0 to 1")
        require(len(self.widths) >= 1 and min(self.widths) >= 1, "widths", "be one or more positive numbers")
        require(
            self.final_size >= 1,
            "widths",
            f"double at most {IMAGE_SIZE.bit_length() - 1} times, starting from the {IMAGE_CHANNELS} input channels",
        )
        smallest = min(self.blocks(), key=lambda block: block.out_size)
        require(
            not self.batch_norm or self.batch_size * smallest.out_size**2 > 1,
            "batch_size",
            f"be at least 2 with these widths: block {smallest.index} has feature maps of one pixel, "
            "and batch norm needs more than one value per channel",
        )
        require(0 < self.momentum < 1, "momentum", "lie between 0 and 1")
        knots = self.lr_knots
        require(len(knots) >= 2 and knots[0] == 0, "lr_knots", "be two or more numbers, the first one 0")
        require(all(a < b for a, b in zip(knots, knots[1:])), "lr_knots", "increase")
        require(len(self.lr_values) == len(knots), "lr_values", f"be {len(knots)} numbers, one per knot")
        require(min(self.lr_values) >= 0, "lr_values", "be at least 0")
        require(0 <= self.crop_padding < IMAGE_SIZE, "crop_padding", f"lie in 0 to {IMAGE_SIZE - 1}")
        require(0 <= self.cutout_size <= IMAGE_SIZE, "cutout_size", f"lie in 0 to {IMAGE_SIZE}")
        require(self.activation in ACTIVATIONS, "activation", f"be one of {', '.join(ACTIVATIONS)}")
        negative = any(isinstance(one, int) and one < 0 for one in self.classes)
        require(not negative and len(self.classes) != 1, "classes", "be two or more names or numbers from 0")
        require(len(set(self.classes)) == len(self.classes), "classes", "be different")

    @property
    def augments(self) -> bool:
        """Whether the training images are changed at random."""
        return bool(self.crop_padding or self.flip or self.cutout_size)

    def blocks(self) -> tuple[Block, ...]:
        """Return the convolution blocks in order."""
        blocks: list[Block] = []
        c_in, size = IMAGE_CHANNELS, IMAGE_SIZE
        for index, c_out in enumerate(self.widths, 1):
            block = Block(index, c_in, c_out, size, pool=2 if c_out == 2 * c_in else 1)
            blocks.append(block)
            c_in, size = c_out, block.out_size
        return tuple(blocks)

    @property
    def final_size(self) -> int:
        """Height and width of the last feature map in pixels; the head pools it to one pixel."""
        return self.blocks()[-1].out_size

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """Return the optimizer's learning rate at ``step``, which counts from 1.

        The last step of the training gets the last of ``lr_values``.
        """
        return float(self._learning_rate_at(step / steps_per_epoch))

    def learning_rates(self, steps_per_epoch: int) -> np.ndarray:
        """Return the learning rate of each step of the training."""
        return self._learning_rate_at(np.arange(1, self.epochs * steps_per_epoch + 1) / steps_per_epoch)

    def _learning_rate_at(self, epochs: Any) -> Any:
        knots = [knot * self.epochs / self.lr_knots[-1] for knot in self.lr_knots]
        values = [value / self.batch_size for value in self.lr_values]
        return np.interp(epochs, knots, values)

    def to_json(self) -> str:
        """Return all constants as a JSON object."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Return the recipe from a JSON object; missing constants keep the reference's values.

        A JSON object with the key "recipe", such as ``summary.json`` of a training, gives the recipe that it holds.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"a recipe must be JSON: {error}") from None
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(values, dict):
            raise InputError("a recipe must be a JSON object")
        values = values.get("recipe", values)
        if not isinstance(values, dict):
            raise InputError("the key recipe must hold a JSON object")
        if unknown := sorted(set(values) - set(names)):
            hint = did_you_mean(unknown[0], names)
            constants = f"its constants are {', '.join(names)}"
            raise InputError(f"a recipe has no constant {', '.join(unknown)}; {constants}{hint}")
        return cls(**values)

    def save(self, path: str | Path) -> None:
        """Write the recipe to ``path`` as JSON."""
        as_path(path, "path").write_text(self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe from the JSON file ``path``. An :class:`InputError` names the file and what is wrong."""
        path = as_path(path, "path")
        try:
            return cls.from_json(path.read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the recipe {path}: {getattr(error, 'strerror', None) or error}") from None
        except InputError as error:
            raise InputError(f"{path}: {error!s}") from None  # the names as in the file, not as flags


def plain(value: Any) -> Any:
    """Return the values of an array or tensor as Python's, and a sequence as a list. Anything else stays as it is.

    Configuration libraries have list types of their own, which are sequences but no subclasses of list.
    """
    if isinstance(getattr(value, "shape", None), tuple) and callable(getattr(value, "tolist", None)):
        value = value.tolist()
    if isinstance(value, (str, bytes, bytearray, Mapping)):
        return value
    is_sequence = isinstance(value, Sequence) or all(hasattr(value, name) for name in ("__len__", "__getitem__"))
    return list(value) if is_sequence and not isinstance(value, type) else value


def _coerce(default: Any, value: Any, name: str, item: Any = None) -> Any:
    """Return ``value`` as the type of ``default``: int, float, bool, str, or a tuple of the type of ``item``.

    ``item`` may be a tuple of values of the types that an item may have.
    """
    value = plain(value)
    if isinstance(default, tuple):
        if isinstance(value, list):
            examples = item if isinstance(item, tuple) else (item,)
            return tuple(
                _coerce(next((one for one in examples if isinstance(element, type(one))), examples[0]), element, name)
                for element in map(plain, value)
            )
        kind = "a list of numbers"
    elif isinstance(default, (bool, str)):
        if isinstance(value, type(default)):
            return type(default)(value)  # numpy's text is a subclass of str
        kind = "true or false" if isinstance(default, bool) else "a name"
    elif isinstance(default, int):
        if isinstance(value, Integral) and not isinstance(value, bool) and abs(int(value)) <= MAX_INTEGER:
            return int(value)
        kind = f"a whole number of at most {MAX_INTEGER}" if isinstance(value, Integral) else "a whole number"
    else:
        with contextlib.suppress(OverflowError):  # an integer too large for a float
            if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
                return float(value)
        kind = "a finite number"
    shown = repr(value) if not isinstance(value, Integral) or abs(int(value)) < 10**20 else "a number of many digits"
    raise InputError(f"{option(name)} must be {kind}, not {shown}")
