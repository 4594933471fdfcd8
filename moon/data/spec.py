"""The grammar of SOURCE: ``BASE[#SPLIT]`` and then any number of ``[a:b]`` and ``{FILTER}``.

    FILTER   FIELD OP VALUE          OP: == != < <= > >=
             FIELD in A..B           both ends included, numbers only
             FIELD in A,B,...

A value may be quoted, '...' or "...". A path that exists is never taken apart: a folder
may be called ``photos[1]`` or ``set#2``.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path

from moon.errors import UsageError

__all__ = ["Filter", "Range", "Spec", "number", "parse"]

_TAIL = re.compile(r"(\[[^\[\]]*\]|\{[^{}]*\})\s*$")
_RANGE = re.compile(r"\[\s*(-?\d{1,18})?\s*:\s*(-?\d{1,18})?\s*(?::\s*(\d{1,18})?\s*)?\]")
_COMPARE = re.compile(r"\s*([A-Za-z_]\w*)\s*(==|!=|<=|>=|<|>)\s*(.*?)\s*", re.DOTALL)
_AMONG = re.compile(r"\s*([A-Za-z_]\w*)\s+in\s+(.*?)\s*", re.DOTALL)
_SPAN = re.compile(r"(.+?)\s*\.\.\s*(.+)", re.DOTALL)
_NUMBER = re.compile(r"[+-]?(\d{1,18}(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?")
_SPLIT = re.compile(r"[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class Range:
    """``[start:stop:step]``, with Python's meaning."""

    start: int | None
    stop: int | None
    step: int | None


@dataclass(frozen=True, kw_only=True)
class Filter:
    """One ``{...}``; ``op`` is a comparison, ``among`` (any of the values) or ``span``.

    Values stay text until the field they meet is known: ``03577`` may be a name.
    """

    field: str
    op: str
    values: tuple[str, ...]
    text: str


@dataclass(frozen=True, kw_only=True)
class Spec:
    base: str
    split: str | None
    selectors: tuple[Range | Filter, ...]


def parse(text: str) -> Spec:
    """Take a SOURCE apart.

    Raises:
        UsageError: it is not of the grammar above.
    """
    rest = text.strip()
    if not rest:
        raise UsageError("the source is empty", remedy="Name a folder or a file of images")
    selectors: list[Range | Filter] = []
    while not _exists(rest) and (tail := _TAIL.search(rest)):
        rest = rest[: tail.start()].rstrip()
        selectors.append(_selector(tail.group(1)))
    split = None
    if not _exists(rest) and "#" in rest:
        whole = rest
        rest, _, split = rest.rpartition("#")
        if "/" in split:
            rest, split = whole, None
        elif not _SPLIT.fullmatch(split):
            raise UsageError(
                f"cannot read #{split} in the source {text}",
                remedy="Write FILE#SPLIT, then [a:b] or {field==value}",
            )
    if not rest:
        raise UsageError(f"the source {text} names no file or folder")
    return Spec(base=rest, split=split, selectors=tuple(reversed(selectors)))


def _exists(text: str) -> bool:
    try:
        return Path(text).expanduser().exists()
    # A home that is not known, a name too long, a NUL inside: no such path.
    except (OSError, ValueError, RuntimeError):
        return False


def _selector(text: str) -> Range | Filter:
    return _range(text) if text.startswith("[") else _filter(text)


def _range(text: str) -> Range:
    match = _RANGE.fullmatch(text)
    if match is None or int(match[3] or 1) < 1:
        raise UsageError(
            f"cannot read the range {text}",
            remedy="Write [a:b], such as [0:1000], [:100] or [-50:]",
        )
    start, stop, step = (int(part) if part else None for part in match.groups())
    return Range(start=start, stop=stop, step=step)


def _filter(text: str) -> Filter:
    inside = text[1:-1]
    if match := _COMPARE.fullmatch(inside):
        field, op, value = match.groups()
        if value:
            return Filter(field=field, op=op, values=(_unquoted(value),), text=text)
    elif match := _AMONG.fullmatch(inside):
        field, listed = match.groups()
        span = _SPAN.fullmatch(listed)
        if span and all(number(end) is not None for end in span.groups()):
            return Filter(field=field, op="span", values=span.groups(), text=text)
        if values := _listed(listed):
            return Filter(field=field, op="among", values=values, text=text)
    raise UsageError(
        f"cannot read the filter {text}",
        remedy="Write {field==value} (or != < <= > >=), {field in 0..7} or {field in 1,3,5}",
    )


def number(text: str) -> int | float | None:
    """The number that ``text`` spells, or None."""
    if not _NUMBER.fullmatch(text):
        return None
    return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)


def _listed(text: str) -> tuple[str, ...]:
    quote = "'" if text.startswith("'") else '"'
    try:
        parts = next(csv.reader([text], skipinitialspace=True, quotechar=quote), [])
    except csv.Error:
        return ()
    stripped = tuple(_unquoted(part.strip()) for part in parts)
    return stripped if all(stripped) else ()


def _unquoted(text: str) -> str:
    quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text
