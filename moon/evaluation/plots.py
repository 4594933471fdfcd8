"""The plots of the report page, from the figures of report.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moon.evaluation import svg
from moon.evaluation.svg import Frame
from moon.evaluation.words import percent

__all__ = ["reliability_plot", "ridge_plot", "risk_plot", "roc_plot", "styles"]

Figures = Mapping[str, Any]
DASHES = 5


def styles(figures: Figures) -> dict[tuple[str, str], str]:
    """A CSS class for each (group, set): the group's colour and a dash of its own."""
    return {
        (group, name): f"{group} dash{i % DASHES}"
        for group in ("near", "far")
        for i, name in enumerate(figures.get(group) or {})
    }


def ridge_plot(score: str, histogram: Figures, gate: Figures | None, metrics: Figures) -> str:
    """A row a set: how its scores spread, and what share lies right of the line.

    The line is the gate's threshold; for another score, and for a gate with a threshold a class,
    which come without ``gate``, it is the point right of which 95% of the known inputs lie.
    """
    rows = list(_ridge_rows(histogram, gate, metrics))
    edges = histogram["edges"]
    row, top, left, right, width = 46, 30, 112, 612, 700
    bottom = top + row * len(rows)
    frame = Frame((edges[0], edges[-1]), (0, 1), (left, top, right, bottom))
    ticks = _score_ticks(histogram["scale"], edges[0], edges[-1])
    parts = [frame.x_axis(ticks, f"score {score}: higher is more like the known inputs")]
    for i, (name, css, shares, kept) in enumerate(rows):
        base = top + row * (i + 1)
        parts.append(_ridge(frame, edges, shares, base, row - 8, css, name))
        parts.append(svg.text(left - 10, base - 10, _short(name), f"row {css}-text", anchor="end"))
        parts.append(svg.text(width, base - 10, percent(kept), "figure", anchor="end"))
    parts.append(svg.text(width, top - 12, "right of line", "tick", anchor="end"))
    if histogram["line"] is not None:
        x = frame.at_x(min(max(histogram["line"], edges[0]), edges[-1]))
        name = "threshold" if gate else "95% of known"
        side, nudge = ("end", -6) if x > (left + right) / 2 else ("start", 6)
        parts.append(svg.line(x, top - 8, x, bottom, "threshold"))
        parts.append(svg.text(x + nudge, top - 12, name, "threshold-text", anchor=side))
    said = "; ".join(f"{name} {percent(kept)}" for name, _, _, kept in rows)
    label = f"Distribution of the score {score} in each set. Share right of the line: {said}."
    return svg.document(width, bottom + 44, label, "".join(parts))


def roc_plot(score: str, roc: Figures, gate: Figures | None, metrics: Figures) -> str:
    """Known inputs accepted against unknown inputs accepted, a curve a set."""
    frame = Frame((0, 1), (0, 1), (58, 12, 408, 322))
    ticks = [(i / 5, f"{i * 20}%") for i in range(6)]
    parts = [
        frame.y_axis(ticks, "known accepted"),
        frame.x_axis(ticks, "unknown accepted"),
        svg.polyline([frame.at(0, 0), frame.at(1, 1)], "chance"),
    ]
    said = []
    for (group, name), css in styles(roc).items():
        area = metrics[group]["sets"][name]["auroc"]
        title = f"{name}: AUROC {percent(area, 2)}"
        said.append(title)
        points = [frame.at(x, y) for x, y in roc[group][name]]
        parts.append(svg.polyline(points, f"curve {css}", title))
        if gate is not None:
            x, y = 1 - gate[group]["sets"][name]["reject"], gate["id"]["accept"]
            mark = f"The gate on {name}: accepts {percent(x)} of it and {percent(y)} of known"
            parts.append(svg.dot(frame.at_x(x), frame.at_y(y), f"mark {group}", mark))
    label = f"ROC curves of the score {score}. {'; '.join(said)}."
    return svg.document(430, 362, label, "".join(parts))


