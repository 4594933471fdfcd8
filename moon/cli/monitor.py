"""``moon monitor``: the dashboard and the alert rules for a service."""

from __future__ import annotations

__all__ = ["monitor"]

from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from moon.cli.console import output, print_json
from moon.cli.options import AsJson, Debug
from moon.errors import UsageError

_FILES = {
    "moon-alerts.yml": ("alerts.yml", "alert rules, for rule_files of prometheus.yml"),
    "moon-grafana.json": ("grafana.json", "a dashboard, to import into Grafana"),
}


def monitor(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write to.")],
    force: Annotated[
        bool, typer.Option("--force", help="Replace files of these names that differ.")
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write a Grafana dashboard and Prometheus alert rules for what moon serve tells.

    Prometheus is to scrape /metrics, with the token where there is one.
    """
    from moon.files import write_text

    assets = files("moon.serve").joinpath("assets")
    texts = {name: assets.joinpath(own).read_text("utf-8") for name, (own, _) in _FILES.items()}
    for name, text in texts.items():
        there = out / name
        if there.exists() and not force and there.read_text("utf-8", errors="replace") != text:
            raise UsageError(f"{there} is there already, and differs", remedy="Pass --force")
    for name, text in texts.items():
        write_text(out / name, text)
    if as_json:
        print_json({"files": [str(out / name) for name in texts]})
        return
    for name, (_, what) in _FILES.items():
        output().print(f"{out / name}: {what}", soft_wrap=True, markup=False)
