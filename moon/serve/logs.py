"""Logs: what a service writes to stderr, as text for people or as JSON lines for machines.

A request's line holds its id, its trace, route, status, latency and how many images were
accepted and abstained from, by reason. Never an image, its name, a path or address that a
client sent, a label or a token.
"""

from __future__ import annotations

import json
import logging
from datetime import datetime, timezone
from typing import Any

from moon.serve.trail import Trail

__all__ = ["FORMATS", "JsonFormatter", "configuration", "log_request"]

FORMATS = ("text", "json")
FIELDS = "moon_fields"
_TEXT = "%(asctime)s %(levelname)s %(message)s"
logger = logging.getLogger("moon.serve.requests")


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, timezone.utc)
        fields: dict[str, Any] = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False, allow_nan=False)


class TextFormatter(logging.Formatter):
    """A record as a line of text, a request's fields after its message."""

    def __init__(self) -> None:
        super().__init__(_TEXT)

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, FIELDS, {})
        words = [f"{name}={value}" for name, value in _flat(fields) if value is not None]
        return " ".join([super().format(record), *words])


def configuration(kind: str, *, requests: bool) -> dict[str, Any]:
    """What ``logging.config`` takes.

    Args:
        kind: one of `FORMATS`.
        requests: whether each request gets a line.
    """
    formatter = JsonFormatter if kind == "json" else TextFormatter
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"chosen": {"()": formatter}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "chosen"}},
        "loggers": {
            logger.name: {"level": "INFO" if requests else "WARNING"},
            "moon.serve": {"level": "INFO"},
            # They warn of every request that is malformed: clients would fill the log.
            **{name: {"level": "ERROR"} for name in ("uvicorn.error", "python_multipart")},
        },
        "root": {"handlers": ["stderr"], "level": "WARNING"},
    }


def log_request(
    trail: Trail,
    *,
    request_id: str,
    trace_id: str | None,
    method: str,
    route: str,
    status: int,
    seconds: float,
) -> None:
    """Write a request's line, where they are wanted.

    Args:
        trail: of the request.
        request_id: as its answer tells it.
        trace_id: of the caller's trace, or ours; None for none.
        method: of HTTP, or OTHER.
        route: from the table of routes, never the path that was asked for.
        status: of the answer.
        seconds: it took.
    """
    if not logger.isEnabledFor(logging.INFO):
        return
    accepted = trail.decided["accepted"]
    abstained = {why: n for why, n in sorted(trail.decided.items()) if why != "accepted"}
    fields: dict[str, Any] = {
        "request_id": request_id,
        "trace_id": trace_id,
        "method": method,
        "route": route,
        "status": status,
        "seconds": round(seconds, 6),
    }
    if accepted or abstained or trail.unreadable:
        images = {"accepted": accepted, "abstained": abstained, "unreadable": trail.unreadable}
        fields["images"] = images
    fields |= {f"{span.stage}_seconds": round(span.seconds, 6) for span in trail.spans}
    logger.info("request", extra={FIELDS: fields})


def _flat(fields: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in fields.items():
        if isinstance(value, dict):
            found += _flat(value, f"{prefix}{name}.")
        else:
            found.append((prefix + name, value))
    return found
