"""The service BentoML's own tutorial leads to, around the same Predictor: what to beat."""

from __future__ import annotations

import os
from typing import Any

import bentoml
from PIL.Image import Image

from moon.runtime.predictor import Predictor


@bentoml.service
class Stock:
    def __init__(self) -> None:
        self.predictor = Predictor.open(os.environ["STOCK_BUNDLE"])

    @bentoml.api
    def predict(self, image: Image, /) -> dict[str, Any]:
        (decision,) = self.predictor.predict([image])
        return decision.to_json()
