"""The plot of corrupted inputs: a panel a kind, from clean to the strongest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moon.evaluation import svg
from moon.evaluation.svg import Frame
from moon.evaluation.words import percent

__all__ = ["LINES", "corruption_plot"]

Figures = Mapping[str, Any]
# figure -> (its CSS class, what to call it)
LINES = {
    "accuracy": ("known", "right label"),
    "abstain": ("far dash1", "rejected"),
    "wrong_accepted": ("near dash2", "accepted with a wrong label"),
}
_PANEL, _GAP, _LEFT, _TOP, _HEIGHT = 118, 16, 52, 30, 150


def corruption_plot(corruptions: Figures) -> str:
    """Accuracy, abstain rate and accepted errors against strength, in shares of the images."""
    parts, said = [], []
    width = 0.0
    for i, (kind, rows) in enumerate(corruptions["kinds"].items()):
        left = _LEFT + i * (_PANEL + _GAP)
        width = left + _PANEL
        frame = Frame((0, 5), (0, 1), (left, _TOP, left + _PANEL, _TOP + _HEIGHT))
        parts.append(_panel(frame, kind, i == 0))
        for name, (css, words) in LINES.items():
            values = [corruptions["clean"][name], *(row[name] for row in rows)]
            if any(value is None for value in values):
                continue
            points = [frame.at(x, y) for x, y in enumerate(values)]
            title = f"{kind}, {words}: " + ", ".join(percent(value) for value in values)
            parts.append(svg.polyline(points, f"curve {css}", title))
            said.append(f"{kind} 5, {words} {percent(values[-1])}")
    label = f"Corrupted known images, by strength. {'; '.join(said)}."
    return svg.document(width + 14, _TOP + _HEIGHT + 44, label, "".join(parts))


def _panel(frame: Frame, kind: str, first: bool) -> str:
    left, top, right, _ = frame.box
    shown = [(i / 4, f"{25 * i}%") for i in range(5)]
    grid = frame.y_axis(shown if first else [(at, "") for at, _ in shown], "")
    ticks: list[svg.Tick] = [(i, str(i)) for i in range(6)]
    return (
        grid
        + frame.x_axis(ticks, "strength, 0: clean" if first else "strength")
        + svg.text((left + right) / 2, top - 12, kind, "row", anchor="middle")
    )
