"""What TensorRT says: one logger for the process, and who listens to it.

TensorRT keeps the first logger it is given and ignores later ones, so there is one for good, and
messages go to whoever collects at the time.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

__all__ = ["Log", "Message"]

# VERBOSE logs of a large network run to hundreds of thousands of lines.
_MOST = 200_000
_LEVELS = ("internal_error", "error", "warning", "info", "verbose")
_PLACE = re.compile(r"\s+In \w+ at /\S+:\d+|\s*\(?In \w+ at /\S+:\d+\)?")


@dataclass(frozen=True)
class Message:
    """One line of the log.

    Attributes:
        level: internal_error, error, warning, info or verbose.
        text: as it was said.
    """

    level: str
    text: str


class Log:
    """The messages of one package, for whoever collects them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listening: list[list[Message]] = []

    @contextmanager
    def collect(self) -> Iterator[list[Message]]:
        """A list that fills with what is said until the block ends, whichever thread says it."""
        messages: list[Message] = []
        with self._lock:
            self._listening.append(messages)
        try:
            yield messages
        finally:
            with self._lock:
                self._listening = [one for one in self._listening if one is not messages]

    def say(self, severity: Any, text: str) -> None:
        """What the package calls; it must never raise."""
        level = _LEVELS[min(max(int(severity), 0), len(_LEVELS) - 1)]
        with self._lock:
            for messages in self._listening:
                if len(messages) < _MOST or level != "verbose":
                    messages.append(Message(level, text))

    @staticmethod
    def errors(messages: list[Message]) -> list[str]:
        """The errors among them, without the places in TensorRT's own source."""
        return [
            _PLACE.sub("", message.text).strip()
            for message in messages
            if message.level in ("internal_error", "error")
        ]
