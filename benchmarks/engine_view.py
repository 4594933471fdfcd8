"""The table and the picture of benchmarks/engine.py."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from spread import Grid

COLOURS = {
    "moon": "#3b5bdb",
    "deepsparse": "#e8590c",
    "openvino": "#7048a8",
    "onnxruntime": "#868e96",
}
MOON = "moon"
MB = 1e6


def show(result: Mapping[str, Any]) -> None:
    options = result["options"]
    rows = [
        _row(model, engine, figures)
        for model in result["models"]
        for engine, figures in model["engines"].items()
    ]
    Grid(
        title=f"batch {options['batch']}, {options['threads']} threads, milliseconds a call by the"
        f" {options['clock']} clock",
        columns=("model", "left", "engine", "best", "median", "first", "times moon, 95%", "GMAC/s",
                 "of registers", "of memory", "agrees", "load s", "cold", "loaded MB", "peak MB"),
        rows=rows,
        texts=3,
        notes=notes(result),
    ).show()  # fmt: skip


def _row(model: Mapping[str, Any], engine: str, figures: Mapping[str, Any]) -> list[str]:
    shares = figures.get("share_of_limit", {})
    cold = figures.get("cold")
    return [
        model["name"],
        f"{model['macs']['left'] / 1e6:.1f}M",
        engine,
        f"{figures['best_ms']:.3f}",
        f"{figures['median_ms']:.3f}",
        f"{figures['first_ms']:.3f}",
        _ratio(figures.get("times_moon")),
        f"{figures['gmacs']:.1f}",
        *(f"{shares[kind]:.0%}" if shares else "-" for kind in ("registers", "memory")),
        f"{figures['agrees']:.1e}",
        f"{figures['ready_s']:.2f}",
        f"{cold['ready_s']:.2f}" if cold else "",
        *(_megabytes(figures[key]) for key in ("loaded_bytes", "peak_bytes")),
    ]


def _ratio(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    low, high = found["ci95"]
    return f"{found['median']:.2f} ({low:.2f} to {high:.2f})"


def _megabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / MB:.0f}"


def notes(result: Mapping[str, Any]) -> list[str]:
    """What the table's reader should know besides."""
    place, limits = result["environment"], result["limits_of_one_core"]
    said = list(result["notes"])
    for model in result["models"]:
        name = model["name"]
        said += [f"{name}: {who} left out: {why}" for who, why in model["left_out"].items()]
        handed = model["engines"].get(MOON, {}).get("handed_over")
        said += [f"{name}: moon hands to ONNX Runtime: {handed}"] if handed else []
    if limits is not None:
        said.append(
            f"limits of one core: {limits['registers']:.1f} GMAC/s from registers, "
            f"{limits['memory']:.1f} with memory operands ({limits['isa']})"
        )
    versions = {
        engine: figures["version"]
        for model in result["models"]
        for engine, figures in model["engines"].items()
    }
    said += [
        ", ".join(f"{engine} {version}" for engine, version in versions.items()),
        f"{place['cpu']} x{place['cores']}, {result['options']['rounds']} rounds",
    ]
    return said


def draw(result: Mapping[str, Any]) -> bytes:
    """Bars of best calls, a panel for each family of models, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    families = list(dict.fromkeys(model["family"] for model in result["models"]))
    figure = Figure(figsize=(max(6.0, 5.5 * len(families)), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(families), squeeze=False)[0]
    for panel, family in zip(axes, families, strict=True):
        _panel(panel, family, [m for m in result["models"] if m["family"] == family], result)
    axes[0].set_ylabel("best call, ms")
    handles: dict[str, Any] = {}
    for panel in axes:
        shown, labels = panel.get_legend_handles_labels()
        handles |= dict(zip(labels, shown, strict=True))
    handles = dict(sorted(handles.items(), key=lambda one: one[0] not in COLOURS))
    where: Any = {"loc": "outside upper center", "ncols": 3, "frameon": False}
    figure.legend(list(handles.values()), list(handles), **where)
    options, place = result["options"], result["environment"]
    about = f"{place['cpu']}, {options['threads']} threads, batch {options['batch']}, fp32;"
    figure.supxlabel(f"{about} above a bar: times moon's, median of paired blocks", fontsize=8)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150)
    return data.getvalue()


def _panel(panel: Any, family: str, models: list[Any], result: Mapping[str, Any]) -> None:
    engines = [e for e in COLOURS if any(e in model["engines"] for model in models)]
    width = 0.8 / max(1, len(engines))
    places = np.arange(len(models))
    for i, engine in enumerate(engines):
        found = [model["engines"].get(engine) for model in models]
        at = places + (i - (len(engines) - 1) / 2) * width
        heights = [one["best_ms"] if one else 0.0 for one in found]
        panel.bar(at, heights, width, label=engine, color=COLOURS[engine])
        for x, one in zip(at, found, strict=True):
            if one and "times_moon" in one:
                label = f"{one['times_moon']['median']:.1f}"
                panel.text(x, one["best_ms"], label, ha="center", va="bottom", fontsize=7)
    limits = result["limits_of_one_core"]
    if limits is not None:
        speed = limits["memory"] * result["options"]["threads"] * 1e6
        ideal = [m["macs"]["left"] * result["options"]["batch"] / speed for m in models]
        panel.hlines(ideal, places - 0.45, places + 0.45, color="black", lw=1, label="FMA limit")
    names = [model["name"].removeprefix(f"{family}-") for model in models]
    panel.set_xticks(places, names)
    panel.set_title(family)
    panel.spines[["top", "right"]].set_visible(False)
