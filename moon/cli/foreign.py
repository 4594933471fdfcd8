"""The options that describe one's own MODEL.onnx."""

from __future__ import annotations

__all__ = ["describe"]

import json
from pathlib import Path
from typing import Any

from moon.errors import DataError, UsageError


def describe(foreign: dict[str, Any]) -> dict[str, Any]:
    """How a MODEL.onnx is to be used, from the options as they were typed.

    Raises:
        UsageError: one is missing or cannot be read; DataError: nor the file of classes.
    """
    for option in ("--classes", "--mean", "--std"):
        if foreign[option] is None:
            raise UsageError(
                f"a MODEL.onnx needs {option}",
                remedy="Give --classes FILE, --mean and --std as the model was trained with",
            )
    return {
        "classes": _classes(foreign["--classes"]),
        "mean": _shares("--mean", foreign["--mean"]),
        "std": _shares("--std", foreign["--std"]),
        "unknown_index": _index(foreign["--unknown-index"]),
    }


def _classes(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"could not read the classes in {path}: {error}", remedy="Give a UTF-8 text file"
        ) from error
    if text.lstrip().startswith("["):
        try:
            names = json.loads(text)
        except ValueError as error:
            raise DataError(
                f"{path} is not JSON: {error}", remedy="Give a list of names"
            ) from error
        if not all(isinstance(name, str) for name in names):
            raise DataError(f"{path} does not hold a list of names", remedy="Give texts only")
    else:
        names = [line.strip() for line in text.splitlines() if line.strip()]
    if not names:
        raise DataError(f"{path} names no classes", remedy="Write one class name a line")
    return list(names)


def _shares(option: str, text: str) -> tuple[float, ...]:
    """Numbers of pixels that go from 0 to 1."""
    numbers = _numbers(option, text)
    wrong = [one for one in numbers if not 0 <= one <= 1]
    if wrong:
        raise UsageError(
            f"{option} {wrong[0]:g} does not lie between 0 and 1, as pixels do here",
            remedy="Divide what is meant for pixels of 0 to 255 by 255",
        )
    return numbers


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.replace(",", " ").split())
    except ValueError:
        raise UsageError(
            f"{option} {text!r} is not a list of numbers", remedy=f"Write {option} 0.5,0.5,0.5"
        ) from None


def _index(text: str | None) -> int | None:
    if text is None or text.lower() == "none":
        return None
    try:
        return int(text)
    except ValueError:
        raise UsageError(
            f"--unknown-index {text!r} is neither a whole number nor none",
            remedy="Give the position of the unknown logit, from 0, or none",
        ) from None
