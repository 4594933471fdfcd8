"""The service's own ASGI application: every route, with nothing of BentoML in it."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from moon import __version__
from moon.serve.admission import Admission
from moon.serve.body import form_of
from moon.serve.engine import Deadline, Engine
from moon.serve.guard import Guard
from moon.serve.lifecycle import Lifecycle
from moon.serve.metrics import CONTENT_TYPE, metrics_of
from moon.serve.page import page
from moon.serve.problem import Problem
from moon.serve.schema import answer, model_of, readable
from moon.serve.settings import Settings
from moon.serve.tracing import Tracing
from moon.serve.watch import Watch

__all__ = ["MoonApp"]


class MoonApp:
    """Answers HTTP from an engine.

    Args:
        engine: reads and decides.
        settings: token and limits.

    Attributes:
        lifecycle: to be started and stopped by whoever runs the application.
    """

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine = engine
        self.settings = settings
        self.lifecycle = Lifecycle()
        self.metrics = metrics_of(engine.predictor, settings)
        self.tracing = Tracing.of_environment()
        engine.on_batch = self.metrics.batched
        self.admission = Admission(settings.limits)
        self.model = model_of(engine.predictor.bundle.manifest)
        routes = [
            Route("/", self.index),
            Route("/predict", self.predict, methods=["POST"]),
            Route("/livez", self.live),
            Route("/healthz", self.live),
            Route("/readyz", self.ready),
            Route("/metrics", self.prometheus),
            Route("/ui", page),
        ]
        guard = Guard(
            # A redirect to the path without its slash would repeat the client's Host header.
            Router(routes, redirect_slashes=False),
            routes=frozenset(route.path for route in routes),
            token=settings.token,
            lifecycle=self.lifecycle,
            metrics=self.metrics,
        )
        self._app: ASGIApp = Watch(guard, self.metrics, self.tracing)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Makes the router raise for a missing route or method, instead of answering itself.
        scope["app"] = self
        await self._app(scope, receive, send)

    def close(self) -> None:
        """Send and let go of what was gathered."""
        self.tracing.close()
        self.metrics.close()

    async def predict(self, request: Request) -> Response:
        """Decide the images of one request."""
        form = form_of(request.headers)
        self.admission.check()
        with self.admission.memory() as held:
            body = await self.admission.read(request, held)
            with self.admission.slot():
                deadline = Deadline(self.settings.limits.answer_seconds)
                items = await self.engine.read(form, body, deadline)
                good = readable(items)
                decisions = await self.engine.decide(good, deadline)
        self.metrics.decided(decisions, unreadable=len(items) - len(good))
        content = answer(request.state.request_id, self.model, items, decisions)
        return Response(content, media_type="application/json")

    async def index(self, request: Request) -> Response:
        """What this is and where to go on."""
        return JSONResponse(
            {
                "service": "moon",
                "version": __version__,
                "model": self.model,
                "predict": "POST /predict: image/*, multipart/form-data (image), "
                'or JSON {"instances": [{"b64": "..."}]}',
                "health": ["/livez", "/readyz", "/healthz"],
                "metrics": "/metrics",
                "page": "/ui",
            }
        )

    async def live(self, request: Request) -> Response:
        """The process runs."""
        return PlainTextResponse("ok\n")

    async def ready(self, request: Request) -> Response:
        """Requests are welcome; 503 while starting and while leaving."""
        if self.lifecycle.accepting:
            return PlainTextResponse("ready\n")
        state = "is stopping" if self.lifecycle.draining else "is not ready yet"
        raise Problem(503, "not-ready", f"The server {state}.", headers={"Retry-After": "1"})

    async def prometheus(self, request: Request) -> Response:
        """Counters of all workers."""
        return Response(self.metrics.exposition(), headers={"Content-Type": CONTENT_TYPE})
