"""``moon package``: files to run a bundle's service on other machines."""

from __future__ import annotations

__all__ = ["package"]

from pathlib import Path
from typing import Annotated

import typer

from moon.cli.console import output, print_json, working
from moon.cli.options import AsJson, Debug
from moon.cli.text import grid

_WHAT = {
    "Dockerfile": "a container of the service",
    "README.md": "what is here, and the commands",
    "bento/bentofile.yaml": "bentoml build bento",
    "bundle": "the model, checked again as it was copied",
    "kserve/inferenceservice.yaml": "the container as a KServe predictor",
    "kubernetes/kustomization.yaml": "kubectl apply --kustomize kubernetes",
    "nginx.conf": "two services on one machine, restarted one by one",
}


def package(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A calibrated bundle.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write.")],
    image: Annotated[
        str | None,
        typer.Option(
            "--image", metavar="NAME:TAG", help="The container's; default the model's name."
        ),
    ] = None,
    replicas: Annotated[
        int, typer.Option("--replicas", min=1, help="Pods at least; five times as many at most.")
    ] = 2,
    force: Annotated[
        bool, typer.Option("--force", help="Replace DIR if moon package made it.")
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write a container's recipe, Kubernetes and KServe manifests, and a bento of a bundle.

    Nothing is built, pushed or applied.
    """
    from moon.serve.packaging import package as write

    with working("Writing"):
        written = write(bundle, out, image=image, replicas=replicas, force=force)
    if as_json:
        print_json({"out": str(out), "files": written})
        return
    table = grid("file", "for")
    for name in written:
        if name in _WHAT:
            table.add_row(name, _WHAT[name])
    output().print(table)
