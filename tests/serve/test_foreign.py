"""Programs of others against a real server: Triton's client, and schemathesis.

Both are looked for on PATH too, since they bring much that moon needs for nothing else: install
``tritonclient[http]`` and ``schemathesis``, wherever ``python`` and ``schemathesis`` are found.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from moon.runtime.predictor import Predictor
from tests.serve.conftest import SIZE, Server

pytestmark = pytest.mark.slow
PLACES = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def with_triton() -> str | None:
    """A Python that has Triton's client."""
    for python in (sys.executable, *(str(Path(place, "python")) for place in PLACES.split(":"))):
        asked = [python, "-c", "import tritonclient.http"]
        if shutil.which(python) and not subprocess.run(asked, capture_output=True).returncode:
            return python
    return None


def test_tritons_client(server: Server, predictor: Predictor) -> None:
    python = with_triton()
    if python is None:
        pytest.skip("tritonclient[http] is not installed")
    script = Path(__file__).with_name("triton_client.py")
    asked = [python, str(script), urlsplit(server.url).netloc, "tiny", str(SIZE)]
    found = subprocess.run(asked, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr
    accepted, scores = json.loads(found.stdout)
    pixels = np.random.default_rng(0).integers(0, 256, (5, SIZE, SIZE, 3), np.uint8)
    expected = predictor.decide(pixels)
    assert accepted == [one.accepted for one in expected]
    assert scores == pytest.approx([one.score for one in expected], abs=1e-4)


@pytest.mark.timeout(900)
def test_schemathesis(server: Server, tmp_path: Path) -> None:
    command = shutil.which("schemathesis", path=PLACES)
    if command is None:
        pytest.skip("schemathesis is not installed")
    asked = [
        command, "run", f"{server.url}/openapi.json", "--max-examples", "50", "--no-color",
        "--request-timeout", "30", "--wait-for-schema", "30",
        "--seed", os.environ.get("SCHEMATHESIS_SEED", "1"),
        # No schema can say which texts are images.
        "--exclude-checks", "positive_data_acceptance",
    ]  # fmt: skip
    found = subprocess.run(
        asked, capture_output=True, text=True, timeout=800, check=False, cwd=tmp_path
    )
    assert found.returncode == 0, found.stdout[-5000:]
