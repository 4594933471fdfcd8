"""Run the service: one supervisor that holds the port, and its worker processes."""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from moon.errors import MissingExtraError, MoonError, UsageError
from moon.serve.address import bind, is_loopback, url_of

if TYPE_CHECKING:
    from moon.serve.settings import Settings

__all__ = ["read_token", "serve"]

GRACE_VARIABLE = "MOON_SERVE_GRACE_SECONDS"
SHORTEST_TOKEN = 16
PACKAGES = ("bentoml", "starlette", "uvicorn", "python_multipart", "prometheus_client")


def serve(
    bundle: str | os.PathLike[str],
    host: str = "127.0.0.1",
    port: int = 3000,
    workers: int = 1,
    token_file: str | os.PathLike[str] | None = None,
    threshold: float | None = None,
    *,
    backend: str = "onnxruntime",
    announce: Callable[[str], None] | None = None,
    warn: Callable[[str], None] | None = None,
) -> None:
    """Serve a bundle over HTTP until SIGTERM or ctrl-C, then return.

    After SIGTERM, requests are still answered for 5 s (the environment variable
    MOON_SERVE_GRACE_SECONDS sets another time) while /readyz says 503; then the server
    stops listening and finishes what is in flight. Ctrl-C leaves that time out.

    Args:
        bundle: path of the bundle.
        host: address or name to listen on.
        port: 0 takes any free one.
        workers: processes, each with a copy of the model.
        token_file: holds the token that clients must send; needed unless the host is a
            loopback address.
        threshold: overrides the bundle's calibrated one, or stands in for it.
        backend: what runs the model, see :data:`moon.runtime.backend.NAMES`.
        announce: called once with the address, when requests are answered; by default
            prints a line.
        warn: called with anything the user should know; by default a line on stderr.

    Raises:
        UsageError: no token, a bad token file, host, port or number of workers.
        BundleError: the bundle is missing or damaged, or not calibrated and no threshold.
        BackendError: the backend cannot run here.
        MissingExtraError: the extra ``serve``, or that of the backend, is not installed.
        MoonError: the port is taken, or the workers cannot start.
    """
    _require_extra()
    if workers < 1:
        raise UsageError(f"--workers must be 1 or more, got {workers}")
    token = None if token_file is None else read_token(token_file)
    if token is None and not is_loopback(host):
        raise UsageError(
            f"{host} can be reached from other machines, and there is no token",
            remedy="Pass --token-file FILE, or listen on --host 127.0.0.1",
        )
    warn = warn or _complain
    with _temporary_environment(), closing(bind(host, port)) as listener:
        name = _check_bundle(bundle, threshold, backend, warn)
        address = url_of(listener)
        say = announce or (lambda url: _say(f"Serving {name} at {url} (ctrl-C stops it)"))
        _supervise(
            listener,
            workers,
            _settings(os.fspath(bundle), threshold, token, workers, backend),
            lambda: say(address),
        )


def _settings(
    bundle: str, threshold: float | None, token: str | None, workers: int, backend: str
) -> Settings:
    from moon.serve.settings import Settings

    grace = os.environ.get(GRACE_VARIABLE, str(Settings.grace_seconds))
    try:
        seconds = float(grace)
    except ValueError as error:
        raise UsageError(f"{GRACE_VARIABLE} must be a number of seconds, got {grace!r}") from error
    return Settings(
        bundle=bundle,
        backend=backend,
        threshold=threshold,
        token=token,
        threads=max(1, min(8, (os.cpu_count() or 1) // workers)),
        grace_seconds=seconds,
        parent=os.getpid(),
    )


def _check_bundle(
    bundle: str | os.PathLike[str],
    threshold: float | None,
    backend: str,
    warn: Callable[[str], None],
) -> str:
    # Opened here only to fail early and with one line; each worker opens its own.
    from moon.runtime.predictor import Predictor

    opened = Predictor.open(bundle, backend=backend, threshold=threshold, warn=warn)
    return opened.bundle.manifest.name


def _supervise(
    listener: socket.socket, workers: int, settings: Settings, announce: Callable[[], None]
) -> None:
    from moon.serve.supervisor import Supervisor, configuration

    supervisor = Supervisor(configuration(settings, workers), [listener], announce)
    supervisor.run()
    if supervisor.failed:
        raise MoonError("the workers could not start", remedy="See the lines above for the cause")


def read_token(path: str | os.PathLike[str]) -> str:
    """The token in a file.

    Raises:
        UsageError: it cannot be read, or is not one word of enough characters.
    """
    try:
        token = Path(path).read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else "it is not ASCII text"
        raise UsageError(f"could not read the token file {os.fspath(path)}: {cause}") from error
    if len(token) < SHORTEST_TOKEN or not token.isprintable() or " " in token:
        raise UsageError(
            f"the token in {os.fspath(path)} must be one word of at least "
            f"{SHORTEST_TOKEN} characters",
            remedy="Make one with: openssl rand -hex 32",
        )
    return token


def _require_extra() -> None:
    for package in PACKAGES:
        try:
            # Finding the package is enough, and much faster than loading it.
            found = importlib.util.find_spec(package)
        except (ImportError, ValueError):
            found = None
        if found is None:
            raise MissingExtraError(package, "serve", "moon serve")


@contextmanager
def _temporary_environment() -> Iterator[None]:
    """Keep BentoML and the metrics out of the user's home, and let nobody report usage."""
    with tempfile.TemporaryDirectory(prefix="moon-serve-", ignore_cleanup_errors=True) as folder:
        metrics = Path(folder, "metrics")
        metrics.mkdir()
        ours = {
            "BENTOML_DO_NOT_TRACK": "True",
            "BENTOML_HOME": os.environ.get("BENTOML_HOME") or folder,
            "PROMETHEUS_MULTIPROC_DIR": str(metrics),
        }
        with _environment(ours):
            yield


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _complain(line: str) -> None:
    sys.stderr.write(f"moon: warning: {line}\n")
