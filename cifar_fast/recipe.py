"""Recipes as data. The defaults of :class:`Recipe` are the reference; the folder ``recipes`` has the others."""

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
NETWORKS = ("cnn", "whitened")
OPTIMIZERS = ("sgd", "muon")

SHIPPED = Path(__file__).with_name("recipes")
"""Folder with a JSON file for each recipe that has a name, besides the reference."""

IMAGE_SIZE = 32
"""Height and width of an image, in pixels."""

IMAGE_CHANNELS = 3

WHITENING_SIZE = 2
"""Height and width of the patches that the network ``whitened`` whitens, in pixels."""

WHITENED_CHANNELS = 2 * IMAGE_CHANNELS * WHITENING_SIZE**2
"""Channels after the whitening: each direction of a patch's colors, and its negative."""

MAX_INTEGER = 2**31 - 1
"""The largest integer in a recipe; torch and the kernels can index with it."""


def _constant(
    default: Any, help: str, choices: tuple[str, ...] | None = None, item: Any = None, only: str | None = None
) -> Any:
    """Return a field.

    Args:
        default: the reference's value.
        help: the text of the flag.
        choices: the possible values.
        item: an example item, or several of different types, if the default is an empty tuple.
        only: the network or optimizer that the constant belongs to. A recipe with another one must keep the default.
    """
    item = default[0] if isinstance(default, tuple) and default else item
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "item": item, "only": only})


