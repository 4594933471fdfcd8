"""Run the service: one supervisor that holds the port, and its worker processes."""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moon.errors import MissingExtraError, MoonError, UsageError
from moon.serve.address import bind, is_loopback, url_of

if TYPE_CHECKING:
    from moon.serve.settings import Served, Settings

__all__ = ["read_token", "serve"]

GRACE_VARIABLE = "MOON_SERVE_GRACE_SECONDS"
SHORTEST_TOKEN = 16
PACKAGES = (
    "bentoml", "starlette", "uvicorn", "httptools", "python_multipart", "prometheus_client",
    "opentelemetry.sdk",
)  # fmt: skip


def serve(
    bundles: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    host: str = "127.0.0.1",
    port: int = 3000,
    workers: int = 1,
    token_file: str | os.PathLike[str] | None = None,
    threshold: float | None = None,
    *,
    backend: str = "onnxruntime",
    key: str | os.PathLike[str] | None = None,
    reload: bool = True,
    log_format: str = "text",
    log_requests: bool = False,
    drift_state: str | os.PathLike[str] | None = None,
    announce: Callable[[str], None] | None = None,
    warn: Callable[[str], None] | None = None,
) -> None:
    """Serve bundles over HTTP until SIGTERM or ctrl-C, then return.

    After SIGTERM, requests are still answered for 5 s (the environment variable
    MOON_SERVE_GRACE_SECONDS sets another time) while /readyz says 503; then the server
    stops listening and finishes what is in flight. Ctrl-C leaves that time out.

    Args:
        bundles: paths, each plain or as NAME=PATH; the first answers where none is named.
        host: address or name to listen on.
        port: 0 takes any free one.
        workers: processes, each with a copy of the model.
        token_file: holds the token that clients must send; needed unless the host is a
            loopback address.
        threshold: overrides the calibrated one of a single bundle, or stands in for it.
        backend: what runs the models, see :data:`moon.runtime.backend.NAMES`.
        key: file of the public key that must have signed the bundles, also those to come.
        reload: take up a bundle that was replaced on disk, when it was verified and warmed.
        log_format: of stderr, ``text`` or ``json``.
        log_requests: whether each request gets a line there.
        drift_state: file that keeps the drift test across restarts; None starts it anew.
        announce: called once with the address, when requests are answered; by default
            prints a line.
        warn: called with anything the user should know; by default a line on stderr.

    Raises:
        UsageError: no token, a bad token file, host, port or number of workers.
        BundleError: the bundle is missing or damaged, or not calibrated and no threshold.
        BackendError: the backend cannot run here.
        MissingExtraError: an extra is not installed: ``serve``, the backend's, or ``otel``
            for traces that are asked for.
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
    listed = [bundles] if isinstance(bundles, str | os.PathLike) else list(bundles)
    if threshold is not None and len(listed) > 1:
        raise UsageError(
            f"one threshold cannot be that of {len(listed)} models",
            remedy="Leave --threshold out, and calibrate each",
        )
    _check_watching(drift_state)
    with _temporary_environment(), closing(bind(host, port)) as listener:
        from moon.runtime.predictor import Predictor
        from moon.serve.named import named_models

        # Opened here only to fail early and with one line; each worker opens its own.
        served = named_models(
            listed,
            lambda path: Predictor.open(
                path, backend=backend, threshold=threshold, key=key, warn=warn
            ),
        )
        settings = replace(
            _settings(served, threshold, token, workers, backend),
            key=None if key is None else str(Path(key).resolve()),
            reload=reload,
            log_format=log_format,
            log_requests=log_requests,
            drift_state=None if drift_state is None else str(Path(drift_state).resolve()),
        )
        address, names = url_of(listener), ", ".join(one.name for one in served)
        say = announce or (lambda url: _say(f"Serving {names} at {url} (ctrl-C stops it)"))
        _supervise(listener, workers, settings, lambda: say(address))


def _settings(
    served: tuple[Served, ...],
    threshold: float | None,
    token: str | None,
    workers: int,
    backend: str,
) -> Settings:
    from moon.serve.limits import Limits
    from moon.serve.settings import Settings

    grace = os.environ.get(GRACE_VARIABLE, str(Settings.grace_seconds))
    try:
        seconds = float(grace)
    except ValueError as error:
        raise UsageError(f"{GRACE_VARIABLE} must be a number of seconds, got {grace!r}") from error
    return Settings(
        served=served,
        backend=backend,
        threshold=threshold,
        token=token,
        threads=max(1, min(8, (os.cpu_count() or 1) // workers)),
        grace_seconds=seconds,
        limits=Limits.of(os.environ),
        parent=os.getpid(),
    )


def _check_watching(drift_state: str | os.PathLike[str] | None) -> None:
    # Each worker would fail at it, less readably.
    from moon.serve.tracing import check_tracing

    check_tracing()
    if drift_state is None:
        return
    try:
        Path(drift_state).touch(mode=0o600)
    except OSError as error:
        raise UsageError(
            f"could not write the drift test's state {drift_state}: {error.strerror}",
            remedy="Name a file in a folder that exists and can be written to",
        ) from error


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
