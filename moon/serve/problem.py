"""Problem: a request refused as a whole, answered as problem+json (RFC 9457)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse, Response

__all__ = ["Problem", "problem_response"]


class Problem(Exception):  # noqa: N818 - the noun RFC 9457 gives it
    """Ends a request with an error status.

    Args:
        status: HTTP status.
        kind: what went wrong in one hyphenated word, the end of the problem's ``type``.
        detail: one sentence for the person who sent the request.
        headers: headers of the answer.
        extra: further members of the answer's JSON.
    """

    def __init__(
        self,
        status: int,
        kind: str,
        detail: str,
        *,
        headers: Mapping[str, str] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.kind = kind
        self.detail = detail
        self.headers = dict(headers or {})
        self.extra = dict(extra or {})


def problem_response(problem: Problem, request_id: str, path: str = "/") -> Response:
    """The answer that tells a problem of a request to a path."""
    if path == "/v2" or path.startswith("/v2/"):
        # The Open Inference Protocol has its own.
        return JSONResponse({"error": problem.detail}, problem.status, problem.headers)
    content = {
        "type": f"urn:moon:problem:{problem.kind}",
        "title": HTTPStatus(problem.status).phrase,
        "status": problem.status,
        "detail": problem.detail,
        "request_id": request_id,
        **problem.extra,
    }
    return Response(
        json.dumps(content, allow_nan=False),
        status_code=problem.status,
        headers=problem.headers,
        media_type="application/problem+json",
    )
