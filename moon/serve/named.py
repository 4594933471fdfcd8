"""Which models a service has: bundles on the command line, and what clients call them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from moon.errors import UsageError
from moon.runtime.predictor import Predictor
from moon.serve.settings import Served

__all__ = ["named_models"]

_NAMED = re.compile(r"([A-Za-z0-9._-]{1,64})=(.+)", re.DOTALL)


def named_models(
    bundles: Sequence[str | os.PathLike[str]], opened: Callable[[str], Predictor]
) -> tuple[Served, ...]:
    """The models, each opened once, so that what is wrong shows now and in one line.

    Args:
        bundles: folders, or NAME=FOLDER; without a name a model is called what its bundle says.
        opened: opens a folder.

    Raises:
        UsageError: there is none, or two have one name.
        MoonError: whatever ``opened`` raises.
    """
    if not bundles:
        raise UsageError("there is no bundle to serve", remedy="Name one, made by moon export")
    found: dict[str, str] = {}
    for bundle in bundles:
        name, path = _split(os.fspath(bundle))
        own = opened(path).bundle.manifest.name
        name = name or own
        if name in found:
            raise UsageError(
                f"{found[name]} and {path} are both called {name}",
                remedy=f"Give each a name of its own, as in other={path}",
            )
        found[name] = path
    return tuple(Served(name, path) for name, path in found.items())


def _split(text: str) -> tuple[str | None, str]:
    """A folder may have an equals sign in its name, where it exists."""
    named = _NAMED.fullmatch(text)
    if named is None or Path(text).exists():
        return None, text
    return named[1], named[2]
