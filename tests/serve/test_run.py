"""Starting: what is checked before the port is open to anyone."""

from __future__ import annotations

import importlib.util
import json
import socket
import subprocess
from pathlib import Path

import pytest

from moon.bundle import Bundle
from moon.errors import BundleError, MissingExtraError, MoonError, UsageError
from moon.serve import run
from tests.bundles import make_bundle
from tests.serve.conftest import COMMAND, Server, free_port

TOKEN = "0123456789abcdef"


def test_no_token_beyond_loopback(bundle: Bundle) -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        with pytest.raises(UsageError, match="no token") as caught:
            run.serve(bundle.path, host)
        assert "--token-file" in caught.value.remedy
        assert caught.value.exit_code == 2


@pytest.mark.parametrize("content", ["", "hunter2!", "two words of enough length", "\xe9" * 32])
def test_bad_token_files(bundle: Bundle, tmp_path: Path, content: str) -> None:
    path = tmp_path / "token"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(UsageError, match="token") as caught:
        run.serve(bundle.path, token_file=path)
    assert not content or content not in str(caught.value)


def test_missing_token_file(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="could not read the token file"):
        run.serve(bundle.path, token_file=tmp_path / "none")


def test_uncalibrated_bundle(tmp_path: Path) -> None:
    make_bundle(tmp_path / "b", calibrated=False)
    with pytest.raises(BundleError, match="moon calibrate"):
        run.serve(tmp_path / "b", port=free_port())


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../outside"])
def test_paths_out_of_the_bundle(tmp_path: Path, name: str) -> None:
    made = make_bundle(tmp_path / "b")
    manifest = json.loads((made.path / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"].pop("golden.npz")
    (made.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError):
        run.serve(made.path, port=free_port())


def test_links_out_of_the_bundle(tmp_path: Path) -> None:
    made = make_bundle(tmp_path / "b")
    (made.path / "golden.npz").rename(tmp_path / "outside")
    (made.path / "golden.npz").symlink_to(tmp_path / "outside")
    with pytest.raises(BundleError):
        run.serve(made.path, port=free_port())


def test_missing_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        run.serve(tmp_path / "none", port=free_port())


def test_taken_port(bundle: Bundle) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(MoonError, match="is taken") as caught:
            run.serve(bundle.path, port=taken.getsockname()[1])
    assert "--port" in caught.value.remedy


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"port": 65536}, "--port"),
        ({"port": -1}, "--port"),
        ({"workers": 0}, "--workers"),
        ({"host": ""}, "--host"),
        ({"host": "no such host"}, "--host"),
        ({"threshold": float("nan")}, "threshold"),
    ],
)
def test_wrong_options(bundle: Bundle, options: dict[str, object], cause: str) -> None:
    with pytest.raises(UsageError, match=cause):
        run.serve(bundle.path, **{"port": free_port(), **options})  # type: ignore[arg-type]


def test_wrong_grace_period(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("soon", "-1", "nan"):
        monkeypatch.setenv(run.GRACE_VARIABLE, value)
        with pytest.raises(UsageError, match=r"grace|GRACE"):
            run.serve(bundle.path, port=free_port())


def test_wrong_limit(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOON_SERVE_QUEUE", "lots")
    with pytest.raises(UsageError, match="MOON_SERVE_QUEUE"):
        run.serve(bundle.path, port=free_port())


def test_missing_extra(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bentoml" else find(name)
    )
    with pytest.raises(MissingExtraError, match=r"bentoml.*\[serve\]"):
        run.serve(bundle.path)


def test_command_fails_in_one_line(bundle: Bundle) -> None:
    asked = [*COMMAND, str(bundle.path), "--host", "0.0.0.0", "--port", str(free_port())]
    found = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == 2
    assert found.stdout == ""
    assert found.stderr.count("\n") == 1
    assert "--token-file" in found.stderr


def test_threshold_stands_in_for_calibration(tmp_path: Path) -> None:
    make_bundle(tmp_path / "b", calibrated=False, size=8)
    (tmp_path / "server").mkdir()
    server = Server(tmp_path / "server", str(tmp_path / "b"), "--threshold", "1e30")
    try:
        with server.client() as client:
            body = b"P5 8 8 255\n" + bytes(64)
            headers = {"Content-Type": "image/x-portable-graymap"}
            answer = client.post("/predict", content=body, headers=headers).json()
        (prediction,) = answer["predictions"]
        assert prediction["decision"] == "abstain"
        assert prediction["p_value"] is None
        assert server.stop() == 0
        assert server.errors().count("\n") == 1
        assert "no guarantee holds" in server.errors()
    finally:
        server.kill()
