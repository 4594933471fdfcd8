"""Report: what evaluation found of one bundle, or of several side by side."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from moon.errors import UsageError
from moon.evaluation.measure import GROUPS
from moon.evaluation.words import percent
from moon.files import write_json, write_text

__all__ = ["BundleReport", "Report", "percent", "report_folder", "verdict"]

SCHEMA_VERSION = 1
Figures = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BundleReport:
    """What was found of one bundle; each part is plain JSON, rates in [0, 1].

    Attributes:
        model: name, version, classes, sparsity, nonzeros, weights, flops, bytes.
        backend: what ran the model.
        id: n, accuracy, ece over the in-distribution images.
        scores: by score name: near and far metrics with their sets, and aurc.
        gate: the gate and what it accepts and rejects; None for an uncalibrated bundle.
        plots: thinned curves and histograms, and example images.
        warnings: what a reader should know before trusting the figures.
        findings: what the figures mean: about, state (good, fair, bad, none) and text.
        corruptions: accuracy and abstain rate on corrupted known images; None if not measured.
        classes: by predicted class: n, abstain, right, near and far accepted.
        checks: overlapping images, what could not be checked, scores that are not finite.
    """

    model: Figures
    backend: Figures
    id: Figures
    scores: Figures
    gate: Figures | None
    plots: Figures
    warnings: tuple[str, ...] = ()
    findings: tuple[dict[str, str], ...] = ()
    corruptions: Figures | None = None
    classes: tuple[Figures, ...] = ()
    checks: Figures | None = None

    def to_json(self) -> Figures:
        return {
            "verdict": verdict(self.id, self.gate, self.scores),
            "id": self.id,
            "scores": self.scores,
            "gate": self.gate,
            "model": self.model,
            "backend": self.backend,
            "findings": list(self.findings),
            "warnings": list(self.warnings),
            "corruptions": self.corruptions,
            "classes": list(self.classes),
            "checks": self.checks,
            "plots": self.plots,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """One evaluation: the sets, and what was found of each bundle on them.

    Attributes:
        created: when, ISO 8601 in UTC.
        moon: version of moon.
        sets: by group (id, near, far), name -> source and number of images.
        bundles: one or more, in the order given.
        benchmark: name of the benchmark, and a line for each of its sets that is missing.
        jpeg: quality every image was re-encoded at, or None.
    """

    created: str
    moon: str
    sets: Figures
    bundles: tuple[BundleReport, ...]
    benchmark: Figures | None = None
    jpeg: int | None = None

    def to_json(self) -> Figures:
        """The content of report.json.

        The first bundle's parts are at the top level, so that a reader of one bundle's
        report also reads this; any further bundles are under ``compared``, alike.
        """
        first, *rest = self.bundles
        return {
            "schema_version": SCHEMA_VERSION,
            "created": self.created,
            "moon": self.moon,
            "sets": self.sets,
            "benchmark": self.benchmark,
            "jpeg": self.jpeg,
            **first.to_json(),
            "compared": [bundle.to_json() for bundle in rest],
        }

    def write(self, out: str | os.PathLike[str]) -> None:
        """Write report.json, report.html and plots/*.png into the folder ``out``.

        Raises:
            UsageError: ``out`` is a file.
            MoonError: could not be written.
        """
        from moon.evaluation.page import render
        from moon.evaluation.pictures import write_pictures

        folder = report_folder(out)
        plain = self.to_json()
        page = render(plain)
        write_json(folder / "report.json", plain)
        write_text(folder / "report.html", page)
        several = bool(plain["compared"])
        for i, bundle in enumerate((plain, *plain["compared"]), 1):
            write_pictures(bundle, folder / "plots", f"{i}-" if several else "")


def report_folder(out: str | os.PathLike[str]) -> Path:
    """The folder to write into, not yet made.

    Raises:
        UsageError: it is a file.
    """
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file", remedy="Name a folder for the report")
    return folder


def verdict(id: Figures, gate: Figures | None, scores: Figures) -> str:  # noqa: A002
    """The outcome in one or two plain sentences."""
    if gate is None:
        return _uncalibrated(id, scores)
    known = gate["id"]
    text = f"Accepts {percent(known['accept'])} of known inputs"
    if known["accuracy"] is not None:
        text += f" at {percent(known['accuracy'])} accuracy"
    caught = [
        f"{percent(gate[group]['reject'])} of {group}"
        for group in GROUPS
        if gate[group] is not None
    ]
    return f"{text}; catches {' and '.join(caught)} unknown inputs." if caught else f"{text}."


def _uncalibrated(id: Figures, scores: Figures) -> str:  # noqa: A002
    parts = ["Not calibrated: without a threshold it cannot tell known from unknown inputs yet"]
    if id["accuracy"] is not None:
        parts.append(f"It names {percent(id['accuracy'])} of known inputs rightly")
    best = []
    for group in GROUPS:
        found = {s[group]["auroc"]: name for name, s in scores.items() if s[group] is not None}
        if found:
            best.append(f"{percent(max(found))} of {group} (score {found[max(found)]})")
    if best:
        parts.append(f"Best AUROC: {' and '.join(best)}")
    return ". ".join(parts) + "."
