"""Shedding: requests refused before anything of them is looked at that need not be.

Where more is asked than can be answered, what a refusal costs is missing for the answers. A request
that is there as a whole, of the common form, is told so at once, without the HTTP parser, the
application or a task of its own; any other goes the long way, and is refused there. One that is
not refused has its place from here on: of many that come at once, none that the worker has no
place for starts on its way.
"""

from __future__ import annotations

import re
from http import HTTPStatus

from moon.serve.admission import Admission, Place
from moon.serve.guard import HEADERS, id_of
from moon.serve.lifecycle import Lifecycle
from moon.serve.metrics import Metrics
from moon.serve.problem import Problem, problem_response

__all__ = ["Place", "Shedding"]

_ROUTE = "/predict"
_START = f"POST {_ROUTE} HTTP/1.1\r\n".encode()
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,9})[ \t]*(?=\r\n)", re.IGNORECASE)
# What changes how a request ends, or what comes after it.
_UNCOMMON = re.compile(rb"\r\n(transfer-encoding|expect|upgrade|connection)[ \t]*:", re.IGNORECASE)
_GIVEN_ID = re.compile(rb"\r\nx-request-id:([^\r]*)\r\n", re.IGNORECASE)
_MOST_HEAD = 8192
_SOME_ID = b"req-%s" % (b"0" * 16)


class Shedding:
    """Refuses while a worker is full.

    Args:
        admission: knows when it is.
        lifecycle: of a worker that leaves, every connection is told so.
        metrics: count the refusals.
    """

    def __init__(self, admission: Admission, lifecycle: Lifecycle, metrics: Metrics) -> None:
        self._admission, self._lifecycle, self._metrics = admission, lifecycle, metrics
        self._refusals: dict[str, bytes] = {}

    def receive(self, data: bytes) -> Place | bytes | None:
        """The place of a request, or the whole response that refuses it.

        Args:
            data: all that a connection without a request in hand has sent.

        Returns:
            A place, to be left when the request is answered; or bytes to send; or None, where
            ``data`` is not one whole request of the common form.
        """
        if not data.startswith(_START) or not _whole(data):
            return None
        try:
            return self._admission.place()
        except Problem as problem:
            if self._lifecycle.draining:
                return None
            self._metrics.answered(_ROUTE, problem.status, 0.0)
            if given := _GIVEN_ID.search(data, 0, data.find(b"\r\n\r\n") + 2):
                return _response(problem, id_of(given[1].strip().decode("latin-1")))
            return self._refusal(problem).replace(_SOME_ID, id_of().encode())

    def _refusal(self, problem: Problem) -> bytes:
        """The response, with a request id to be replaced by another of the same length."""
        if problem.detail not in self._refusals:
            self._refusals = {problem.detail: _response(problem, _SOME_ID.decode())}
        return self._refusals[problem.detail]


def _whole(data: bytes) -> bool:
    """Whether this is exactly one request of the common form: its headers, and all of its body."""
    end = data.find(b"\r\n\r\n", 0, _MOST_HEAD)
    if end < 0:
        return False
    head = data[: end + 2]
    if b"\0" in head or not head.count(b"\r") == head.count(b"\n") == head.count(b"\r\n"):
        return False
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
