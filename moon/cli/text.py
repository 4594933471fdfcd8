"""How figures are written for people, in one place so that every table agrees."""

from __future__ import annotations

__all__ = [
    "count",
    "figure",
    "gate_line",
    "grid",
    "milliseconds",
    "on_cpu_line",
    "pairs",
    "percent",
    "rates",
    "share",
    "size",
]

from collections.abc import Iterable
from typing import Any

from rich import box
from rich.table import Table


def grid(*columns: str, right: Iterable[str] = ()) -> Table:
    """A table with a ruled header; the columns named in ``right`` hold figures."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    figures = set(right)
    for column in columns:
        justify = "right" if column in figures else "left"
        table.add_column(
            column,
            justify=justify,  # type: ignore[arg-type]
            overflow="fold",
            no_wrap=column in figures,
        )
    return table


def percent(value: float | None, digits: int = 1) -> str:
    """0.9512 -> ``95.1%``."""
    return "-" if value is None else f"{100 * value:.{digits}f}%"


def figure(value: float | None, digits: int = 3) -> str:
    """A float to so many significant digits, without an exponent where it can be."""
    return "-" if value is None else f"{value:.{digits}g}"


def milliseconds(value: float | None) -> str:
    """0.0123 ms and 123.4 ms alike with three significant digits."""
    if value is None:
        return "-"
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def size(count: int | None) -> str:
    """A number of bytes in the unit that suits it (1 KB = 1,000 bytes)."""
    if count is None:
        return "-"
    if count < 1000:
        return f"{count} B"
    value = float(count)
    for unit in ("KB", "MB", "GB"):
        value /= 1000
        if value < 1000 or unit == "GB":
            return f"{value:.3g} {unit}" if value < 100 else f"{value:.0f} {unit}"
    raise AssertionError("unreachable")


def count(value: float | None) -> str:
    """A large number of things: ``5.5 M``."""
    if value is None:
        return "-"
    for limit, unit in ((1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= limit:
            return (
                f"{value / limit:.3g}{unit}"
                if value < 100 * limit
                else f"{value / limit:.0f}{unit}"
            )
    return f"{value:g}"


def share(part: float, whole: float) -> str:
    """A part of a whole in percent; nothing of nothing is a dash."""
    return percent(part / whole) if whole else "-"


def rates(pair: Any) -> str:
    """``2.1% to 8.4%`` of an interval of rates, or a dash."""
    return "-" if not pair else f"{percent(pair[0])} to {percent(pair[1])}"


def pairs() -> Table:
    """A table without header: a name and what it is."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def gate_line(gate: Any) -> str:
    """One sentence on what a gate promises."""
    if gate is None:
        return "none: calibrate before predicting"
    what = f"{gate.score} >= {gate.threshold:.6g}"
    each = ""
    if gate.per_class is not None:
        low, high = gate.per_class.values.min(), gate.per_class.values.max()
        what = f"{gate.score} >= the predicted class's threshold, {low:.6g} to {high:.6g}"
        each = " predicted as each class"
    if gate.method == "risk":
        promise = f"error among accepted <= {percent(gate.risk)} with {percent(1 - gate.delta, 0)}"
    elif gate.method == "pac":
        promise = f"rejects <= {percent(gate.alpha)} of ID{each} with {percent(1 - gate.delta, 0)}"
    else:
        promise = f"rejects at most {percent(gate.alpha)} of ID{each} on average"
    return f"accept when {what} ({gate.method}, {promise}, n = {gate.n:,})"


def on_cpu_line(backend: dict[str, Any]) -> str:
    """What ONNX Runtime's CPU provider runs though another one was asked for; "" for nothing."""
    if backend.get("fell_back"):
        return f"ONNX Runtime's CPU provider runs it all: {backend['fell_back']}"
    left = backend.get("on_cpu") or []
    if not left:
        return ""
    more = f" and {len(left) - 3} more" if len(left) > 3 else ""
    return f"ONNX Runtime's CPU provider runs {', '.join(left[:3])}{more}"