def reliability_plot(bins: Figures, ece: float) -> str:
    """Accuracy against confidence in bins, with how many inputs fall in each."""
    frame = Frame((0, 1), (0, 1), (58, 12, 408, 262))
    counts = Frame((0, 1), (0, max(bins["counts"])), (58, 274, 408, 322))
    ticks = [(i / 5, f"{i * 20}%") for i in range(6)]
    parts = [frame.y_axis(ticks, "right"), counts.x_axis(ticks, "confidence, and share of inputs")]
    edges, total = bins["edges"], sum(bins["counts"])
    for i, count in enumerate(bins["counts"]):
        if not count:
            continue
        x, width = frame.at_x(edges[i]) + 1, frame.at_x(edges[i + 1]) - frame.at_x(edges[i]) - 2
        right, confident = bins["accuracy"][i], bins["confidence"][i]
        title = (
            f"confidence {percent(confident)}: {percent(right)} right, "
            f"{count:,} inputs ({percent(count / total)})"
        )
        low, high = sorted((right, confident))
        few = " few" if count < 0.005 * total else ""
        gap = "over" if confident > right else "under"
        y, middle = frame.at_y(high), frame.at_y(low)
        parts.append(svg.rect(x, middle, width, 262 - middle, f"right{few}", title))
        parts.append(svg.rect(x, y, width, middle - y, f"{gap}{few}", title))
        y = counts.at_y(count)
        parts.append(svg.rect(x, y, width, 322 - y, "count", title))
    parts.append(svg.polyline([frame.at(0, 0), frame.at(1, 1)], "chance"))
    label = (
        f"Reliability diagram: accuracy against confidence in {len(bins['counts'])} bins. "
        f"Expected calibration error {percent(ece, 2)}."
    )
    return svg.document(430, 362, label, "".join(parts))


def risk_plot(curves: Mapping[str, Any], gate: Figures | None, aurcs: Mapping[str, float]) -> str:
    """Error among the accepted known inputs against the share accepted, a curve a score."""
    highest = max(risk for points in curves.values() for coverage, risk in points if coverage > 0.2)
    top = max(1.15 * highest, 0.01)
    frame = Frame((0, 1), (0, top), (58, 12, 408, 322))
    y_ticks = [(value, percent_tick(value, top)) for value, _ in svg.linear_ticks(0, top)]
    parts = [
        frame.y_axis(y_ticks, "error among accepted"),
        frame.x_axis([(i / 5, f"{i * 20}%") for i in range(6)], "known inputs accepted"),
    ]
    for i, (name, points) in enumerate(curves.items()):
        shown = [frame.at(coverage, min(risk, top)) for coverage, risk in points]
        title = f"{name}: AURC {percent(aurcs[name], 2)}"
        parts.append(svg.polyline(shown, f"curve known dash{i % DASHES}", title))
    if gate is not None and gate["id"]["accuracy"] is not None:
        coverage, risk = gate["id"]["accept"], 1 - gate["id"]["accuracy"]
        title = f"The gate: accepts {percent(coverage)} with {percent(risk)} errors"
        x, y = frame.at_x(coverage), frame.at_y(min(risk, top))
        parts.append(svg.dot(x, y, "mark known", title))
    said = "; ".join(f"{name} AURC {percent(value, 2)}" for name, value in aurcs.items())
    return svg.document(430, 362, f"Risk against coverage. {said}.", "".join(parts))


def percent_tick(value: float, top: float) -> str:
    digits = 0 if top >= 0.05 else 1 if top >= 0.02 else 2
    return f"{100 * value:.{digits}f}%"


def _ridge_rows(
    histogram: Figures, gate: Figures | None, metrics: Figures
) -> Iterator[tuple[str, str, list[float], float]]:
    yield "known", "known", histogram["id"], gate["id"]["accept"] if gate else 0.95
    for group in ("near", "far"):
        for name, shares in histogram[group].items():
            kept = (
                1 - gate[group]["sets"][name]["reject"]
                if gate
                else metrics[group]["sets"][name]["fpr95_id_pos"]
            )
            yield name, group, shares, kept


def _ridge(
    frame: Frame, edges: list[float], shares: list[float], base: float, height: float, css: str,
    name: str,
) -> str:  # fmt: skip
    peak = max(shares) or 1.0
    points = [f"{frame.at_x(edges[0]):.1f},{base}"]
    for i, share in enumerate(shares):
        y = base - height * share / peak
        points.append(f"{frame.at_x(edges[i]):.1f},{y:.1f}")
        points.append(f"{frame.at_x(edges[i + 1]):.1f},{y:.1f}")
    points.append(f"{frame.at_x(edges[-1]):.1f},{base}")
    left, _, right, _ = frame.box
    return svg.area(points, f"ridge {css}", name) + svg.line(left, base, right, base, "grid")


def _score_ticks(scale: str, low: float, high: float) -> list[svg.Tick]:
    if scale == "linear":
        return svg.linear_ticks(low, high, 6)
    return svg.probability_ticks(low, high, negative=scale.startswith("-"))


def _short(name: str) -> str:
    return name if len(name) <= 15 else f"{name[:14]}…"
