"""Typed reading of JSON objects from files that are not trusted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from moon.errors import MoonError

__all__ = ["Fields"]


class Fields:
    """One JSON object, read field by field; every error names the field.

    Reading takes the field out, so that :meth:`done` can refuse what nobody asked for.

    Args:
        plain: what the JSON held.
        where: what to call the object in errors.
        error: makes the exception to raise from its cause.
    """

    def __init__(self, plain: object, where: str, error: Callable[[str], MoonError]) -> None:
        self._where, self._error = where, error
        if not isinstance(plain, dict):
            raise error(f"{where} must be a JSON object")
        self._left: dict[Any, object] = dict(plain)

    def take(self, name: str) -> object:
        """The field as it is; it must be there."""
        if name not in self._left:
            raise self._error(f"{self._where} has no field {name}")
        return self._left.pop(name)

    def take_or(self, name: str, default: object) -> object:
        return self._left.pop(name, default)

    def done(self) -> None:
        """Refuse fields that were not read."""
        if self._left:
            first = min(map(str, self._left))
            raise self._error(f"{self._where} has an unknown field {first}")

    def text(self, name: str) -> str:
        value = self.take(name)
        if not isinstance(value, str):
            raise self._wrong(name, "text", value)
        return value

    def number(self, name: str) -> float:
        return self._number(name, self.take(name))

    def maybe_number(self, name: str) -> float | None:
        value = self.take_or(name, None)
        return None if value is None else self._number(name, value)

    def integer(self, name: str) -> int:
        return self._integer(name, self.take(name))

    def maybe_integer(self, name: str) -> int | None:
        value = self.take_or(name, None)
        return None if value is None else self._integer(name, value)

    def numbers(self, name: str) -> tuple[float, ...]:
        return tuple(self._number(name, item) for item in self._list(name))

    def integers(self, name: str) -> tuple[int, ...]:
        return tuple(self._integer(name, item) for item in self._list(name))

    def texts(self, name: str) -> tuple[str, ...]:
        items = self._list(name)
        if not all(isinstance(item, str) for item in items):
            raise self._wrong(name, "a list of texts", items)
        return tuple(str(item) for item in items)

    def mapping(self, name: str) -> dict[str, Any]:
        value = self.take(name)
        if not isinstance(value, dict):
            raise self._wrong(name, "an object", value)
        return value

    def _list(self, name: str) -> list[Any]:
        value = self.take(name)
        if not isinstance(value, list):
            raise self._wrong(name, "a list", value)
        return value

    def _number(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._wrong(name, "a number", value)
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise self._wrong(name, "a finite number", value)
        return number

    def _integer(self, name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(name, "a whole number", value)
        return value

    def _wrong(self, name: str, expected: str, value: Any) -> MoonError:
        shown = repr(value)
        shown = shown if len(shown) <= 40 else shown[:40] + "..."
        return self._error(f"{name} in {self._where} must be {expected}, not {shown}")
