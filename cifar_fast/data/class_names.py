"""Class names. A name identifies a class, because files may number the same classes differently."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from functools import cached_property
from numbers import Integral
from typing import Any

import numpy as np

from cifar_fast.utils.errors import InputError, option
from cifar_fast.utils.progress import LOGGER


class ClassNames(tuple[str, ...]):
    """The different names of the classes, in the order of their numbers.

    A name is kept and compared in Unicode NFC, without white space around it, because file systems change the form.

    Args:
        given: names in the order of their numbers, or a mapping between names and numbers in either direction. A name
            may be text, bytes in UTF-8 or an integer.
        source: file or address of the names, for error messages.

    Raises:
        InputError: ``given`` is something else, or a name is empty or occurs twice.
    """

    def __new__(cls, given: Any, source: str = "") -> ClassNames:
        if isinstance(given, ClassNames):
            return given
        where = f"{source}: class_names" if source else "class_names"
        names = [_cleaned(name, where) for name in _in_order(given, where)]
        if not all(names):
            raise InputError(f"{where} holds an empty name, that of class {names.index('')}; name each class")
        if twice := next((name for name, count in Counter(names).items() if count > 1), None):
            raise InputError(f"{where} holds the name {twice!r} twice; give each class a name of its own")
        return super().__new__(cls, names)

    def number(self, name: str) -> int | None:
        """Return the number of the class ``name``, or None if there is none."""
        return self._numbers.get(_cleaned(name, "class_names"))

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self)}

    @cached_property
    def _integers(self) -> list[int] | None:
        """The integers in the names if nothing else differs, as in "class_0" to "class_11"; else None."""
        parts = [re.fullmatch(r"(\D*)([0-9]+)(\D*)", name) for name in self]
        if len({(part[1], part[3]) if part else None for part in parts}) != 1 or None in parts:
            return None
        return [int(part[2]) for part in parts if part]

    @property
    def are_integers(self) -> bool:
        """Whether each name is an integer."""
        return self._integers is not None and self[0].isdecimal()

    @property
    def are_numbers(self) -> bool:
        """Whether each class is called by its number, as classes without names are."""
        return self == tuple(map(str, range(len(self))))

    def __str__(self) -> str:
        return ", ".join(self[:12]) + (f" and {len(self) - 12} more" if len(self) > 12 else "")

    def choose(self, classes: Sequence[int | str], source: str) -> tuple[int, ...]:
        """Return the number of each of ``classes``, which are names and numbers.

        A number is the name of a class if the names are integers.

        Raises:
            InputError: a class is unknown, or is chosen twice. The message starts with ``source``.
        """
        chosen = [self._find(one) for one in classes]
        if None in chosen:
            shown = " ".join(map(str, classes))
            if self.are_numbers or not (self.are_integers or isinstance(classes[chosen.index(None)], str)):
                raise InputError(f"{source}: {option('classes')} must lie in 0 to {len(self) - 1}, not {shown}")
            unknown = str(classes[chosen.index(None)])
            raise InputError(f"{source}: {option('classes')} has {unknown!r}, which is none of the classes {self}")
        numbers = tuple(number for number in chosen if number is not None)
        if len(set(numbers)) < len(numbers):
            raise InputError(f"{source}: {option('classes')} names a class twice: {' '.join(map(str, classes))}")
        return numbers

    def _find(self, one: int | str) -> int | None:
        found = self.number(str(one))
        if found is not None or isinstance(one, str):
            return found
        if self.are_integers and self._integers:
            same = [number for number, integer in enumerate(self._integers) if integer == one]  # "02" for 2
            return same[0] if len(same) == 1 else None
        return one if one < len(self) else None

    def renumber(self, labels: np.ndarray, names: ClassNames | None, source: str) -> np.ndarray:
        """Return the ``labels`` of a file as numbers of these classes.

        Args:
            names: class names of the file. If there are none, or if one side has numbers instead of names, labels
                are already numbers of these classes. A log line says so where that may be wrong.
            source: the file, for messages.

        Raises:
            InputError: a class is unknown.
        """
        labels, used = labels.astype(np.int64), np.unique(labels)
        largest = int(used[-1])
        if names:
            if largest >= len(names):
                raise InputError(f"{source}: labels go up to {largest}, but class_names has only {len(names)} names")
            numbers = [self.number(name) for name in names]
            unknown = [names[label] for label in used if numbers[label] is None]
            if not unknown:
                return np.array([-1 if number is None else number for number in numbers])[labels]
            nameless = (self.are_numbers and not names.are_integers) or (names.are_numbers and not self.are_integers)
            if not nameless:
                raise InputError(f"{source}: the class {unknown[0]!r} is none of the classes {self}")
            LOGGER.info(f"{source}: classes are compared by number, since its classes are {names}, not {self}")
        elif self._integers and self._integers != list(range(len(self))):
            odd = next(number for number, integer in enumerate(self._integers) if number != integer)
            LOGGER.info(
                f"{source}: has no class_names, so label {odd} means the class {self[odd]!r}: the classes are in the "
                f"order {self}"
            )
        if largest >= len(self):
            raise InputError(f"{source}: labels go up to {largest}, but the training data has {len(self)} classes")
        return labels


def _in_order(given: Any, where: str) -> Iterable[Any]:
    """Return the names in the order of their numbers."""
    if isinstance(given, np.ndarray):
        try:
            given = given.tolist()
        except (SystemError, ValueError):  # a damaged array of texts may hold numbers that are no characters
            raise InputError(f"{where} must hold names, not damaged text") from None
    if isinstance(given, Mapping):
        return _by_number(given, where)
    if isinstance(given, (str, bytes, Set)) or not isinstance(given, Iterable):
        raise InputError(f"{where} must be a list of names in the order of their numbers, not {_shown(given)}")
    return given


def _by_number(given: Mapping[Any, Any], where: str) -> list[Any]:
    pairs = list(given.items())
    if all(isinstance(key, str) and _is_integer(value) for key, value in pairs):
        pairs = [(number, name) for name, number in pairs]
    if not all(_is_integer(key) or (isinstance(key, str) and key.isdecimal()) for key, _ in pairs):
        raise InputError(f"{where} must map numbers to names, or names to numbers")
    names = {int(number): name for number, name in pairs}
    if sorted(names) != list(range(len(pairs))) or any(map(_is_integer, names.values())):
        raise InputError(f"{where} must have each number from 0 to {len(pairs) - 1} once, with its name")
    return [names[number] for number in range(len(pairs))]


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _cleaned(name: Any, where: str) -> str:
    if isinstance(name, bytes):  # in pickles of Python 2 and in numpy's "S" arrays
        name = name.decode(errors="replace")
    if not isinstance(name, str) and not _is_integer(name):
        raise InputError(f"{where} must hold names, not {_shown(name)}")
    return unicodedata.normalize("NFC", str(name)).strip()


def _shown(value: Any) -> str:
    return f"the single text {value!r}" if isinstance(value, (str, bytes)) else type(value).__name__
