"""``moon calibrate``: give a bundle its threshold, with a guarantee."""

from __future__ import annotations

__all__ = ["Method", "calibrate"]

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from moon.cli.choice import show_choice
from moon.cli.classes import show_classes
from moon.cli.console import note, output, print_json, working
from moon.cli.facts import gate_facts
from moon.cli.options import AsJson, Backend, Debug
from moon.cli.text import gate_line, pairs, percent, rates
from moon.errors import UsageError


class Method(str, Enum):
    conformal = "conformal"
    pac = "pac"
    risk = "risk"


def calibrate(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle, changed in place.")],
    data: Annotated[
        str,
        typer.Option(
            "--data", metavar="SOURCE", help="Held-out in-distribution images, never trained on."
        ),
    ],
    score: Annotated[
        str | None,
        typer.Option(
            "--score",
            metavar="NAME",
            help="The score to gate by, or auto to choose one; default the bundle's present one.",
        ),
    ] = None,
    ood: Annotated[
        list[str],
        typer.Option(
            "--ood",
            metavar="SOURCE",
            help="Out-of-distribution images to choose by with --score auto; may come again. "
            "Default: made from --data.",
        ),
    ] = [],  # noqa: B006
    reject: Annotated[
        float,
        typer.Option("--reject", help="Share of in-distribution images that may be rejected."),
    ] = 0.05,
    delta: Annotated[
        float, typer.Option("--delta", help="Chance that a pac or risk promise fails.")
    ] = 0.05,
    risk: Annotated[
        float | None,
        typer.Option(
            "--risk", metavar="R", help="Error allowed among accepted images; needs labels."
        ),
    ] = None,
    method: Annotated[
        Method | None,
        typer.Option("--method", help="The kind of promise.", show_default="conformal"),
    ] = None,
    per_class: Annotated[
        bool,
        typer.Option(
            "--per-class", help="A threshold for each predicted class, each with the promise."
        ),
    ] = False,
    backend: Backend = "onnxruntime",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Set a bundle's threshold from held-out in-distribution images.

    conformal: rejects at most the share --reject of such images, on average over
    calibrations. pac: the same for this calibration, with probability 1 - delta. risk: the
    error among accepted images stays at or below --risk, with probability 1 - delta.
    --per-class makes the first two hold for the images predicted as each class; classes
    predicted too seldom share a threshold. No promise is made on how many out-of-distribution
    images get through.

    --score auto takes a fifth of --data (at least 30, at most 2,000 images, the same each time)
    to compare the scores the bundle carries, by their AUROC against --ood or against images made
    from the known ones, and calibrates the best on the others. Of scores that may be as good as
    the best it takes the present one, else the simplest.
    """
    chosen = _method(method, risk)

    from moon.bundle import Bundle
    from moon.runtime.calibrate import calibrate as run

    warnings: list[str] = []
    with working("Opening the bundle") as progress:
        result = run(
            Bundle.open(bundle),
            data,
            score=score,
            ood=ood,
            reject=reject,
            method=chosen,
            delta=delta,
            risk=risk,
            per_class=per_class,
            backend=backend,
            progress=progress,
            warn=warnings.append,
        )
    for line in warnings:
        note(f"warning: {line}")
    gate = result.gate(backend)
    document = {
        "bundle": str(bundle),
        "version": result.manifest.version,
        "backend": backend,
        "gate": gate_facts(gate),
        "warnings": warnings,
    }
    if as_json:
        print_json(document)
    else:
        if score == "auto" and gate is not None:
            show_choice(output(), gate.choice)
        show_gate(gate)


def _method(method: Method | None, risk: float | None) -> str:
    if method is None:
        return "conformal" if risk is None else "risk"
    if method is Method.risk and risk is None:
        raise UsageError("--method risk needs the error to allow", remedy="Add --risk R, as 0.02")
    if method is not Method.risk and risk is not None:
        raise UsageError(
            f"--risk does not go with --method {method.value}", remedy="Leave --method out, or risk"
        )
    return str(method.value)


def show_gate(gate: Any) -> None:
    """Print a gate and what it promises."""
    console = output()
    table = pairs()
    table.add_row("Rule", gate_line(gate))
    if gate is not None:
        achieved = gate.achieved or {}
        if gate.per_class is None:
            table.add_row("Rejected here", percent(achieved.get("reject")))
            table.add_row("True rate, 95%", rates(achieved.get("ci95")))
        table.add_row("Images", f"{gate.n:,}")
    console.print(table)
    if gate is not None and gate.per_class is not None:
        console.print()
        show_classes(console, gate)
        console.print()
    console.print("No promise is made on how many out-of-distribution images are accepted.")
