"""A server whose model the sparse engine runs."""

from __future__ import annotations

import base64
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

from moon.runtime.predictor import Predictor
from tests.runtime.sparse.exported import export
from tests.serve.conftest import Server, encode


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_engines_decisions(tmp_path: Path, workers: str, engine_cache: None) -> None:
    options = {"score": "ebo", "carry": [], "features": False, "p_values": False}
    bundle = export(tmp_path / "bundle", width=96, **options)
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8), np.uint8)
    pictures = [base64.b64encode(encode(one)).decode() for one in pixels]
    expected = Predictor.open(bundle).decide(pixels[..., None])
    server = Server(tmp_path, str(bundle.path), "--backend", "sparse", "--workers", workers)

    def ask(count: int) -> None:
        body = {"instances": [{"b64": picture} for picture in pictures[:count]]}
        answer = httpx.post(f"{server.url}/predict", json=body, timeout=30)
        assert answer.status_code == 200, answer.text
        for found, one in zip(answer.json()["predictions"], expected[:count], strict=True):
            assert found["decision"] == ("accept" if one.accepted else "abstain")
            assert found["label"] == one.label
            assert found["score"]["value"] == pytest.approx(one.score, rel=1e-4)

    try:
        with ThreadPoolExecutor(4) as callers:
            list(callers.map(ask, [1, 12, 5, 1, 7, 12, 2, 3]))
        assert server.stop() == 0
        assert server.errors() == ""  # nor a warning that ONNX Runtime runs it
    finally:
        server.kill()
