"""The service's own ASGI application: every route, with nothing of BentoML in it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from moon import __version__
from moon.serve.admission import Admission
from moon.serve.api_page import ApiPage
from moon.serve.body import Encoded, Form, form_of, read_form
from moon.serve.guard import Guard
from moon.serve.intake import Intake
from moon.serve.lifecycle import Lifecycle
from moon.serve.metrics import CONTENT_TYPE, Metrics
from moon.serve.models import Models
from moon.serve.oip import OpenInference
from moon.serve.openapi import openapi
from moon.serve.page import page
from moon.serve.schema import answer
from moon.serve.settings import Settings
from moon.serve.shedding import Shedding
from moon.serve.tracing import Tracing
from moon.serve.watch import Watch

__all__ = ["MoonApp"]


class MoonApp:
    """Answers HTTP from an engine.

    Args:
        models: read and decide.
        settings: token and limits.
        metrics: of the worker.
        swagger: folder of Swagger UI's files; None leaves /docs out.

    Attributes:
        lifecycle: to be started and stopped by whoever runs the application.
        shedding: for a server that can refuse before it parses.
    """

    def __init__(
        self, models: Models, settings: Settings, metrics: Metrics, swagger: Path | None = None
    ) -> None:
        self.models = models
        self.settings = settings
        self.lifecycle = Lifecycle()
        self.metrics = metrics
        self.tracing = Tracing.of_environment()
        self.admission = Admission(settings.limits)
        self.intake = Intake(self.admission)
        self.shedding = Shedding(self.admission, self.lifecycle, metrics)
        routes = [
            Route("/", self.index),
            Route("/predict", self.predict, methods=["POST"]),
            Route("/predict/{model}", self.predict, methods=["POST"]),
            Route("/livez", self.live),
            Route("/healthz", self.live),
            Route("/readyz", self.ready),
            Route("/metrics", self.prometheus),
            Route("/ui", page),
            *OpenInference(models, self.intake, self.lifecycle).routes,
            *ApiPage(self._describe, swagger).routes,
        ]
        guard = Guard(
            # A redirect to the path without its slash would repeat the client's Host header.
            Router(routes, redirect_slashes=False),
            token=settings.token,
            lifecycle=self.lifecycle,
            metrics=self.metrics,
        )
        self._app: ASGIApp = Watch(guard, self.metrics, self.tracing)

    def close(self) -> None:
        """Send and let go of what was gathered."""
        self.tracing.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Makes the router raise for a missing route or method, instead of answering itself.
        scope["app"] = self
        await self._app(scope, receive, send)

    async def predict(self, request: Request) -> Response:
        """Decide the images of one request."""
        form = form_of(request.headers)
        model = self.models.get(request.path_params.get("model"))
        parse = partial(_parse, form, model.engine.limits.items)
        taken = await self.intake.take(request, model.engine, parse, quick=form.kind == "raw")
        items, decisions = taken.items, taken.decisions
        model.figures.decided(decisions, unreadable=len(items) - len(decisions))
        content = answer(request.state.request_id, model.facts, items, decisions)
        return Response(content, media_type="application/json")

    def _describe(self) -> dict[str, Any]:
        secured = self.settings.token is not None
        return openapi(self.settings.limits, self.models.get(), secured=secured)

    async def index(self, request: Request) -> Response:
        """What this is and where to go on."""
        return JSONResponse(
            {
                "service": "moon",
                "version": __version__,
                "model": self.models.get().facts,
                "models": [model.facts for model in self.models],
                "predict": "POST /predict, or /predict/MODEL: image/*, multipart/form-data "
                '(image), or JSON {"instances": [{"b64": "..."}]}',
                "open_inference_protocol": "/v2",
                "health": ["/livez", "/readyz", "/healthz"],
                "metrics": "/metrics",
                "openapi": "/openapi.json",
                "docs": "/docs",
                "page": "/ui",
            }
        )

    async def live(self, request: Request) -> Response:
        """The process runs."""
        return PlainTextResponse("ok\n")

    async def ready(self, request: Request) -> Response:
        """Requests are welcome; 503 while starting and while leaving."""
        self.lifecycle.check(self.models.working)
        return PlainTextResponse("ready\n")

    async def prometheus(self, request: Request) -> Response:
        """Counters of all workers."""
        return Response(self.metrics.exposition(), headers={"Content-Type": CONTENT_TYPE})


def _parse(form: Form, most: int, body: bytes) -> tuple[None, list[Encoded]]:
    return None, read_form(form, body, most)
