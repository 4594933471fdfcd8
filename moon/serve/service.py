"""The BentoML service: its life cycle and tracing around our own routes.

The only module that knows BentoML. Of what BentoML does by itself we keep the service's
life cycle, its configuration and its OpenTelemetry tracing; its routes never see a
request, since they fetch URLs, take pickles and load a tracking script in the index page.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Receive, Scope, Send

from moon.serve.app import MoonApp
from moon.serve.metrics import Metrics
from moon.serve.models import Model, Models
from moon.serve.reload import Reload
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

    def __init__(self, app: ASGIApp, ours: MoonApp) -> None:
        self.app = app
        self.ours = ours
        self.shedding = ours.shedding

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answers = self.app if scope["type"] == "lifespan" else self.ours
        await answers(scope, receive, send)


def build_service(predictors: Mapping[str, Predictor], settings: Settings) -> bentoml.Service[Any]:
    """A BentoML service that decides with predictors, each by the name of one served model."""
    service, ours = _built(predictors, settings)
    service.add_asgi_middleware(_Front, ours=ours)
    return service


def asgi_app(predictors: Mapping[str, Predictor], settings: Settings) -> ASGIApp:
    """The service as an ASGI application, for any server.

    Requests come to ours at once. As middleware of BentoML's application, which is what a bento
    takes, they would pass its tracing and timeouts first: a quarter of what a request costs.
    """
    service, ours = _built(predictors, settings)
    return _Front(service.to_asgi(), ours)


def _built(
    predictors: Mapping[str, Predictor], settings: Settings
) -> tuple[bentoml.Service[Any], MoonApp]:
    metrics = Metrics()
    named = (Model.of(name, one, settings, metrics) for name, one in predictors.items())
    models = Models(named, metrics)
    ours = MoonApp(models, settings, metrics, _swagger())
    reload = Reload(models, settings, metrics) if settings.reload else None

    class Moon:
        @bentoml.on_startup  # type: ignore[untyped-decorator]
        async def begin(self) -> None:
            models.warm_up()
            # What is there now stays. Looking through all of it for garbage again and again would
            # hold up every request for tens of milliseconds.
            gc.collect()
            gc.freeze()
            ours.lifecycle.start(grace_seconds=settings.grace_seconds, parent=settings.parent)
            if reload is not None:
                reload.start()

        @bentoml.on_shutdown  # type: ignore[untyped-decorator]
        async def end(self) -> None:
            ours.lifecycle.stop()
            if reload is not None:
                await reload.stop()
            models.close()
            ours.close()

    return bentoml.service(name="moon", **_CONFIG)(Moon), ours


def _swagger() -> Path | None:
    """Where BentoML keeps its copy of Swagger UI, if it does."""
    folder = Path(bentoml.__file__).parent / "_internal" / "server" / "static_content"
    return folder if (folder / "swagger-ui-bundle.js").is_file() else None
