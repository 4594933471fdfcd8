"""Reading frozen dataclasses from TOML tables, dictionaries and ``key=value`` texts.

A nested dataclass is a TOML table, and its keys are written with dots
(``moon.w_final``). Nothing here evaluates text: a value is a TOML value, or else a
plain string, and is checked against the annotation of the field it is meant for.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from moon.errors import RecipeError, UsageError

# The same parser under its name of before Python 3.11.
tomllib = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")

__all__ = ["apply_overrides", "dotted_keys", "parse_toml", "read", "to_dict"]

T = TypeVar("T")

# What people type at a shell, though TOML would not have it: True, .5 and 1.
_LENIENT: dict[str, Any] = {"true": True, "false": False}
_FLOAT = re.compile(r"[+-]?(\d+\.|\.\d+)([eE][+-]?\d+)?")


def read(kind: type[T], table: Mapping[str, Any], where: str = "") -> T:
    """Build the dataclass ``kind`` from a table, checking every key and type.

    Raises:
        RecipeError: an unknown key (with the nearest known one), a missing one, or a
            value of another type; the message gives the dotted key.
    """
    hints = get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in table:
        if key not in fields:
            raise _unknown_key(where + key, [where + known for known in dotted_keys(kind)])
    values = {
        name: _convert(table[name], hints[name], where + name) for name in fields if name in table
    }
    for name, field in fields.items():
        optional = (
            field.default is not dataclasses.MISSING
            or field.default_factory is not dataclasses.MISSING
        )
        if name not in values and not optional:
            raise RecipeError(
                f"the recipe has no {where + name}", remedy=f"Set {where + name}"
            ) from None
    try:
        return kind(**values)
    except RecipeError:
        raise
    except UsageError as error:
        place = f"{where.rstrip('.')}: " if where else ""
        raise RecipeError(place + error.cause, remedy=error.remedy) from error


def to_dict(value: Any) -> dict[str, Any]:
    """The table of a dataclass: nested tables, lists for tuples, and no key for None."""
    table: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        if dataclasses.is_dataclass(item):
            table[field.name] = to_dict(item)
        elif isinstance(item, tuple):
            table[field.name] = list(item)
        elif item is not None:
            table[field.name] = item
    return table


def dotted_keys(kind: type) -> Iterator[str]:
    """Every key of a nested dataclass, in order: ``epochs``, ``moon.w_final``.

    A table that may be absent is a key as well, so that it can be set to ``none``.
    """
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        table = _table(hint)
        if table is not hint:
            yield field.name
        if table is not None:
            yield from (f"{field.name}.{inner}" for inner in dotted_keys(table))


def _table(hint: Any) -> type | None:
    """The dataclass that an annotation admits, which may be one arm of an optional."""
    arms = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return next((a for a in arms if isinstance(a, type) and dataclasses.is_dataclass(a)), None)


def apply_overrides(kind: type, table: dict[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """A copy of ``table`` with ``key=value`` texts laid over it, the last one winning.

    ``none`` clears a key that may be absent; ``a,b`` is a list where a list is wanted.
    """
    result: dict[str, Any] = _deep_copy(table)
    known = list(dotted_keys(kind))
    for setting in settings:
        key, equals, text = setting.partition("=")
        key = key.strip()
        if not equals:
            raise RecipeError(f"--set {setting!r} is not key=value", remedy="Write --set epochs=20")
        if key not in known:
            raise _unknown_key(key, known)
        *path, last = key.split(".")
        target = result
        hint: Any = kind
        for name in path:
            target = target.setdefault(name, {})
            hint = _table(get_type_hints(hint)[name])
        value = _from_text(text.strip(), get_type_hints(hint)[last])
        if value is None:
            target.pop(last, None)
        else:
            target[last] = value
    return result


def parse_toml(text: str, name: str) -> dict[str, Any]:
    """Parse TOML, a syntax error becoming a :class:`RecipeError` that names the file."""
    try:
        table: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{name} is not TOML: {error}", remedy="Correct that line") from error
    return table


def _unknown_key(key: str, known: Sequence[str]) -> RecipeError:
    if any(name.startswith(key + ".") for name in known):
        inner = ", ".join(name for name in known if name.startswith(key + "."))
        return RecipeError(f"{key} is a table, not a value", remedy=f"Set one of {inner}")
    # A forgotten table ("w_final" for "moon.w_final") is nearer than a like-sounding key.
    tails = [name for name in known if name.endswith("." + key.rpartition(".")[2])]
    near = tails[:1] or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    remedy = f"Did you mean {near[0]}" if near else f"Known keys: {', '.join(known)}"
    return RecipeError(f"unknown recipe key {key}", remedy=remedy)


def _convert(value: Any, hint: Any, key: str) -> Any:
    result = _fit(value, hint, key)
    if result is _NO_FIT:
        raise RecipeError(f"{key} is {value!r}", remedy=f"Give {_describe(hint)}")
    return result


_NO_FIT = object()


def _fit(value: Any, hint: Any, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        if isinstance(value, hint):
            return value
        if not isinstance(value, Mapping):
            return _NO_FIT
        return read(hint, value, key + ".")
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        fits = (_fit(value, arm, key) for arm in _exact_first(get_args(hint), value))
        return next((fit for fit in fits if fit is not _NO_FIT), _NO_FIT)
    if origin is Literal:
        return value if value in get_args(hint) else _NO_FIT
    if origin is tuple:
        return _fit_tuple(value, get_args(hint), key)
    if hint is float:
        plain = isinstance(value, (int, float)) and not isinstance(value, bool)
        return float(value) if plain else _NO_FIT
    if hint is int:
        return value if isinstance(value, int) and not isinstance(value, bool) else _NO_FIT
    return value if isinstance(value, hint) else _NO_FIT


def _fit_tuple(value: Any, arms: tuple[Any, ...], key: str) -> Any:
    if not isinstance(value, (list, tuple)):
        return _NO_FIT
    if len(arms) == 2 and arms[1] is Ellipsis:
        arms = (arms[0],) * len(value)
    if len(arms) != len(value):
        return _NO_FIT
    items = [_fit(item, arm, key) for item, arm in zip(value, arms, strict=True)]
    return _NO_FIT if any(item is _NO_FIT for item in items) else tuple(items)


def _exact_first(arms: tuple[Any, ...], value: Any) -> list[Any]:
    # 5000 must stay the int it is where both a float (share) and an int (count) would do.
    return sorted(arms, key=lambda arm: arm is not type(value))


def _from_text(text: str, hint: Any) -> Any:
    arms = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if type(None) in arms and text.lower() == "none":
        return None
    if any(get_origin(arm) is tuple for arm in arms) and not text.startswith("["):
        items = [item.strip() for item in text.split(",") if item.strip()]
        return [_toml_value(item) for item in items]
    if arms[0] is str and len(arms) == 1 + (type(None) in arms):
        return _toml_value(text) if text[:1] in {'"', "'"} else text
    return _toml_value(text)


def _toml_value(text: str) -> Any:
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return _LENIENT.get(text.lower(), text) if not _FLOAT.fullmatch(text) else float(text)
    # A line break in the text could otherwise smuggle in further keys.
    return table["value"] if len(table) == 1 else text


def _describe(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_describe(arm) for arm in get_args(hint))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(get_args(hint))
    if get_origin(hint) is tuple:
        arms = get_args(hint)
        count = "" if arms[-1] is Ellipsis else f"{len(arms)} "
        many = {float: "numbers", int: "whole numbers", str: "texts"}[arms[0]]
        return f"a list of {count}{many}"
    names = {float: "a number", int: "a whole number", str: "a text", bool: "true or false"}
    return names.get(hint, "none" if hint is type(None) else "a table")


def _deep_copy(table: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _deep_copy(value) if isinstance(value, Mapping) else value
        for key, value in table.items()
    }
