"""The Open Inference Protocol of a real server."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from moon.bundle import Bundle
from moon.runtime.predictor import Predictor
from tests.bundles import images
from tests.serve.conftest import Server

INFER = "/v2/models/tiny/infer"
LENGTH = "Inference-Header-Content-Length"


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def image(*pictures: bytes) -> dict[str, Any]:
    data = [base64.b64encode(picture).decode() for picture in pictures]
    return {"name": "image", "datatype": "BYTES", "shape": [len(data)], "data": data}


def outputs(response: httpx.Response) -> dict[str, list[Any]]:
    assert response.status_code == 200, response.text
    return {one["name"]: one["data"] for one in response.json()["outputs"]}


def test_about_the_server_and_its_model(client: httpx.Client, bundle: Bundle) -> None:
    assert client.get("/v2").json()["extensions"] == ["binary_tensor_data"]
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    version = bundle.manifest.version
    for path in ("/v2/models/tiny", f"/v2/models/tiny/versions/{version}"):
        told = client.get(path).json()
        assert (told["name"], told["versions"]) == ("tiny", [version])
        assert told["inputs"] == [{"name": "image", "datatype": "BYTES", "shape": [-1]}]
        assert {"name": "accept", "datatype": "BOOL", "shape": [-1]} in told["outputs"]
        assert client.get(f"{path}/ready").json() == {"name": "tiny", "ready": True}
    for path in ("/v2/models/other", "/v2/models/tiny/versions/1", "/v2/models/other/ready"):
        response = client.get(path)
        assert response.status_code == 404
        assert set(response.json()) == {"error"}


def test_image_files(client: httpx.Client, pictures: list[bytes], predictor: Predictor) -> None:
    response = client.post(INFER, json={"id": "mine", "inputs": [image(*pictures)]})
    told = response.json()
    assert (told["id"], told["model_name"]) == ("mine", "tiny")
    found = outputs(response)
    expected = predictor.predict(pictures)
    assert found["accept"] == [one.accepted for one in expected]
    # Nothing to act on where it abstained.
    assert found["label"] == [one.label or "" for one in expected]
    assert found["reason"] == [one.reason or "" for one in expected]
    assert found["score"] == pytest.approx([one.score for one in expected], abs=1e-4)
    assert found["threshold"] == [one.threshold for one in expected]
    assert found["top_label"] == [label for one in expected for label, _ in one.top]
    assert set(found["error"]) == {""}


def test_pixels(client: httpx.Client, predictor: Predictor) -> None:
    pixels = images(3, 32, 3, seed=4)
    tensor = {"name": "pixels", "datatype": "UINT8", "shape": list(pixels.shape)}
    wanted = {"outputs": [{"name": "score"}]}
    flat = client.post(
        INFER, json={"inputs": [{**tensor, "data": pixels.ravel().tolist()}], **wanted}
    )
    nested = client.post(INFER, json={"inputs": [{**tensor, "data": pixels.tolist()}], **wanted})
    head = json.dumps(
        {"inputs": [{**tensor, "parameters": {"binary_data_size": pixels.size}}], **wanted}
    ).encode()
    body = head + pixels.tobytes()
    binary = client.post(INFER, content=body, headers={LENGTH: str(len(head))})
    assert outputs(flat) == outputs(nested) == outputs(binary)
    expected = [one.score for one in predictor.decide(pixels)]
    assert outputs(flat)["score"] == pytest.approx(expected, abs=1e-4)


def test_binary_outputs(client: httpx.Client, pictures: list[bytes], predictor: Predictor) -> None:
    asked = {
        "inputs": [image(pictures[0], b"text")],
        "outputs": [
            {"name": "score"},
            {"name": "error", "parameters": {"binary_data": False}},
            {"name": "decision"},
        ],
        "parameters": {"binary_data_output": True},
    }
    response = client.post(INFER, json=asked)
    assert response.headers["content-type"] == "application/octet-stream"
    length = int(response.headers[LENGTH])
    told = json.loads(response.content[:length])["outputs"]
    sizes = [one.get("parameters", {}).get("binary_data_size") for one in told]
    (decision,) = predictor.predict([pictures[0]])
    word = b"accept" if decision.accepted else b"abstain"
    assert sizes == [8, None, 4 + len(word) + 4 + 5]
    data = response.content[length:]
    score, none = np.frombuffer(data[:8], "<f4")
    assert score == pytest.approx(decision.score, abs=1e-4)
    assert np.isnan(none)
    assert told[1]["data"][0] == ""
    assert "not an image" in told[1]["data"][1]
    assert data[8:] == struct.pack("<I", len(word)) + word + struct.pack("<I", 5) + b"error"


def test_an_image_that_cannot_be_read(client: httpx.Client, pictures: list[bytes]) -> None:
    found = outputs(client.post(INFER, json={"inputs": [image(pictures[0], b"text", pictures[0])]}))
    assert found["decision"][1] == "error"
    assert found["accept"][1] is False
    assert found["label"][1] == ""
    assert found["score"][1] is None
    assert found["decision"][0] == found["decision"][2] != "error"
    alone = client.post(INFER, json={"inputs": [image(b"text")]})
    assert alone.status_code == 400
    assert "not an image" in alone.json()["error"]
