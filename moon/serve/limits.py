"""Limits: how much one request, one client, and all of them together may take of a worker.

Each can be set through the environment: ``MOON_SERVE_BODY_BYTES`` for ``body_bytes``, and so on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from moon.data.decode import MAX_PIXELS
from moon.errors import UsageError

__all__ = ["PREFIX", "Limits"]

MIB = 1024 * 1024
PREFIX = "MOON_SERVE_"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a worker grants.

    Attributes:
        body_bytes: largest request body.
        pixels: largest image that is decoded, width times height.
        light_pixels: images larger than this are decoded one at a time.
        items: most images in one request.
        batch: most images decided at once, where the backend does not want fewer.
        head_seconds: longest a request's line and headers may take to arrive.
        body_seconds: longest a body may take to arrive.
        answer_seconds: longest a request may wait and be worked on.
        idle_seconds: how long a kept connection may wait for its next request; longer than the
            minute that load balancers usually keep theirs, which must be the first to close.
        write_seconds: longest a client may take to receive what was sent before.
        linger_seconds: how long what a client still sends is read after it was refused.
        connections: most connections at once; one more is refused.
        queue: most requests waiting or being worked on; one more is refused.
        wait_seconds: when a request would wait longer than this before it is decided, by what
            deciding took so far, it is refused.
        buffered_bytes: most bytes of bodies and pixels held at once by all requests.
        retry_seconds: what a refused client is told to wait, at least.
    """

    body_bytes: int = 10 * MIB
    pixels: int = MAX_PIXELS
    light_pixels: int = 4 * 1024 * 1024
    items: int = 64
    batch: int = 16
    head_seconds: float = 10.0
    body_seconds: float = 30.0
    answer_seconds: float = 30.0
    idle_seconds: float = 65.0
    write_seconds: float = 30.0
    linger_seconds: float = 5.0
    connections: int = 1000
    queue: int = 128
    wait_seconds: float = 10.0
    buffered_bytes: int = 128 * MIB
    retry_seconds: int = 1

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Limits:
        """The limits that environment variables set, the others as they are by default.

        Raises:
            UsageError: one is not a number, or is not more than 0.
        """
        given: dict[str, int | float] = {}
        for field in fields(cls):
            variable = PREFIX + field.name.upper()
            if variable in environment:
                kind = type(field.default)
                given[field.name] = _number(variable, environment[variable], whole=kind is int)
        return cls(**given)  # type: ignore[arg-type]


def _number(variable: str, text: str, *, whole: bool) -> int | float:
    what = "a whole number above 0" if whole else "a number above 0"
    try:
        value: int | float = int(text) if whole else float(text)
    except ValueError as error:
        raise UsageError(f"{variable} must be {what}, got {text!r}") from error
    if not math.isfinite(value) or value <= 0:
        raise UsageError(f"{variable} must be {what}, got {text!r}")
    return value
