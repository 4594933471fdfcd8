"""Bundles that change while they are served, and several at a time."""

from __future__ import annotations

import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import pytest

from moon.bundle import Bundle
from moon.errors import BundleError, UsageError
from moon.gate_calibration import calibrate_conformal
from moon.runtime.predictor import Predictor
from moon.serve.named import named_models
from moon.serve.run import serve as run_service
from tests.bundles import make_bundle
from tests.serve.conftest import SIZE, Server, until
from tests.serve.crowd import crowd

PNG = {"Content-Type": "image/png"}
Start = Callable[..., Server]


def write(path: Path, seed: int, **options: object) -> str:
    """A bundle at this place; its version."""
    made = make_bundle(path, size=SIZE, channels=3, seed=seed, force=True, **options)  # type: ignore[arg-type]
    return made.manifest.version


@pytest.fixture
def served(tmp_path: Path) -> Path:
    """A bundle of one's own to change."""
    write(tmp_path / "model", 1)
    return tmp_path / "model"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Server] = []

    def run(*words: object, **environment: str) -> Server:
        folder = tmp_path / f"server{len(started)}"
        folder.mkdir()
        started.append(Server(folder, *map(str, words), **environment))
        return started[-1]

    yield run
    for server in started:
        server.kill()


def asking(server: Server, picture: bytes) -> AbstractContextManager[Counter[Hashable]]:
    """Two clients; how often which status and version were answered."""

    def ask(client: httpx.Client) -> tuple[int, str]:
        answer = client.post("/predict", content=picture, headers=PNG)
        plain = answer.json()
        return answer.status_code, (
            plain["model"]["version"] if answer.is_success else plain["type"]
        )

    return crowd(server.client, ask, clients=2)


def reloads(server: Server) -> dict[str, float]:
    """How many bundles were swapped in, and refused, by all workers."""
    found = {"swapped": 0.0, "refused": 0.0}
    with server.client() as client:
        for line in client.get("/metrics").text.splitlines():
            for result in found:
                if line.startswith("moon_reloads_total{") and f'result="{result}"' in line:
                    found[result] += float(line.split()[-1])
    return found


def test_a_new_version_answers_without_a_failed_request(
    start: Start, served: Path, pictures: list[bytes]
) -> None:
    old = Bundle.open(served).manifest.version
    server = start(served, "--workers", 2)
    with asking(server, pictures[0]) as answers:
        until(lambda: answers[200, old] > 20)
        new = write(served, 2)
        until(lambda: reloads(server)["swapped"] == 2)
        after = answers[200, new] + 40
        until(lambda: answers[200, new] > after)
        gone = answers[200, old]
        until(lambda: answers[200, new] > after + 40)
        assert answers[200, old] == gone
    assert set(answers) == {(200, old), (200, new)}
    with server.client() as client:
        text = client.get("/metrics").text
        body = client.post("/predict", content=pictures[0], headers=PNG).json()
    assert f'version="{new}"' in text and f'version="{old}"' not in text
    (expected,) = Predictor.open(served).predict([pictures[0]])
    assert body["predictions"][0]["score"]["value"] == pytest.approx(expected.score, rel=1e-5)
    assert server.stop() == 0


def test_another_threshold_is_taken_up(start: Start, served: Path, pictures: list[bytes]) -> None:
    server = start(served)
    bundle = Bundle.open(served)
    gate = bundle.gate()
    assert gate is not None
    again = bundle.with_gate(calibrate_conformal(gate.scores, alpha=0.9, score=gate.score))
    raised = again.gate()
    assert raised is not None and raised.threshold > gate.threshold

    def threshold() -> float:
        with server.client() as client:
            body = client.post("/predict", content=pictures[0], headers=PNG).json()
        found: float = body["predictions"][0]["score"]["threshold"]
        return found

    until(lambda: threshold() == pytest.approx(raised.threshold))


def half_copied(path: Path) -> None:
    """A new version whose manifest came before its model."""
    new = path.with_name("half")
    write(new, 3)
    shutil.copy(new / "manifest.json", path / "manifest.json")


def uncalibrated(path: Path) -> None:
    write(path, 3, calibrated=False)


@pytest.mark.parametrize(
    ("damage", "said"),
    [(half_copied, "is damaged"), (uncalibrated, "is not calibrated")],
)
def test_a_bad_one_is_refused_and_the_old_one_stays(
    start: Start,
    served: Path,
    pictures: list[bytes],
    damage: Callable[[Path], None],
    said: str,
) -> None:
    old = Bundle.open(served).manifest.version
    server = start(served)
    with asking(server, pictures[0]) as answers:
        until(lambda: answers[200, old] > 5)
        damage(served)
        until(lambda: reloads(server)["refused"] == 1)
        time.sleep(1.5)  # it is not tried again and again
        assert reloads(server) == {"refused": 1, "swapped": 0}
        more = answers[200, old] + 10
        until(lambda: answers[200, old] > more)
        new = write(served, 4)
        until(lambda: answers[200, new] > 5)
    assert set(answers) == {(200, old), (200, new)}
    assert "was not reloaded, the old one stays" in server.errors()
    assert re.search(said, server.errors())


