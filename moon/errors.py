"""The errors a user can meet, all under one root.

    MoonError                    exit 1   anything that stops a command
    ├── UsageError               exit 2   the command, recipe or arguments are wrong
    │   └── RecipeError                   an unknown key, a value out of range, an unknown recipe
    ├── DataError                         a source is missing, empty, unreadable or badly labelled
    │   └── ImageError                    one image: truncated, not an image, too large, wrong shape
    │       └── TooManyPixelsError        so large that it is not decoded
    ├── TrainingError                     a run cannot start, continue or be resumed
    │   └── DivergedError                 the loss became NaN or infinite
    ├── ExportError                       a model cannot become a bundle
    │   └── ParityError                   the exported graph disagrees with the model
    ├── BundleError                       a bundle is missing, damaged, hostile or of another schema
    ├── CalibrationError                  a threshold with the promised guarantee cannot be had
    ├── BackendError                      a backend cannot run here, or failed while running
    └── MissingExtraError                 an optional package is not installed

Every error is one line: the cause, then the remedy. Code that calls into other
libraries translates their exceptions with ``raise ... from``.
"""

from __future__ import annotations

__all__ = [
    "BackendError",
    "BundleError",
    "CalibrationError",
    "DataError",
    "DivergedError",
    "ExportError",
    "ImageError",
    "MissingExtraError",
    "MoonError",
    "ParityError",
    "RecipeError",
    "TooManyPixelsError",
    "TrainingError",
    "UsageError",
]

DISTRIBUTION = "moon-toolkit"


class MoonError(Exception):
    """A failure with a cause and, where there is one, a remedy.

    Args:
        cause: what was expected and what came, without a final full stop.
        remedy: what to do about it.

    Attributes:
        told: another process of the same run reports it, so that this one need not.
    """

    exit_code = 1
    told = False

    def __init__(self, cause: str, *, remedy: str = "") -> None:
        self.cause = one_line(cause).rstrip(".")
        self.remedy = one_line(remedy).rstrip(".")
        super().__init__(str(self))

    def __str__(self) -> str:
        return f"{self.cause}. {self.remedy}." if self.remedy else f"{self.cause}."


class UsageError(MoonError):
    exit_code = 2


class RecipeError(UsageError):
    pass


class DataError(MoonError):
    pass


class ImageError(DataError):
    pass


class TooManyPixelsError(ImageError):
    pass


class TrainingError(MoonError):
    pass


class DivergedError(TrainingError):
    pass


class ExportError(MoonError):
    pass


class ParityError(ExportError):
    pass


class BundleError(MoonError):
    pass


class CalibrationError(MoonError):
    pass


class BackendError(MoonError):
    pass


class MissingExtraError(MoonError):
    """A package that an extra brings is not installed.

    Args:
        package: the import that failed, such as ``torch``.
        extra: the extra that brings it, such as ``train``.
        purpose: what needed it, such as ``moon train``.
    """

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package}, which is not installed",
            remedy=f"Install the extra: pip install '{DISTRIBUTION}[{extra}]', "
            f"or pip install '.[{extra}]' in a checkout",
        )


def one_line(text: str) -> str:
    """Fold whitespace, newlines included, into single spaces."""
    return " ".join(str(text).split())
