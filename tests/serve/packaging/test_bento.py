"""The bento is built, and answers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from moon.serve.packaging import package
from tests.bundles import images, make_bundle
from tests.serve.conftest import SIZE, encode, free_port

pytestmark = pytest.mark.slow


def test_the_bento_is_built_and_answers(tmp_path: Path) -> None:
    make_bundle(tmp_path / "tiny", size=SIZE, channels=3)
    package(tmp_path / "tiny", tmp_path / "out")
    token = "0123456789abcdef0123456789abcdef"
    (tmp_path / "token").write_text(token)
    variables = {
        **os.environ,
        "HOME": str(tmp_path),
        "BENTOML_HOME": str(tmp_path / "bentoml"),
        "BENTOML_DO_NOT_TRACK": "True",
        "MOON_TOKEN_FILE": str(tmp_path / "token"),
    }
    command = [sys.executable, "-m", "bentoml"]
    built = subprocess.run(
        [*command, "build", "bento"],
        cwd=tmp_path / "out", env=variables,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    assert list((tmp_path / "bentoml" / "bentos" / "moon").glob("*/src/bundle/model.onnx"))
    port = free_port()
    with (tmp_path / "log").open("wb") as log:
        serving = subprocess.Popen(
            [*command, "serve", "moon:latest", "--port", str(port)],
            env=variables, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
            _until_ready(client)
            image = {
                "content": encode(images(1, size=SIZE, channels=3)[0]),
                "headers": {"content-type": "image/png"},
            }
            assert client.post("/predict", **image).status_code == 401  # type: ignore[arg-type]
            client.headers["authorization"] = f"Bearer {token}"
            answer = client.post("/predict", **image)  # type: ignore[arg-type]
            assert answer.status_code == 200
            (prediction,) = answer.json()["predictions"]
            assert prediction["decision"] in ("accept", "abstain")
    finally:
        serving.terminate()
        serving.wait(30)


def _until_ready(client: httpx.Client) -> None:
    waiting = time.monotonic() + 60
    while True:
        try:
            if client.get("/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < waiting
        time.sleep(0.2)
