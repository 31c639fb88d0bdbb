"""The fields of published JSON files, read strictly."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Mapping
from typing import Any

from qwen_jax.errors import ModelError

# Far above every published model, and low enough that nothing built from a config is large before it is checked.
MAX_SIZE = 10**7
MAX_POSITION = 10**9


@dataclasses.dataclass(frozen=True)
class Fields:
    """The fields of a JSON object, each read with its type and range. A null is as good as absent.

    Attributes:
      values: the object.
      where: the file's name, and the way to the object in it; every error begins with it.
    """

    values: Mapping[str, Any]
    where: str

    def refusal(self, name: str, wanted: str) -> ModelError:
        """The error that says what the field is, and what was wanted."""
        return ModelError(f"{self.where}: {name} is {reprlib.repr(self.values[name])}; {wanted}")

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(name) is not None

    def name_of(self, *names: str) -> str:
        """The name under which one field is there; under several, they must agree."""
        found = [name for name in names if self.has(name)]
        if not found:
            raise ModelError(f"{self.where}: {' or '.join(names)} is missing")
        for name in found[1:]:
            if self.values[name] != self.values[found[0]]:
                raise self.refusal(name, f"it must equal {found[0]}, {reprlib.repr(self.values[found[0]])}")
        return found[0]

    def integer(self, *names: str, low: int = 1, high: int = MAX_SIZE) -> int:
        name = self.name_of(*names)
        value = self.values[name]
        if type(value) is not int or not low <= value <= high:
            raise self.refusal(name, f"a whole number from {low} to {high} is wanted")
        return value

    def number(self, *names: str) -> float:
        name = self.name_of(*names)
        value = self.values[name]
        if type(value) not in (int, float) or not 0 < value < 1e15:
            raise self.refusal(name, "a positive number is wanted")
        return float(value)

    def text(self, name: str) -> str:
        value = self.values[self.name_of(name)]
        if type(value) is not str or not value or not value.isprintable():
            raise self.refusal(name, "a text is wanted")
        return value

    def flag(self, name: str) -> bool:
        value = self.values[self.name_of(name)]
        if type(value) is not bool:
            raise self.refusal(name, "true or false is wanted")
        return value

    def mapping(self, name: str) -> Fields:
        """The fields of an object within this one."""
        value = self.values[self.name_of(name)]
        if not isinstance(value, dict):
            raise self.refusal(name, "an object is wanted")
        return Fields(value, f"{self.where}: {name}")
