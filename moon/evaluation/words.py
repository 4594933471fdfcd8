"""How rates are written in a report's sentences."""

from __future__ import annotations

__all__ = ["percent"]


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
