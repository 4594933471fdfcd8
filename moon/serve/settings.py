"""Settings: everything one worker needs to know, sent to it when it starts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from moon.data.decode import MAX_PIXELS
from moon.errors import UsageError

__all__ = ["Limits", "Settings"]

MIB = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much one request, and all of a worker's requests together, may take.

    Attributes:
        body_bytes: largest request body.
        pixels: largest image that is decoded, width times height.
        items: most images in one request.
        body_seconds: longest a body may take to arrive.
        answer_seconds: longest a request may wait and be worked on.
        queue: most requests waiting or being worked on; one more is refused.
        buffered_bytes: most bytes of bodies held at once by all requests.
        retry_seconds: what a refused client is told to wait.
    """

    body_bytes: int = 10 * MIB
    pixels: int = MAX_PIXELS
    items: int = 64
    body_seconds: float = 30.0
    answer_seconds: float = 30.0
    queue: int = 64
    buffered_bytes: int = 128 * MIB
    retry_seconds: int = 1


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to serve, and how.

    Attributes:
        bundle: path of the bundle.
        backend: what runs it.
        threshold: overrides the gate's; None uses the bundle's calibrated one.
        token: what ``Authorization: Bearer`` must carry; None lets everyone in.
        threads: images decoded or inferred at the same time.
        grace_seconds: after SIGTERM, how long new requests are still answered while
            /readyz already says 503, so that a load balancer can look elsewhere.
        finish_seconds: after that, how long requests in flight may still take.
        parent: process id of the supervisor, whose death stops the worker; None for none.
        log_format: of stderr, ``text`` or ``json``.
        log_requests: whether each request gets a line there.
        drift_state: file that keeps the drift test across restarts; None starts it anew.
        limits: see `Limits`.
    """

    bundle: str
    backend: str = "onnxruntime"
    threshold: float | None = None
    # Never in a repr: those end up in logs.
    token: str | None = field(default=None, repr=False)
    threads: int = 1
    grace_seconds: float = 5.0
    finish_seconds: int = 30
    parent: int | None = None
    log_format: str = "text"
    log_requests: bool = False
    drift_state: str | None = None
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise UsageError(f"--threshold must be a finite number, got {self.threshold}")
        if self.log_format not in ("text", "json"):
            raise UsageError(f"--log-format must be text or json, got {self.log_format}")
        if not math.isfinite(self.grace_seconds) or self.grace_seconds < 0:
            raise UsageError(f"the grace period must be 0 s or more, got {self.grace_seconds}")
