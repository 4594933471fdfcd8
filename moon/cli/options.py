"""Options that several commands share, and how repeated NAME=VALUE words are read."""

from __future__ import annotations

__all__ = [
    "AsJson",
    "Backend",
    "Command",
    "Commands",
    "Debug",
    "Key",
    "named_sources",
    "spread",
]

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from moon.errors import UsageError

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="On failure show the traceback too.")]
Backend = Annotated[
    str,
    typer.Option(
        "--backend",
        metavar="NAME",
        help="What runs the model, as onnxruntime:cuda,device_id=1; moon doctor lists them.",
    ),
]
Key = Annotated[
    Path | None,
    typer.Option(
        "--key", metavar="PUBLIC.pem", help="Refuse a bundle that the holder did not sign."
    ),
]

_PAIRED = ("--set", "--near", "--far")


class Commands(TyperGroup):
    """The group: commands in the order written, and a hint for a mistyped one."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        word = args[0]
        if not word.startswith("-") and self.get_command(ctx, word) is None:
            near = difflib.get_close_matches(word, list(self.commands), n=1)
            hint = f"Did you mean {near[0]}? " if near else ""
            raise UsageError(
                f"there is no command {word!r}", remedy=f"{hint}See moon --help for the list"
            )
        return super().resolve_command(ctx, args)


class Command(TyperCommand):
    """A command in which ``--set a=1 b=2`` means ``--set a=1 --set b=2``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, spread(args))


def spread(words: Sequence[str]) -> list[str]:
    result: list[str] = []
    option, plain = "", False
    for index, word in enumerate(words):
        plain = plain or word == "--"
        follows = bool(option) and not plain and index > 1 and words[index - 1] != option
        if word.startswith("-"):
            option = word if word in _PAIRED else ""
        elif follows and _is_pair(word):
            result.append(option)
        elif follows:
            option = ""
        result.append(word)
    return result


def _is_pair(word: str) -> bool:
    name, equals, _ = word.partition("=")
    return bool(equals) and all(part.replace("-", "_").isidentifier() for part in name.split("."))


def named_sources(option: str, words: Sequence[str]) -> dict[str, str]:
    """Read ``NAME=SOURCE`` words, keeping their order.

    Raises:
        UsageError: a word has no name or no source, or a name comes twice.
    """
    sources: dict[str, str] = {}
    for word in words:
        name, equals, source = word.partition("=")
        if not (equals and name.strip() and source.strip()):
            raise UsageError(
                f"{option} {word!r} is not NAME=SOURCE",
                remedy=f"Name each set, as in {option} svhn=folder/of/images",
            )
        if name in sources:
            raise UsageError(f"{option} names {name!r} twice", remedy="Give each set its own name")
        sources[name] = source
    return sources
