"""The application around predictors, without a server."""

from __future__ import annotations

from typing import Any

from moon.runtime.predictor import Predictor
from moon.serve.app import MoonApp
from moon.serve.limits import Limits
from moon.serve.metrics import Metrics
from moon.serve.models import Model, Models
from moon.serve.settings import Served, Settings

__all__ = ["application", "settings_of"]


def settings_of(*predictors: Predictor, **settings: Any) -> Settings:
    """Settings for predictors, each called what its bundle says."""
    served = tuple(Served(one.bundle.manifest.name, str(one.bundle.path)) for one in predictors)
    return Settings(served=served, **{"threads": 2, "limits": Limits(), **settings})


def application(*predictors: Predictor, **settings: Any) -> MoonApp:
    """One worker's; whoever makes it closes its models and itself."""
    chosen = settings_of(*predictors, **settings)
    metrics = Metrics()
    models = Models(
        [
            Model.of(served.name, predictor, chosen, metrics)
            for served, predictor in zip(chosen.served, predictors, strict=True)
        ],
        metrics,
    )
    return MoonApp(models, chosen, metrics)
