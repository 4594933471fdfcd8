"""Served decisions under load are those of the library, whatever came together."""

from __future__ import annotations

import base64
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from moon.bundle import Bundle
from moon.runtime.predictor import Predictor
from tests.bundles import images
from tests.serve.conftest import Server, encode

PNG = {"Content-Type": "image/png"}


@pytest.fixture(scope="module")
def known(predictor: Predictor) -> dict[bytes, dict[str, Any]]:
    """Image files, and what the library decides of each by itself."""
    files = [encode(pixels) for pixels in images(48, 32, 3, seed=21)]
    return {file: predictor.predict([file])[0].to_json() for file in files}


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in ("decision", "label", "reason"):
        assert found[name] == expected[name]
    # Numbers may differ in their last places, as batches of other sizes add in other orders.
    value, threshold = expected["score"]["value"], expected["score"]["threshold"]
    assert found["score"]["value"] == pytest.approx(value, rel=1e-4, abs=1e-4)
    assert found["score"]["threshold"] == threshold
    assert [one["p"] for one in found["top"]] == pytest.approx(
        [one["p"] for one in expected["top"]], abs=1e-4
    )


@pytest.mark.parametrize("clients", [1, 4, 24])
def test_decisions_are_those_of_the_library(
    server: Server, known: dict[bytes, dict[str, Any]], clients: int
) -> None:
    rng = random.Random(clients)
    groups = [rng.sample(list(known), rng.choice([1, 1, 1, 2, 5, 17])) for _ in range(120)]

    with server.client() as client, ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda group: asked(client, group), groups))
    for group, answer in zip(groups, answers, strict=True):
        assert answer.status_code == 200, answer.text
        for file, found in zip(group, answer.json()["predictions"], strict=True):
            same(found, known[file])


def asked(client: httpx.Client, group: list[bytes]) -> httpx.Response:
    if len(group) == 1:
        return client.post("/predict", content=group[0], headers=PNG)
    content = [{"b64": base64.b64encode(file).decode()} for file in group]
    return client.post("/predict", json={"instances": content})


def test_bad_neighbours_do_no_harm(server: Server, known: dict[bytes, dict[str, Any]]) -> None:
    files = list(known)
    broken = [b"text", files[0][:60], b""]
    order = [(files + broken)[i % (len(files) + 3)] for i in range(150)]
    with server.client() as client, ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda file: asked(client, [file]), order))
    for file, answer in zip(order, answers, strict=True):
        if file in known:
            assert answer.status_code == 200
            same(answer.json()["predictions"][0], known[file])
        else:
            assert answer.status_code == 400


def test_thresholds_of_the_images_themselves(
    tmp_path_factory: pytest.TempPathFactory, bundle: Bundle, known: dict[bytes, dict[str, Any]]
) -> None:
    # The least favourable case: the threshold is the score of one of the images, to the bit.
    scores = sorted(one["score"]["value"] for one in known.values())
    bar = scores[len(scores) // 2]
    predictor = Predictor.open(bundle, threshold=bar, warn=lambda _: None)
    files, sizes = list(known), (1, 3, 16, 48)
    expected = [predictor.predict([file])[0].to_json() for file in files]
    server = Server(tmp_path_factory.mktemp("bar"), str(bundle.path), "--threshold", repr(bar))
    try:
        with server.client() as client, ThreadPoolExecutor(12) as pool:
            groups = [files[i : i + size] for size in sizes for i in range(0, 48, size)]
            answers = list(pool.map(lambda group: asked(client, group), groups))
        for group, answer in zip(groups, answers, strict=True):
            for file, found in zip(group, answer.json()["predictions"], strict=True):
                same(found, expected[files.index(file)])
    finally:
        server.kill()
