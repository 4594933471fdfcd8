"""Shedding: requests refused before anything of them is looked at that need not be.

Where more is asked than can be answered, what a refusal costs is missing for the answers. A request
that is there as a whole, of the common form, is told so at once, without the HTTP parser, the
application or a task of its own; any other goes the long way, and is refused there.
"""

from __future__ import annotations

import re
import secrets
from http import HTTPStatus

from moon.serve.admission import Admission
from moon.serve.guard import HEADERS
from moon.serve.lifecycle import Lifecycle
from moon.serve.metrics import Metrics
from moon.serve.problem import Problem, problem_response

__all__ = ["Shedding"]

_ROUTE = "/predict"
_START = f"POST {_ROUTE} HTTP/1.1\r\n".encode()
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,9})[ \t]*(?=\r\n)", re.IGNORECASE)
# What changes how a request ends, or what comes after it.
_UNCOMMON = re.compile(rb"\r\n(transfer-encoding|expect|upgrade|connection)[ \t]*:", re.IGNORECASE)
_MOST_HEAD = 8192


class Shedding:
    """Refuses while a worker is full.

    Args:
        admission: knows when it is.
        lifecycle: of a worker that leaves, every connection is told so.
        metrics: count the refusals.
    """

    def __init__(self, admission: Admission, lifecycle: Lifecycle, metrics: Metrics) -> None:
        self._admission, self._lifecycle, self._metrics = admission, lifecycle, metrics

    def answer(self, data: bytes) -> bytes | None:
        """The whole response to ``data``, if that is one request to be refused now.

        Args:
            data: all that a connection without a request in hand has sent.
        """
        if not data.startswith(_START) or self._lifecycle.draining:
            return None
        try:
            self._admission.check()
        except Problem as problem:
            if not _whole(data):
                return None
            self._metrics.answered(_ROUTE, problem.status, 0.0)
            return _response(problem, f"req-{secrets.token_hex(8)}")
        return None


def _whole(data: bytes) -> bool:
    """Whether this is exactly one request of the common form: its headers, and all of its body."""
    end = data.find(b"\r\n\r\n", 0, _MOST_HEAD)
    if end < 0:
        return False
    head = data[: end + 2]
    lengths = _LENGTH.findall(head)
    if len(lengths) != 1 or head.lower().count(b"content-length") != 1:
        return False
    return len(data) == end + 4 + int(lengths[0]) and not _UNCOMMON.search(head)


def _response(problem: Problem, request_id: str) -> bytes:
    made = problem_response(problem, request_id)
    for name, value in {**HEADERS, "X-Request-ID": request_id}.items():
        made.headers[name] = value
    head = b"".join(b"%b: %b\r\n" % pair for pair in made.raw_headers)
    phrase = HTTPStatus(problem.status).phrase
    return f"HTTP/1.1 {problem.status} {phrase}\r\n".encode() + head + b"\r\n" + bytes(made.body)
