"""``moon serve``: answer predictions over HTTP."""

from __future__ import annotations

__all__ = ["LogFormat", "serve"]

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from moon.cli.console import note, print_json
from moon.cli.options import AsJson, Backend, Debug, Key


class LogFormat(str, Enum):
    text = "text"
    json = "json"


def serve(
    bundles: Annotated[
        list[str],
        typer.Argument(
            metavar="BUNDLE",
            help="Calibrated bundles, as BUNDLE or NAME=BUNDLE; the first is /predict.",
        ),
    ],
    host: Annotated[str, typer.Option("--host", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="The port; 0 takes a free one.")
    ] = 3000,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Worker processes.")] = 1,
    token_file: Annotated[
        Path | None,
        typer.Option(
            "--token-file",
            metavar="FILE",
            help="Holds the bearer token clients must send; needed beyond loopback.",
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            "--threshold", metavar="X", help="Accept scores >= X, not the calibrated one."
        ),
    ] = None,
    backend: Backend = "onnxruntime",
    log_format: Annotated[
        LogFormat, typer.Option("--log-format", help="Of stderr: text, or a JSON object a line.")
    ] = LogFormat.text,
    log_requests: Annotated[
        bool, typer.Option("--log-requests", help="Write a line to stderr for each request.")
    ] = False,
    drift_state: Annotated[
        Path | None,
        typer.Option(
            "--drift-state", metavar="FILE", help="Keeps the drift test when the service restarts."
        ),
    ] = None,
    key: Key = None,
    reload: Annotated[
        bool,
        typer.Option(
            "--reload/--no-reload",
            help="Take up a bundle that is replaced on disk, once it is verified and warm.",
        ),
    ] = True,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Serve bundles: POST an image to /predict, get a label or an abstention.

    With several, /predict/NAME asks one of them. A bundle that is exported or calibrated anew
    in its place is taken up without a failed request. Stops cleanly on Ctrl-C or SIGTERM:
    /readyz turns to 503, requests in flight finish.
    """
    from moon.serve.run import serve as run

    def announce(url: str) -> None:
        if as_json:
            more = {"bundles": bundles} if len(bundles) > 1 else {}
            print_json({"url": url, "bundle": bundles[0], **more, "workers": workers})
        else:
            print(f"Serving {', '.join(bundles)} at {url} (Ctrl-C stops it)", flush=True)

    run(
        bundles,
        host,
        port,
        workers,
        token_file,
        threshold,
        backend=backend,
        log_format=log_format.value,
        log_requests=log_requests,
        drift_state=drift_state,
        key=key,
        reload=reload,
        announce=announce,
        warn=lambda text: note(f"warning: {text}"),
    )
