"""Failures of one score, which a graph may be written without."""

from __future__ import annotations

from moon.errors import ExportError, ParityError

__all__ = ["ScoreError", "ScoreParityError"]


class ScoreError(ExportError):
    """A score cannot be carried.

    Args:
        score: its name.
        cause, remedy: as of every error.
    """

    def __init__(self, score: str, cause: str, *, remedy: str = "") -> None:
        super().__init__(cause, remedy=remedy)
        self.score = score


class ScoreParityError(ScoreError, ParityError):
    """In the graph it is not what its definition gives."""

    def __init__(self, score: str, cause: str) -> None:
        super().__init__(score, cause, remedy="Leave that score out")
