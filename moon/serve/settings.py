"""Settings: everything one worker needs to know, sent to it when it starts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from moon.errors import UsageError
from moon.serve.limits import Limits

__all__ = ["Limits", "Served", "Settings"]


@dataclass(frozen=True)
class Served:
    """One model of the service.

    Attributes:
        name: what clients call it.
        bundle: path of its bundle.
    """

    name: str
    bundle: str


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to serve, and how.

    Attributes:
        served: the models, of different names; the first answers where none is named.
        key: file of the public key that must have signed the bundles; None for no matter who.
        reload: whether bundles that change on disk are taken up.
        backend: what runs them.
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

    served: tuple[Served, ...]
    key: str | None = None
    reload: bool = True
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

    @property
    def first(self) -> str:
        """Name of the model that answers where none is named."""
        return self.served[0].name

    def __post_init__(self) -> None:
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise UsageError(f"--threshold must be a finite number, got {self.threshold}")
        if self.log_format not in ("text", "json"):
            raise UsageError(f"--log-format must be text or json, got {self.log_format}")
        if not math.isfinite(self.grace_seconds) or self.grace_seconds < 0:
            raise UsageError(f"the grace period must be 0 s or more, got {self.grace_seconds}")