def test_a_copy_is_taken_up_when_it_is_complete(
    start: Start, served: Path, tmp_path: Path, pictures: list[bytes]
) -> None:
    server = start(served)
    new = write(tmp_path / "new", 7)
    shutil.copy(tmp_path / "new" / "manifest.json", served)  # comes first, and the rest later
    until(lambda: reloads(server)["refused"] == 1)
    for path in (tmp_path / "new").iterdir():
        if path.name != "manifest.json":
            shutil.copy(path, served)
    until(lambda: reloads(server)["swapped"] == 1)
    with server.client() as client:
        body = client.post("/predict", content=pictures[0], headers=PNG).json()
    assert body["model"]["version"] == new


def test_a_bundle_that_is_gone_still_answers(
    start: Start, served: Path, pictures: list[bytes]
) -> None:
    old = Bundle.open(served).manifest.version
    server = start(served)
    shutil.rmtree(served)
    time.sleep(1.5)
    with server.client() as client:
        assert client.get("/readyz").status_code == 200
        body = client.post("/predict", content=pictures[0], headers=PNG).json()
    assert body["model"]["version"] == old and not server.errors()


def test_without_reload_nothing_changes(start: Start, served: Path, pictures: list[bytes]) -> None:
    old = Bundle.open(served).manifest.version
    server = start(served, "--no-reload")
    write(served, 2)
    time.sleep(1.5)
    with server.client() as client:
        body = client.post("/predict", content=pictures[0], headers=PNG).json()
    assert body["model"]["version"] == old


def test_what_is_not_signed_is_not_taken_up(
    start: Start, served: Path, tmp_path: Path, pictures: list[bytes]
) -> None:
    pytest.importorskip("cryptography")
    from moon.signature import sign
    from tests.test_signature import Keys

    keys = Keys(tmp_path, "mine")
    with pytest.raises(BundleError, match="is not signed"):
        run_service(served, port=0, key=keys.public)
    sign(served, keys.private)
    server = start(served, "--key", keys.public)
    write(served, 2)
    until(lambda: reloads(server)["refused"] == 1)
    assert "is not signed" in server.errors()
    sign(served, keys.private)  # it is looked at again, though the manifest is the same
    version = Bundle.open(served).manifest.version

    def answers() -> str:
        with server.client() as client:
            body = client.post("/predict", content=pictures[0], headers=PNG).json()
        found: str = body["model"]["version"]
        return found

    until(lambda: answers() == version)


def test_several_models_by_name(
    start: Start, served: Path, tmp_path: Path, pictures: list[bytes]
) -> None:
    versions = {"tiny": Bundle.open(served).manifest.version}
    versions["other"] = write(tmp_path / "two", 5)
    server = start(served, f"other={tmp_path / 'two'}")
    with server.client(headers=PNG) as client:
        for path, name in (("", "tiny"), ("/tiny", "tiny"), ("/other", "other")):
            body = client.post(f"/predict{path}", content=pictures[0]).json()
            assert body["model"] == {"name": name, "version": versions[name]}
        assert client.post("/predict/none", content=pictures[0]).status_code == 404
        for name in versions:
            assert client.get(f"/v2/models/{name}").json()["versions"] == [versions[name]]
        models = client.get("/").json()["models"]
        text = client.get("/metrics").text
    assert {model["name"]: model["version"] for model in models} == versions
    for name in versions:
        for figure in ("moon_decisions_total", "moon_drift_images", "moon_score_count"):
            assert any(
                line.startswith(f"{figure}{{") and f'model="{name}"' in line
                for line in text.splitlines()
            ), (figure, name)
    assert 'moon_drift_images{model="tiny"} 2.0' in text
    assert 'moon_drift_images{model="other"} 1.0' in text
    # One of them changes, and only that one.
    versions["other"] = write(tmp_path / "two", 6)
    with server.client() as client:
        until(lambda: client.get("/v2/models/other").json()["versions"] == [versions["other"]])
        assert client.get("/v2/models/tiny").json()["versions"] == [versions["tiny"]]


def test_names_on_the_command_line(served: Path, tmp_path: Path) -> None:
    odd = tmp_path / "a=b"
    shutil.copytree(served, odd)
    found = named_models([served, f"two={served}", f"x.y={odd}"], Predictor.open)
    assert [(one.name, one.bundle) for one in found] == [
        ("tiny", str(served)), ("two", str(served)), ("x.y", str(odd))
    ]  # fmt: skip
    assert named_models([odd], Predictor.open)[0].bundle == str(odd)
    with pytest.raises(UsageError, match=r"are both called tiny.*other="):
        named_models([served, odd], Predictor.open)
    with pytest.raises(UsageError, match="no bundle"):
        named_models([], Predictor.open)


def test_one_threshold_is_not_that_of_two_models(served: Path) -> None:
    with pytest.raises(UsageError, match="one threshold cannot be that of 2 models"):
        run_service([served, f"two={served}"], port=0, threshold=1.0)
