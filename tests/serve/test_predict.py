"""/predict of a real server, asked with a real client."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from moon.bundle import Bundle
from moon.runtime.predictor import Predictor
from tests.serve.conftest import Server


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def raw(client: httpx.Client, picture: bytes) -> httpx.Response:
    return client.post("/predict", content=picture, headers={"Content-Type": "image/png"})


def instances(*pictures: bytes) -> dict[str, Any]:
    return {"instances": [{"b64": base64.b64encode(picture).decode()} for picture in pictures]}


def offline(predictor: Predictor, *pictures: bytes) -> list[dict[str, Any]]:
    """Decisions of the library on the same bytes, ``input`` left out."""
    found = [decision.to_json() for decision in predictor.predict(list(pictures))]
    return [unnamed(prediction) for prediction in found]


def unnamed(prediction: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in prediction.items() if name != "input"}


def test_raw_image(
    client: httpx.Client, pictures: list[bytes], predictor: Predictor, bundle: Bundle
) -> None:
    response = raw(client, pictures[0])
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    answer = response.json()
    assert answer["id"] == response.headers["x-request-id"]
    assert answer["model"] == {"name": "tiny", "version": bundle.manifest.version}
    (prediction,) = answer["predictions"]
    assert prediction["input"] is None
    assert unnamed(prediction) == offline(predictor, pictures[0])[0]


def test_both_decisions_occur(
    client: httpx.Client, pictures: list[bytes], predictor: Predictor
) -> None:
    answer = client.post("/predict", json=instances(*pictures)).json()["predictions"]
    assert {prediction["decision"] for prediction in answer} == {"accept", "abstain"}
    for prediction in answer:
        assert (prediction["label"] is None) == (prediction["decision"] == "abstain")
        assert (prediction["reason"] is None) == (prediction["decision"] == "accept")
    assert [prediction["input"] for prediction in answer] == list(range(len(pictures)))
    assert [unnamed(prediction) for prediction in answer] == offline(predictor, *pictures)


def test_multipart(client: httpx.Client, pictures: list[bytes], predictor: Predictor) -> None:
    files = [
        ("image", ("../../etc/a.png", pictures[0], "image/png")),
        ("image", ("b.jpg", pictures[-1], "application/octet-stream")),
    ]
    answer = client.post("/predict", files=files).json()["predictions"]
    assert [prediction["input"] for prediction in answer] == ["a.png", "b.jpg"]
    expected = offline(predictor, pictures[0], pictures[-1])
    assert [unnamed(prediction) for prediction in answer] == expected


def test_a_bad_image_does_not_spoil_the_others(
    client: httpx.Client, pictures: list[bytes], predictor: Predictor
) -> None:
    cut = pictures[-1][:200]
    body = instances(pictures[0], cut, b"text", b"", pictures[1])
    body["instances"].insert(2, {"b64": "not base64!"})
    response = client.post("/predict", json=body)
    assert response.status_code == 200
    answer = response.json()["predictions"]
    assert [unnamed(answer[0]), unnamed(answer[5])] == offline(predictor, pictures[0], pictures[1])
    assert [set(answer[i]) for i in (1, 2, 3, 4)] == [{"input", "error"}] * 4
    for index, cause in enumerate(["is truncated", "not valid base64", "not an image", "empty"], 1):
        assert cause in answer[index]["error"]
        assert answer[index]["input"] == index


def test_only_bad_images_are_an_error(client: httpx.Client) -> None:
    response = client.post("/predict", json=instances(b"one", b"two"))
    assert response.status_code == 400
    assert [error["input"] for error in response.json()["errors"]] == [0, 1]


def test_many_at_once_get_their_own_answers(
    server: Server, pictures: list[bytes], predictor: Predictor
) -> None:
    expected = [offline(predictor, picture)[0] for picture in pictures]
    order = [index % len(pictures) for index in range(200)]
    with server.client() as client, ThreadPoolExecutor(16) as pool:
        responses = list(pool.map(lambda index: raw(client, pictures[index]), order))
    assert [response.status_code for response in responses] == [200] * len(order)
    answers = [unnamed(response.json()["predictions"][0]) for response in responses]
    assert answers == [expected[index] for index in order]
    assert len({response.json()["id"] for response in responses}) == len(order)


def test_request_id_of_the_client_is_kept(client: httpx.Client, pictures: list[bytes]) -> None:
    def asked(request_id: str) -> str:
        headers = {"Content-Type": "image/png", "X-Request-ID": request_id}
        answer: str = client.post("/predict", content=pictures[0], headers=headers).json()["id"]
        return answer

    assert asked("trace-1.2_3") == "trace-1.2_3"
    for odd in ["", "a b", "x" * 65, "<script>"]:
        assert asked(odd).startswith("req-")


def test_routes_around(client: httpx.Client, pictures: list[bytes]) -> None:
    for path in ("/livez", "/readyz", "/healthz"):
        assert client.get(path).status_code == 200
    index = client.get("/")
    assert index.json()["service"] == "moon"
    assert "script" not in index.text
    assert raw(client, pictures[0]).status_code == 200
    metrics = client.get("/metrics").text
    assert 'moon_requests_total{route="/predict",status="200"}' in metrics
    assert 'moon_decisions_total{decision="' in metrics
    # BentoML's own routes stay out of reach.
    for path in ("/docs.json", "/schema.json", "/static_content/index.css", "/predict/"):
        assert client.get(path).status_code == 404


def test_answers_are_not_cached_or_sniffed(client: httpx.Client) -> None:
    for path in ("/", "/livez", "/nowhere"):
        headers = client.get(path, headers={"Origin": "https://example.org"}).headers
        assert headers["cache-control"] == "no-store"
        assert headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "access-control-allow-origin" not in headers
        assert "server" not in headers


def test_json_needs_no_spaces(client: httpx.Client, pictures: list[bytes]) -> None:
    body = json.dumps(instances(pictures[0]), separators=(",", ":"))
    headers = {"Content-Type": "application/json; charset=utf-8"}
    assert client.post("/predict", content=body, headers=headers).status_code == 200


def test_the_page_that_describes_the_api(client: httpx.Client) -> None:
    page = client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'; script-src 'self';" in policy
    assert "unsafe-eval" not in policy and "script-src 'self' 'unsafe-inline'" not in policy
    # Everything it loads is from here.
    assert "//" not in page.text
    for path in re.findall(r'(?:src|href)="([^"]+)"', page.text):
        assert client.get(path).status_code == 200
    for path in ("/docs/", "/docs/index.css", "/docs/%2e%2e%2fhttp_app.py"):
        assert client.get(path).status_code == 404
    described = client.get("/openapi.json").json()
    assert "/predict" in described["paths"]
    assert "securitySchemes" not in described["components"]
