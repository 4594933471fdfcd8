"""The API described: /openapi.json, and /docs to read it and try it out in a browser.

The page's files are served from here, since a page that loads them from elsewhere tells
someone else who looks at it, and breaks without a network.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from moon.serve.problem import Problem

__all__ = ["ApiPage"]

_FILES = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}
# Swagger UI sets styles on elements and draws its icons from data: URLs.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>moon: API</title>
<link rel="stylesheet" href="/docs/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="/docs/swagger-ui-bundle.js"></script>
<script src="/docs/start.js"></script>
</body>
</html>
"""
_START = """SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#swagger-ui",
  presets: [SwaggerUIBundle.presets.apis],
  validatorUrl: null,
  deepLinking: false
});
"""


class ApiPage:
    """Routes that describe the others.

    Args:
        describe: makes the OpenAPI document.
        swagger: folder of Swagger UI's files, or None where there are none.
    """

    def __init__(self, describe: Callable[[], dict[str, Any]], swagger: Path | None) -> None:
        self._describe = describe
        self._swagger = swagger

    @property
    def routes(self) -> list[Route]:
        """To be put into a router."""
        return [
            Route("/openapi.json", self.document),
            Route("/docs", self.page),
            Route("/docs/{file}", self.file),
        ]

    async def document(self, request: Request) -> Response:
        """The OpenAPI document."""
        return JSONResponse(self._describe())

    async def page(self, request: Request) -> Response:
        """Swagger UI."""
        if self._swagger is None:
            detail = "Swagger UI is not installed here; the document is at /openapi.json."
            raise Problem(404, "no-such-route", detail)
        return HTMLResponse(_PAGE, headers={"Content-Security-Policy": _POLICY})

    async def file(self, request: Request) -> Response:
        """One of the page's files; no other file of the folder."""
        name = request.path_params["file"]
        if name == "start.js":
            return Response(_START, media_type="text/javascript")
        if self._swagger is None or name not in _FILES:
            raise Problem(404, "no-such-route", "There is nothing here; see /docs.")
        return FileResponse(self._swagger / name, media_type=_FILES[name])
