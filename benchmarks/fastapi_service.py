"""What FastAPI's own tutorial leads to, around the same Predictor: what to beat."""

from __future__ import annotations

import os
from typing import Annotated, Any

from fastapi import Body, FastAPI

from moon.runtime.predictor import Predictor

app = FastAPI()
predictor = Predictor.open(os.environ["STOCK_BUNDLE"])


@app.post("/predict")
def predict(image: Annotated[bytes, Body(media_type="image/jpeg")]) -> dict[str, Any]:
    (decision,) = predictor.predict([image])
    return decision.to_json()


@app.get("/readyz")
def ready() -> dict[str, str]:
    return {"status": "ok"}
