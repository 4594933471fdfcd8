"""How long-running functions tell how far they are, without printing."""

from __future__ import annotations

from typing import Protocol

__all__ = ["Progress", "silent"]


class Progress(Protocol):
    """Called now and then from the caller's own thread, with ``done`` of ``total`` finished.

    Args of a call:
        done: items finished so far, from 0 to ``total``.
        total: items in all.
        what: what is being done, such as ``"decoding"``.
    """

    def __call__(self, done: int, total: int, what: str) -> None: ...


def silent(done: int, total: int, what: str) -> None:
    """The default: say nothing."""
