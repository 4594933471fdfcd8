"""The BentoML service: its life cycle and tracing around our own routes.

The only module that knows BentoML. Of what BentoML does by itself we keep the service's
life cycle, its configuration and its OpenTelemetry tracing; its routes never see a
request, since they fetch URLs, take pickles and load a tracking script in the index page.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Receive, Scope, Send

from moon.serve.app import MoonApp
from moon.serve.engine import Engine
from moon.serve.settings import Settings

# Read once, when BentoML first wants to report usage.
os.environ["BENTOML_DO_NOT_TRACK"] = "True"

import bentoml

if TYPE_CHECKING:
    from moon.runtime.predictor import Predictor

__all__ = ["asgi_app", "build_service"]

_CONFIG: dict[str, Any] = {
    # Ours are exposed instead: BentoML's label every path a client thinks of.
    "metrics": {"enabled": False},
    "logging": {"access": {"enabled": False}},
    "http": {"cors": {"enabled": False}},
    "runner_probe": {"enabled": False},
}


class _Front:
    """Answers every request before BentoML's own routes could."""

    def __init__(self, app: ASGIApp, ours: ASGIApp) -> None:
        self.app = app
        self.ours = ours

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answers = self.app if scope["type"] == "lifespan" else self.ours
        await answers(scope, receive, send)


def build_service(predictor: Predictor, settings: Settings) -> bentoml.Service[Any]:
    """A BentoML service that decides with a predictor."""
    engine = Engine(predictor, threads=settings.threads, limits=settings.limits)
    ours = MoonApp(engine, settings)

    class Moon:
        @bentoml.on_startup  # type: ignore[untyped-decorator]
        async def begin(self) -> None:
            engine.warm_up()
            ours.lifecycle.start(grace_seconds=settings.grace_seconds, parent=settings.parent)

        @bentoml.on_shutdown  # type: ignore[untyped-decorator]
        async def end(self) -> None:
            ours.lifecycle.stop()
            engine.close()
            ours.close()

    service = bentoml.service(name="moon", **_CONFIG)(Moon)
    service.add_asgi_middleware(_Front, ours=ours)
    return service


def asgi_app(predictor: Predictor, settings: Settings) -> ASGIApp:
    """The service as an ASGI application, for any server."""
    app: ASGIApp = build_service(predictor, settings).to_asgi()
    return app
