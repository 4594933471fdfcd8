"""``moon verify``: is a bundle whole, and does it compute what it computed when written?"""

from __future__ import annotations

__all__ = ["verify"]

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from moon.cli.console import output, print_json, working
from moon.cli.options import AsJson, Debug, Key
from moon.cli.text import grid
from moon.errors import BundleError, UsageError


def verify(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle to check.")],
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="SOURCE",
            help="Real images: compare every backend with ONNX Runtime's CPU over them too.",
        ),
    ] = None,
    backends: Annotated[
        list[str],
        typer.Option(
            "--backend", metavar="NAME", help="Check this backend; repeatable. Default all here."
        ),
    ] = [],  # noqa: B006
    limit: Annotated[
        int | None,
        typer.Option("--limit", metavar="N", min=1, help="Compare over N images; default 1000."),
    ] = None,
    flips: Annotated[
        int | None,
        typer.Option(
            "--flips",
            metavar="N",
            min=0,
            help="Decisions that may differ beyond the tolerance; default 0, in fp16 0.5%.",
        ),
    ] = None,
    key: Key = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Check checksums, thresholds, and golden parity on every backend that can run here.

    With --data also the decisions over real images, on the machine that is to run the model:
    each backend by its gate, against ONNX Runtime on the CPU by the default gate.
    """
    from moon.bundle import Bundle
    from moon.runtime.verify import verify as run

    if data is None and (limit is not None or flips is not None):
        raise UsageError("--limit and --flips need --data", remedy="Name images with --data SOURCE")
    if key is not None or not bundle.is_dir():
        Bundle.open(bundle, key=key)  # raises, saying what is wrong
    with working("Checking") as progress:
        checks = run(bundle, data, backends=backends, limit=limit, flips=flips, progress=progress)
    good = all(check.ok for check in checks)
    if as_json:
        print_json({"bundle": str(bundle), "ok": good, "checks": [_row(c) for c in checks]})
    else:
        table = grid("check", "result", "detail")
        for check in checks:
            verdict = "[green]ok[/]" if check.ok else "[red]failed[/]"
            table.add_row(escape(check.name), verdict, escape(check.detail))
        output().print(table)
    failed = next((check for check in checks if not check.ok), None)
    if failed is not None:
        raise BundleError(
            f"{bundle} fails the check {failed.name}: {failed.detail}", remedy=failed.remedy
        )


def _row(check: Any) -> dict[str, Any]:
    row = {"name": check.name, "ok": check.ok, "detail": check.detail}
    return row if check.figures is None else {**row, "figures": dict(check.figures)}
