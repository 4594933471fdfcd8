"""``moon serve``: the real server, started and stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.cli.conftest import Moon, environment


@pytest.mark.parametrize("words", [[], ["--backend", "sparse"]])
def test_it_answers_and_stops(words: list[str], exported: Path, images: list[Path]) -> None:
    import json

    command = [
        sys.executable,
        "-m",
        "moon",
        "serve",
        str(exported),
        "--port",
        "0",
        "--json",
        *words,
    ]
    env = {**environment(), "MOON_SERVE_GRACE_SECONDS": "0"}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    try:
        assert server.stdout is not None
        text = ""
        while not text.endswith("}\n"):
            line = server.stdout.readline()
            assert line, "the server ended"
            text += line
        facts = json.loads(text)
        assert facts["bundle"] == str(exported)
        answer = httpx.post(
            f"{facts['url']}/predict",
            content=images[0].read_bytes(),
            headers={"content-type": "image/png"},
        )
        assert answer.status_code == 200
        assert answer.json()["predictions"][0]["decision"] in ("accept", "abstain")
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    finally:
        if server.poll() is None:
            os.kill(server.pid, signal.SIGKILL)
        server.wait(60)
        server.stdout.close()


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--host", "0.0.0.0"], 2, "Pass --token-file FILE"),
        (["--workers", "0"], 2, "'--workers'"),
        (["--port", "70000"], 2, "'--port'"),
        (["--token-file", "/nonexistent"], 2, "/nonexistent"),
        (["--backend", "none"], 1, "no backend is called none"),
    ],
)
def test_wrong_use(moon: Moon, exported: Path, words: list[str], code: int, text: str) -> None:
    result = moon("serve", exported, *words)
    assert result.code == code
    assert text in result.error
