"""``moon verify``: is a bundle whole, and does it compute what it computed when written?"""

from __future__ import annotations

__all__ = ["verify"]

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from moon.cli.console import output, print_json, working
from moon.cli.options import AsJson, Debug, Key
from moon.cli.text import grid
from moon.errors import BundleError


def verify(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle to check.")],
    key: Key = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Check checksums, thresholds, and golden parity on every backend that can run here."""
    from moon.bundle import Bundle
    from moon.runtime.verify import verify as run

    if key is not None or not bundle.is_dir():
        Bundle.open(bundle, key=key)  # raises, saying what is wrong
    with working("Checking"):
        checks = run(bundle)
    good = all(check.ok for check in checks)
    if as_json:
        rows = [{"name": c.name, "ok": c.ok, "detail": c.detail} for c in checks]
        print_json({"bundle": str(bundle), "ok": good, "checks": rows})
    else:
        table = grid("check", "result", "detail")
        for check in checks:
            verdict = "[green]ok[/]" if check.ok else "[red]failed[/]"
            table.add_row(check.name, verdict, escape(check.detail))
        output().print(table)
    failed = next((check for check in checks if not check.ok), None)
    if failed is not None:
        raise BundleError(f"{bundle} fails the check {failed.name}: {failed.detail}")
