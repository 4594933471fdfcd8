"""How figures are written in a report's sentences and tables."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["asked", "count", "ends", "percent", "points", "precise", "size", "tail"]


def percent(value: float, digits: int = 1) -> str:
    """0.952 -> 95.2%; never rounded to a perfect 100% or 0% that it is not."""
    shown = f"{100 * value:.{digits}f}"
    full, none = f"{100:.{digits}f}", f"{0:.{digits}f}"
    step = 10**-digits
    if shown == full:
        return "100%" if value == 1 else f"over {100 - step:.{digits}f}%"
    if shown == none:
        return "0%" if value == 0 else f"under {step:.{digits}f}%"
    return f"{shown}%"


def points(value: float | None, digits: int = 2) -> str:
    """A rate in [0, 1] in percent without the sign, as tables of the field print it.

    With a second digit where one would make it a perfect 100 or 0 that it is not.
    """
    if value is None:
        return "–"
    shown = f"{100 * value:.{digits}f}"
    if digits == 1 and shown in ("100.0", "0.0") and value not in (0, 1):
        return f"{100 * value:.2f}"
    return shown


def ends(interval: Sequence[float] | None) -> str:
    """Both ends of an interval of a rate; two digits where it is too narrow for one."""
    if interval is None:
        return "–"
    low, high = interval
    digits = 1 if high - low >= 0.002 else 2
    return f"{100 * low:.{digits}f}–{100 * high:.{digits}f}"


def asked(rate: float) -> str:
    """A rate somebody chose, without digits they did not: 0.05 -> 5%."""
    return f"{100 * rate:.6g}%"


def precise(value: float) -> str:
    """A threshold to six significant digits."""
    return f"{value:.6g}".replace("-", "−")


def count(value: float | None) -> str:
    """5,480,123 -> 5.48 M."""
    if value is None:
        return "–"
    if value < 1000:
        return f"{value:g}"
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{_significant(value / limit)} {unit}"
    raise AssertionError("unreachable")


def size(value: int) -> str:
    """A number of bytes; 1 kB is 1,000 bytes."""
    return f"{count(value)}B" if value >= 1000 else f"{value} B"


def tail(source: str) -> str:
    """The end of an image's name, which tells it from its neighbours."""
    return source if len(source) <= 13 else "…" + source[-12:]


def _significant(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
