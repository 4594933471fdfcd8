"""Small accessible SVG plots, coloured by the page's CSS classes so that themes apply.

Drawn here rather than by a plotting library: the text stays text, the colours follow light
and dark, and a page with a dozen plots is a few tens of kilobytes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["Frame", "document", "linear_ticks", "polyline", "probability_ticks", "text"]

Tick = tuple[float, str]


@dataclasses.dataclass(frozen=True)
class Frame:
    """A plotting area within a picture, and where data land in it.

    Attributes:
        x: data range from left to right.
        y: data range from bottom to top.
        box: left, top, right and bottom of the area in the picture's units.
    """

    x: tuple[float, float]
    y: tuple[float, float]
    box: tuple[float, float, float, float]

    def at_x(self, value: float) -> float:
        left, _, right, _ = self.box
        return left + (value - self.x[0]) / (self.x[1] - self.x[0]) * (right - left)

    def at_y(self, value: float) -> float:
        _, top, _, bottom = self.box
        return bottom - (value - self.y[0]) / (self.y[1] - self.y[0]) * (bottom - top)

    def at(self, x: float, y: float) -> str:
        return f"{_n(self.at_x(x))},{_n(self.at_y(y))}"

    def x_axis(self, ticks: Iterable[Tick], label: str) -> str:
        left, _, right, bottom = self.box
        parts = [line(left, bottom, right, bottom, "axis")]
        for value, shown in ticks:
            x = self.at_x(value)
            parts.append(line(x, bottom, x, bottom + 4, "axis"))
            parts.append(text(x, bottom + 17, shown, "tick", anchor="middle"))
        parts.append(text((left + right) / 2, bottom + 35, label, "label", anchor="middle"))
        return "".join(parts)

    def y_axis(self, ticks: Iterable[Tick], label: str) -> str:
        left, top, right, bottom = self.box
        parts = []
        for value, shown in ticks:
            y = self.at_y(value)
            parts.append(line(left, y, right, y, "grid"))
            parts.append(text(left - 7, y + 4, shown, "tick", anchor="end"))
        middle = (top + bottom) / 2
        turned = f'transform="rotate(-90 13 {_n(middle)})"'
        parts.append(text(13, middle, label, "label", anchor="middle", extra=turned))
        return "".join(parts)


def document(width: float, height: float, label: str, body: str) -> str:
    """A picture described to those who cannot see it by ``label``."""
    return (
        f'<svg viewBox="0 0 {_n(width)} {_n(height)}" role="img" aria-label="{escape(label)}" '
        f'xmlns="http://www.w3.org/2000/svg">{body}</svg>'
    )


def text(
    x: float, y: float, words: str, css: str, *, anchor: str = "start", extra: str = ""
) -> str:
    return (
        f'<text x="{_n(x)}" y="{_n(y)}" class="{css}" text-anchor="{anchor}" {extra}>'
        f"{escape(words)}</text>"
    )


def line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    return f'<line x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}" class="{css}"/>'


def rect(x: float, y: float, width: float, height: float, css: str, title: str = "") -> str:
    inside = f"<title>{escape(title)}</title>" if title else ""
    return (
        f'<rect x="{_n(x)}" y="{_n(y)}" width="{_n(max(width, 0))}" '
        f'height="{_n(max(height, 0))}" class="{css}">{inside}</rect>'
    )


def polyline(points: Sequence[str], css: str, title: str = "") -> str:
    inside = f"<title>{escape(title)}</title>" if title else ""
    return f'<polyline points="{" ".join(points)}" class="{css}">{inside}</polyline>'


def area(points: Sequence[str], css: str, title: str = "") -> str:
    inside = f"<title>{escape(title)}</title>" if title else ""
    return f'<polygon points="{" ".join(points)}" class="{css}">{inside}</polygon>'


def dot(x: float, y: float, css: str, title: str = "") -> str:
    inside = f"<title>{escape(title)}</title>" if title else ""
    return f'<circle cx="{_n(x)}" cy="{_n(y)}" r="4" class="{css}">{inside}</circle>'


def linear_ticks(low: float, high: float, about: int = 5) -> list[Tick]:
    """Round values from low to high, about so many."""
    span = high - low
    power = 10 ** math.floor(math.log10(span / about))
    step = min((m * power for m in (1, 2, 2.5, 5, 10)), key=lambda s: abs(span / s - about))
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    digits += round(step * 10**digits, 9) != round(step * 10**digits)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [(i * step, _minus(f"{i * step + 0.0:.{digits}f}")) for i in range(first, last + 1)]


def probability_ticks(low: float, high: float, *, negative: bool, most: int = 7) -> list[Tick]:
    """Round probabilities on an axis of log-odds from low to high, at most so many.

    Args:
        negative: the axis shows minus a probability, so its positions are minus log-odds.
    """
    nines = [(k * math.log(10) + math.log1p(-(10.0**-k)), k) for k in range(1, 17)]
    marks = [(0.0, "0.5")]
    marks += [(odds, f"{1 - 10.0**-k:.{k}f}" if k <= 4 else f"1−10{_up(-k)}") for odds, k in nines]
    marks += [(-odds, f"{10.0**-k:.{k}f}" if k <= 3 else f"10{_up(-k)}") for odds, k in nines]
    if negative:
        marks = [(-odds, f"−{shown}") for odds, shown in marks]
    inside = sorted((at, shown) for at, shown in marks if low <= at <= high)
    return inside[:: math.ceil(len(inside) / most)] if inside else []


def _up(power: int) -> str:
    return str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _minus(shown: str) -> str:
    return shown.replace("-", "−") if float(shown) else shown.lstrip("-")


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
