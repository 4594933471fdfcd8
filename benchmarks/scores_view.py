"""The tables of `scores.py`: a row a score; as the sets are and re-encoded, side by side."""

from __future__ import annotations

from typing import Any

from spread import Grid, environment_note, shown

from moon.evaluation.measure import GROUPS

SHOWN = (("AUROC", "auroc"), ("FPR@95", "fpr95_id_pos"))
Figures = dict[str, Any]


def grids(result: Figures) -> list[Grid]:
    """A table for each recipe; with and without re-encoding side by side."""
    return [_grid(recipe, result) for recipe in result["recipes"]]


def _grid(recipe: Figures, result: Figures) -> Grid:
    ways = [way for way in ("plain", "jpeg") if way in recipe]
    groups = [group for group in GROUPS if result["sets"][group]]
    kinds = [(group, title, metric) for group in groups for title, metric in SHOWN]
    again = f"q{result['jpeg']}"
    columns = [
        f"{group} {title}" if way == "plain" else again for group, title, _ in kinds for way in ways
    ]
    rows = [
        (name, *(_cell(recipe, way, name, group, metric) for group, _, metric in kinds
                 for way in ways))
        for name in recipe["plain"]["scores"]
    ]  # fmt: skip
    count = len(recipe["runs"])
    accuracies = ", ".join(
        f"accuracy {shown(recipe[way]['accuracy'])}, ECE {shown(recipe[way]['ece'])}"
        + ("" if way == "plain" else f" re-encoded at {again}")
        for way in ways
    )
    sets = result["sets"]
    limit = "" if sets["limit"] is None else f"; at most {sets['limit']:,} images a set"
    members = "; ".join(f"{group}: {', '.join(sets[group])}" for group in groups)
    trained = [{"model": {"versions": versions}} for versions in recipe["versions"]]
    return Grid(
        title=f"{recipe['name']}, {count} run{'s' * (count > 1)}, in %",
        columns=("score", *columns),
        rows=rows,
        notes=[accuracies, f"{members}{limit}", environment_note(trained)],
    )


def _cell(recipe: Figures, way: str, score: str, group: str, metric: str) -> str:
    figures = recipe[way]["scores"].get(score)
    if figures is None:
        return "-"
    figure = figures[group][metric]
    fewer = "" if figure["n"] in (0, len(recipe["runs"])) else f" (n={figure['n']})"
    return shown(figure) + fewer