@dataclass(frozen=True)
class Block:
    """Shape of a convolution block: 3x3 convolution, optional 2x2 max-pool, batch norm, activation.

    ``index`` counts from 1. ``c_in`` and ``c_out`` are the channels of the convolution. ``size`` is the height and
    width of its input and output in pixels. ``pool`` is 2 if the max-pool follows, else 1. The pool drops the last row
    and column of an odd size.
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
    """Network, optimizer, schedule and augmentation of a training.

    The defaults are the reference, "94% on CIFAR-10 in 94 lines and 94 seconds". Any field can be changed, for example
    to measure what a part is worth. Each field is also a flag of the command line, with the same help text.

    Raises:
        InputError: a value is invalid, or belongs to another network or optimizer than the recipe's.
    """

    epochs: int = _constant(24, "passes over the training images")
    batch_size: int = _constant(512, "images per step; the last incomplete batch of an epoch is dropped")
    widths: tuple[int, ...] = _constant(
        (64, 128, 128, 128, 256, 512, 512, 512),
        "output channels: with network cnn of each 3x3 convolution, and a 2x2 max-pool follows each one that doubles "
        "the channels; with network whitened of each group of two 3x3 convolutions, the first with a 2x2 max-pool",
    )
    celu_alpha: float = _constant(0.075, "alpha of CELU; other activations ignore it")
    output_scale: float = _constant(1 / 8, "factor on the logits before the loss")
    label_smoothing: float = _constant(0.2, "label smoothing of the cross entropy")
    momentum: float = _constant(0.9, "momentum of SGD")
    weight_decay: float = _constant(
        5e-4,
        "weight decay for a loss averaged over the batch; it is multiplied by the batch size for the optimizer. With "
        "optimizer muon, this is learning rate times weight decay at the start, and filters have none",
    )
    lr_knots: tuple[float, ...] = _constant(
        (0.0, 1.0, 5.0),
        "points in time of the learning rates, in any unit; the rate is linear between them; the last one is the end "
        "of training",
        only="sgd",
    )
    lr_values: tuple[float, ...] = _constant(
        (0.1, 0.6, 0.0),
        "learning rate at each knot, for a loss averaged over the batch; the optimizer gets it divided by the batch "
        "size",
        only="sgd",
    )
    crop_padding: int = _constant(
        4,
        "reflection padding in pixels for random crops; the offset of a crop is 0 to this number, so crops never "
        "reach the far border; 0: no crop",
    )
    flip: bool = _constant(True, "mirror each image left to right with probability 1/2")
    cutout_size: int = _constant(8, "side in pixels of the square that is set to the mean color; 0: no cutout")
    activation: str = _constant("celu", "activation after each batch norm", ACTIVATIONS)
    batch_norm: bool = _constant(True, "batch norm after each convolution; without it no layer has a bias", only="cnn")
    residual: bool = _constant(
        False,
        "add the input of each convolution block to its output if both have the same number of channels",
        only="cnn",
    )
    nesterov: bool = _constant(True, "Nesterov momentum instead of plain momentum")
    decay_norms_and_biases: bool = _constant(
        True,
        "weight decay on all parameters, not only on the weights of the convolutions and the linear layer",
        only="sgd",
    )
    init_scale: float = _constant(
        1.0, "factor on the initial weights of the convolutions and the linear layer", only="cnn"
    )
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
    network: str = _constant(
        "cnn",
        "cnn: 3x3 convolutions with batch norm; whitened: groups of two such convolutions, after a fixed 2x2 "
        "convolution that whitens patches of the training images",
        NETWORKS,
    )
    optimizer: str = _constant(
        "sgd", "sgd: SGD with momentum; muon: Muon for the filters of the convolutions, SGD for the rest", OPTIMIZERS
    )
    muon_lr: float = _constant(0.24, "first learning rate of the filters; all rates fall linearly to 0", only="muon")
    muon_momentum: float = _constant(0.6, "momentum of the filters", only="muon")
    bias_lr: float = _constant(
        0.053, "first learning rate of the biases, for a loss summed over the batch", only="muon"
    )
    head_lr: float = _constant(
        0.67, "first learning rate of the linear layer, for a loss summed over the batch", only="muon"
    )
    whitening_bias_epochs: int = _constant(
        3,
        "epochs in which the whitening convolution's bias is trained; with optimizer muon its rate falls to 0 in them",
        only="whitened",
    )
    crop_both_sides: bool = _constant(False, "let the offset of a crop be 0 to twice the padding, up to the far border")
    alternate_flip: bool = _constant(
        False, "draw the mirroring once per image for the first epoch, and do the opposite in every second epoch"
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

        for name, choices in (("network", NETWORKS), ("optimizer", OPTIMIZERS), ("activation", ACTIVATIONS)):
            require(getattr(self, name) in choices, name, f"be one of {', '.join(choices)}")
        for field in dataclasses.fields(self):
            only = field.metadata["only"]
            if only not in (None, self.network, self.optimizer) and getattr(self, field.name) != field.default:
                part = "network" if only in NETWORKS else "optimizer"
                raise InputError(
                    f"{option(field.name)} belongs to {part} {only}; this recipe has {part} {getattr(self, part)}"
                )
        lowest = {"epochs": 1, "batch_size": 1, "weight_decay": 0, "label_noise_seed": 0, "train_subset": 0}
        lowest |= {"muon_lr": 0, "whitening_bias_epochs": 0}
        for name, number in lowest.items():
            require(getattr(self, name) >= number, name, f"be at least {number}")
        for name in ("celu_alpha", "output_scale", "init_scale", "bias_lr", "head_lr"):
            require(getattr(self, name) > 0, name, "be above 0")
        for name in ("label_smoothing", "label_noise"):
            require(0 <= getattr(self, name) <= 1, name, "lie in 0 to 1")
        require(len(self.widths) >= 1 and min(self.widths) >= 1, "widths", "be one or more positive numbers")
        pools = f"double at most {IMAGE_SIZE.bit_length() - 1} times, starting from the {IMAGE_CHANNELS} input channels"
        require(self.final_size >= 1, "widths", pools if self.network == "cnn" else "be at most 4 numbers")
        smallest = min(self.blocks(), key=lambda block: block.out_size)
        require(
            not self.batch_norm or self.batch_size * smallest.out_size**2 > 1,
            "batch_size",
            f"be at least 2 with these widths: block {smallest.index} has feature maps of one pixel, "
            "and batch norm needs more than one value per channel",
        )
        for name in ("momentum", "muon_momentum"):
            require(0 < getattr(self, name) < 1, name, "lie between 0 and 1")
        knots = self.lr_knots
        require(len(knots) >= 2 and knots[0] == 0, "lr_knots", "be two or more numbers, the first one 0")
        require(all(a < b for a, b in zip(knots, knots[1:])), "lr_knots", "increase")
        require(len(self.lr_values) == len(knots), "lr_values", f"be {len(knots)} numbers, one per knot")
        require(min(self.lr_values) >= 0, "lr_values", "be at least 0")
        require(0 <= self.crop_padding < IMAGE_SIZE, "crop_padding", f"lie in 0 to {IMAGE_SIZE - 1}")
        require(0 <= self.cutout_size <= IMAGE_SIZE, "cutout_size", f"lie in 0 to {IMAGE_SIZE}")
        negative = any(isinstance(one, int) and one < 0 for one in self.classes)
        require(not negative and len(self.classes) != 1, "classes", "be two or more names or numbers from 0")
        require(len(set(self.classes)) == len(self.classes), "classes", "be different")

    @property
    def crop_offsets(self) -> int:
        """Number of offsets of a crop in each direction."""
        return (2 if self.crop_both_sides else 1) * self.crop_padding + 1

    @property
    def augments(self) -> bool:
        """Whether the training images are changed at random."""
        return bool(self.crop_padding or self.flip or self.cutout_size)

    def blocks(self) -> tuple[Block, ...]:
        """Return the convolution blocks in order."""
        blocks: list[Block] = []
        if self.network == "cnn":
            c_in, size = IMAGE_CHANNELS, IMAGE_SIZE
            layers = [(c_out, c_out == 2 * before) for before, c_out in zip((c_in, *self.widths), self.widths)]
        else:
            c_in, size = WHITENED_CHANNELS, IMAGE_SIZE + 1 - WHITENING_SIZE
            layers = [(c_out, pools) for c_out in self.widths for pools in (True, False)]
        for index, (c_out, pools) in enumerate(layers, 1):
            block = Block(index, c_in, c_out, size, pool=2 if pools else 1)
            blocks.append(block)
            c_in, size = c_out, block.out_size
        return tuple(blocks)

    def weights(self, classes: int) -> int:
        """Return the number of weights of the 3x3 convolutions and the linear layer, for that number of classes."""
        return sum(9 * block.c_in * block.c_out for block in self.blocks()) + self.widths[-1] * classes

    @property
    def final_size(self) -> int:
        """Height and width of the last feature map in pixels; the head pools it to one pixel."""
        return self.blocks()[-1].out_size

    @property
    def groups(self) -> tuple[str, ...]:
        """Groups of parameters with learning rates of their own: all, or those of optimizer muon."""
        return ("all",) if self.optimizer == "sgd" else ("filters", "whitening bias", "biases", "head")

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """Return the optimizer's learning rate at ``step``, which counts from 1, of the first of ``groups``.

        The last step of a training with optimizer sgd gets the last of ``lr_values``.
        """
        return float(self._learning_rates_at(np.array([step]), steps_per_epoch)[0, 0])

    def learning_rates(self, steps_per_epoch: int) -> np.ndarray:
        """Return the learning rates ``[steps, groups]`` of the training, for the optimizer."""
        return self._learning_rates_at(np.arange(1, self.epochs * steps_per_epoch + 1), steps_per_epoch)

    def rate_curve(self) -> tuple[list[float], list[float]]:
        """Return epochs, and the learning rates at them of the first of ``groups``; they are linear in between.

        They are for a loss averaged over the batch, except those of optimizer muon.
        """
        if self.optimizer == "muon":
            return [0.0, float(self.epochs)], [self.muon_lr, 0.0]
        return [knot * self.epochs / self.lr_knots[-1] for knot in self.lr_knots], list(self.lr_values)

    def _learning_rates_at(self, steps: np.ndarray, steps_per_epoch: int) -> np.ndarray:
        if self.optimizer == "sgd":
            knots, values = self.rate_curve()
            return np.interp(steps / steps_per_epoch, knots, [value / self.batch_size for value in values])[:, None]
        left = 1 - (steps - 1) / (self.epochs * steps_per_epoch)
        left_of_whitening = 1 - (steps - 1) / max(self.whitening_bias_epochs * steps_per_epoch, 1)
        rates = self.muon_lr * left, self.bias_lr * left_of_whitening.clip(0), self.bias_lr * left, self.head_lr * left
        return np.stack(rates, axis=1)

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
        """Read a recipe from the JSON file ``path``, or the recipe of the name ``path``.

        An :class:`InputError` names the file and what is wrong.
        """
        names = shipped_recipes()
        path = SHIPPED / f"{path}.json" if str(path) in names else as_path(path, "path")
        try:
            return cls.from_json(path.read_text(encoding="utf-8-sig"))
        except FileNotFoundError:
            raise InputError(
                f"cannot read the recipe {path}: No such file; the recipes with a name are {', '.join(names)}"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the recipe {path}: {getattr(error, 'strerror', None) or error}") from None
        except InputError as error:
            raise InputError(f"{path}: {error!s}") from None  # the names as in the file, not as flags


def shipped_recipes() -> list[str]:
    """Return the names of the recipes that :meth:`Recipe.load` knows. The reference comes first."""
    return sorted((path.stem for path in SHIPPED.glob("*.json")), key=lambda name: (name != "reference", name))


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
