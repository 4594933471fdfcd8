"""The report's plots as PNG files, for papers and slides, from the figures of report.json."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moon.files import write_bytes

__all__ = ["write_pictures"]

Figures = Mapping[str, Any]
_COLOURS = {"known": "#0b5fa5", "near": "#ad4a05", "far": "#6d35a0"}
_DASHES: tuple[Any, ...] = ("-", (0, (6, 3)), (0, (2, 2)), (0, (8, 3, 2, 3)), (0, (4, 2)))


def write_pictures(bundle: Figures, folder: Path, prefix: str = "") -> list[Path]:
    """Draw what there is to draw of one bundle; names start with ``prefix``.

    Raises:
        MoonError: could not be written.
    """
    written = []
    for name, draw, size in _drawings(bundle):
        path = folder / f"{prefix}{name}.png"
        write_bytes(path, _png(draw, size))
        written.append(path)
    return written


def _drawings(bundle: Figures) -> Iterator[tuple[str, Callable[[Any], None], tuple[float, float]]]:
    gate, plots = bundle["gate"], bundle["plots"]
    score = gate["score"] if gate else next(iter(bundle["scores"]))
    entry = plots["scores"][score]
    one = gate is not None and not gate["per_class"]
    if any(entry["roc"].values()):
        yield "roc", lambda figure: _roc(figure, entry["roc"], score, bundle), (5, 4.6)
    yield "scores", lambda figure: _scores(figure, entry["histogram"], score, one), (7, 4)
    if plots["reliability"] is not None:
        yield "reliability", lambda figure: _reliability(figure, bundle), (5, 4.6)
        yield "risk-coverage", lambda figure: _risk(figure, bundle), (5, 4.6)
    if bundle["corruptions"] is not None:
        yield "corruptions", lambda figure: _corruptions(figure, bundle), (11, 2.8)
    if gate is not None and bundle["classes"]:
        yield "classes", lambda figure: _classes(figure, bundle), (7, 4)


def _png(draw: Callable[[Any], None], size: tuple[float, float]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    draw(figure)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120, metadata={"Software": None})
    return file.getvalue()


def _roc(figure: Any, roc: Figures, score: str, bundle: Figures) -> None:
    axes = figure.subplots()
    for group in ("near", "far"):
        for i, (name, points) in enumerate(roc[group].items()):
            area = bundle["scores"][score][group]["sets"][name]["auroc"]
            label = f"{name} ({100 * area:.2f})"
            x, y = np.array(points).T
            axes.plot(x, y, color=_COLOURS[group], ls=_DASHES[i % 5], label=_plain(label))
    axes.plot([0, 1], [0, 1], color="grey", lw=0.7, ls=":")
    axes.set(xlabel="unknown accepted", ylabel="known accepted", title=f"ROC of {score} (AUROC %)")
    axes.legend(frameon=False, fontsize=8)


def _scores(figure: Any, histogram: Figures, score: str, one_threshold: bool) -> None:
    axes = figure.subplots()
    edges = np.array(histogram["edges"])
    known = _of_peak(histogram["id"])
    axes.stairs(known, edges, color=_COLOURS["known"], fill=True, alpha=0.25)
    axes.stairs(known, edges, color=_COLOURS["known"], label="known")
    for group in ("near", "far"):
        for i, (name, shares) in enumerate(histogram[group].items()):
            axes.stairs(shares, edges, color=_COLOURS[group], ls=_DASHES[i % 5], label=_plain(name))
    if histogram["line"] is not None:
        name = "threshold" if one_threshold else "95% of known"
        axes.axvline(histogram["line"], color="black", lw=1, ls="--", label=name)
    shown = score if histogram["scale"] == "linear" else f"log-odds of {score}"
    axes.set(xlabel=shown, ylabel="share, of the peak", title=f"Distribution of {score}")
    axes.legend(frameon=False, fontsize=8)


def _of_peak(shares: Any) -> Any:
    return np.array(shares) / (max(shares) or 1.0)


def _reliability(figure: Any, bundle: Figures) -> None:
    axes = figure.subplots()
    bins = bundle["plots"]["reliability"]
    rows = [
        (low, high, right)
        for low, high, right in zip(
            bins["edges"][:-1], bins["edges"][1:], bins["accuracy"], strict=True
        )
        if right is not None
    ]
    for low, high, right in rows:
        axes.bar((low + high) / 2, right, width=0.92 * (high - low), color=_COLOURS["known"])
    axes.plot([0, 1], [0, 1], color="grey", lw=0.7, ls=":")
    title = f"Reliability (ECE {100 * bundle['id']['ece']:.2f}%)"
    axes.set(xlabel="confidence", ylabel="accuracy", title=title, xlim=(0, 1), ylim=(0, 1))


def _risk(figure: Any, bundle: Figures) -> None:
    from moon.evaluation.page import best_aurc

    axes = figure.subplots()
    chosen = best_aurc(bundle["scores"], bundle["gate"]["score"] if bundle["gate"] else None)
    for i, name in enumerate(chosen):
        x, y = np.array(bundle["plots"]["scores"][name]["risk_coverage"]).T
        axes.plot(x, y, ls=_DASHES[i % 5], label=name)
    axes.set(
        xlabel="known inputs accepted", ylabel="error among accepted", title="Risk and coverage"
    )
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8, ncols=2)


def _corruptions(figure: Any, bundle: Figures) -> None:
    from moon.evaluation.corruption_plot import LINES

    corruptions = bundle["corruptions"]
    panels = figure.subplots(1, len(corruptions["kinds"]), sharey=True)
    for axes, (kind, rows) in zip(panels, corruptions["kinds"].items(), strict=True):
        for name, (css, words) in LINES.items():
            values = [corruptions["clean"][name], *(row[name] for row in rows)]
            if any(value is None for value in values):
                continue
            group, _, dash = css.partition(" dash")
            axes.plot(values, color=_COLOURS[group], ls=_DASHES[int(dash or 0)], label=words)
        axes.set(title=kind, xlabel="strength", ylim=(-0.02, 1.02))
    panels[0].set_ylabel("share of the images")
    panels[0].legend(frameon=False, fontsize=7)


def _classes(figure: Any, bundle: Figures) -> None:
    axes = figure.subplots()
    judged = [one for one in bundle["classes"] if one["abstain"] is not None]
    worst = sorted(judged, key=lambda one: -one["abstain"])[:30]
    names = [_plain(one["name"]) for one in worst]
    axes.bar(range(len(worst)), [one["abstain"] for one in worst], color=_COLOURS["known"])
    axes.set_xticks(range(len(worst)), names, rotation=60 if len(worst) > 10 else 0, fontsize=8)
    axes.set(ylabel="rejected", title="Known images rejected, by predicted class")


def _plain(text: str) -> str:
    """Without what matplotlib would read as mathematics, or hide."""
    return text.replace("$", r"\$").lstrip("_")
