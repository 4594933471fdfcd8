"""Settings: everything one worker needs to know, sent to it when it starts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from moon.errors import UsageError
from moon.serve.limits import Limits

__all__ = ["Limits", "Settings"]


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
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise UsageError(f"--threshold must be a finite number, got {self.threshold}")
        if not math.isfinite(self.grace_seconds) or self.grace_seconds < 0:
            raise UsageError(f"the grace period must be 0 s or more, got {self.grace_seconds}")
