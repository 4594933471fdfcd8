"""The entry point: runs a command and turns every failure into one line and a status.

Exit status: 0 success, 1 failure, 2 wrong use, 130 interrupted.

Of several processes that torchrun started, each but the first names its rank; what all of them
meet alike, and what another process reports, is said once.
"""

from __future__ import annotations

__all__ = ["main"]

import contextlib
import io
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

import typer

from moon.errors import DISTRIBUTION, MissingExtraError, MoonError, UsageError, one_line

# Typer carries its own copy of click in some versions and imports click in others;
# the classes above its one public error are the same in both.
_ParserUsageError = typer.BadParameter.__mro__[1]
_ParserError = typer.BadParameter.__mro__[2]

_INTERRUPTED = 130
_EXTRAS = {
    "bentoml": "serve",
    "multipart": "serve",
    "onnxscript": "train",
    "safetensors": "train",
    "sklearn": "train",
    "tensorrt": "trt",
    "tensorrt_rtx": "trt-rtx",
    "torch": "train",
    "torchvision": "train",
}
# What the plain install brings: without one of these the install is broken.
_REQUIRED = {
    "PIL": "pillow",
    "jinja2": "jinja2",
    "matplotlib": "matplotlib",
    "numpy": "numpy",
    "onnx": "onnx",
    "pyarrow": "pyarrow",
    "rich": "rich",
    "tomli": "tomli",
    "tomli_w": "tomli-w",
}


# What is not lost of a command that is interrupted.
_GOING_ON = {
    "train": " Go on with --resume.",
    "score": " The same command goes on from what is done.",
}


def main(args: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        args: the words after ``moon``; those of the process by default.

    Returns:
        The exit status.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A file name or terminal that is not UTF-8 must not end the command.
            stream.reconfigure(errors="backslashreplace")
    words = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in (words[: words.index("--")] if "--" in words else words)
    try:
        with warnings.catch_warnings():
            if not debug and not sys.warnoptions:
                warnings.simplefilter("ignore")
            status = _run(words)
        sys.stdout.flush()
    except BaseException as error:
        return _report(error, words, debug=debug)
    return status


def _run(words: list[str]) -> int:
    from moon.cli.app import app

    try:
        status = app(words, prog_name="moon", standalone_mode=False)
    except typer.Exit as done:
        return done.exit_code
    if status == _INTERRUPTED:  # what the parser makes of ctrl-C
        raise KeyboardInterrupt
    return status if isinstance(status, int) else 0


def _report(error: BaseException, words: list[str], *, debug: bool) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, BrokenPipeError):
        # Whoever read our output has left; the interpreter's own flush must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if debug:
        traceback.print_exception(type(error), error, error.__traceback__)
    rank = _rank()
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        resume = _GOING_ON.get(words[0], "") if words else ""
        if not rank:
            _say(f"moon: interrupted.{resume}")
        return _INTERRUPTED
    known = _translate(error, debug=debug)
    # The words of the command are the same in all processes.
    if not known.told and not (rank and isinstance(error, _ParserError)):
        _say(f"moon: error: rank {rank}: {known}" if rank else f"moon: error: {known}")
    return known.exit_code


def _rank() -> int:
    """Which of the processes that torchrun started this is, from 0."""
    try:
        return int(os.environ["RANK"]) if int(os.environ["WORLD_SIZE"]) > 1 else 0
    except (KeyError, ValueError):
        return 0


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # nobody is left to read it
        print(line, file=sys.stderr, flush=True)


def _translate(error: BaseException, *, debug: bool) -> MoonError:
    if isinstance(error, MoonError):
        return error
    if isinstance(error, _ParserError):
        return _wrong_use(error)
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").split(".")[0]
        if package in _EXTRAS:
            return MissingExtraError(package, _EXTRAS[package], "this command")
        if package in _REQUIRED:
            return MoonError(
                f"this command needs the package {_REQUIRED[package]}, which is not installed",
                remedy=f"Install {DISTRIBUTION} again, or pip install {_REQUIRED[package]}",
            )
    if isinstance(error, MemoryError):
        return MoonError("not enough memory", remedy="Use a smaller batch, --limit, or more memory")
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return MoonError(f"{where}{error.strerror}", remedy="Check that path, its rights and space")
    text = one_line(str(error))
    cause = f"{type(error).__name__}: {text}" if text else type(error).__name__
    remedy = "" if debug else "This is a defect in moon; --debug shows where it happened"
    return MoonError(cause, remedy=remedy)


def _wrong_use(error: BaseException) -> MoonError:
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "moon"
    see = f"See {command} --help"
    option = getattr(error, "option_name", None)
    possible = getattr(error, "possibilities", None)
    if possible is not None or type(error).__name__ == "NoSuchOption":
        hint = f"Did you mean {' or '.join(sorted(possible))}? " if possible else ""
        return UsageError(f"{command} has no option {option}", remedy=hint + see)
    message = error.format_message() if isinstance(error, _ParserUsageError) else str(error)  # type: ignore[attr-defined]
    message = one_line(message).replace("Value error, ", "").rstrip(".")
    return UsageError(message[:1].lower() + message[1:], remedy=see)
