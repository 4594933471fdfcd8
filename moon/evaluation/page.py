"""report.html: one self-contained page made from the figures of report.json alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moon.evaluation import plots
from moon.evaluation.caveats import training_checked
from moon.evaluation.corruption_plot import LINES, corruption_plot
from moon.evaluation.metrics import OOD_METRICS
from moon.evaluation.words import asked, count, ends, percent, points, precise, size, tail

__all__ = ["render"]

Figures = Mapping[str, Any]
LOWER_IS_BETTER = frozenset({"fpr95_id_pos", "fpr95_ood_pos", "aurc", "ece"})
MOST_CLASSES = 30
HEADINGS = {
    "auroc": "AUROC",
    "fpr95_id_pos": "FPR95 id",
    "fpr95_ood_pos": "FPR95 ood",
    "aupr_in": "AUPR in",
    "aupr_out": "AUPR out",
}
_FIGURE = re.compile(r"((?:over |under )?[\d.]+%)( of (known|near|far))?")


def render(report: Figures) -> str:
    """The page of a report.json: light and dark, printable, no request to anywhere.

    Args:
        report: the content of report.json; several bundles are set side by side.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("moon.evaluation", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=percent,
        asked=asked,
        points=points,
        ends=ends,
        count=count,
        size=size,
        verdict=marked,
        precise=precise,
        tail=tail,
    )
    bundles = [report, *report["compared"]]
    names = labels([bundle["model"] for bundle in bundles])
    views = [view(bundle, name) for bundle, name in zip(bundles, names, strict=True)]
    page = environment.get_template("report.html.j2").render(
        report=report,
        views=views,
        comparison=comparison(views) if len(views) > 1 else None,
        outcome=outcome(views),
        metrics=OOD_METRICS,
        headings=HEADINGS,
    )
    return page.rstrip() + "\n"


def view(bundle: Figures, name: str) -> dict[str, Any]:
    """What the template shows of one bundle: its figures, drawn plots, and the best scores."""
    from markupsafe import Markup

    gate, drawn = bundle["gate"], bundle["plots"]
    gate_score = gate["score"] if gate else None
    order = in_order(bundle["scores"], gate_score)
    details = []
    for score in order:
        figures, own = bundle["scores"][score], gate if score == gate_score else None
        # One line can stand for one threshold, not for one a class.
        lined = None if own is None or own["per_class"] else own
        entry = drawn["scores"][score]
        details.append(
            {
                "name": score,
                "figures": figures,
                "ridges": Markup(plots.ridge_plot(score, entry["histogram"], lined, figures)),
                "roc": Markup(plots.roc_plot(score, entry["roc"], own, figures)),
                "styles": plots.styles(entry["roc"]),
                "fpr_ci": ", ".join(_intervals(figures)),
                "apart": any(
                    one["auroc"] in (0, 1) and one.get("auroc_ci95") is not None
                    for *_, one in set_figures(figures)
                ),
            }
        )
    return {
        **bundle,
        "name": name,
        "details": details,
        "best": best(bundle["scores"]),
        "pairs": list(set_figures(gate)) if gate else [],
        "shown_score": bundle["scores"][order[0]],
        "groups": [group for group in ("near", "far") if bundle["scores"][order[0]][group]],
        "worst_classes": worst_classes(bundle["classes"]),
        "examples": drawn.get("examples"),
        "training": training_checked(bundle["checks"]),
        "corruption_lines": LINES,
        "corruption_plot": Markup(corruption_plot(bundle["corruptions"]))
        if bundle["corruptions"]
        else None,
        **_known_plots(bundle),
    }


def in_order(scores: Figures, gate_score: str | None) -> list[str]:
    """The gate's score, or without a gate the first one; then the others, the best first."""
    first = next(iter(scores)) if gate_score is None else gate_score

    def area(name: str) -> float:
        groups = (scores[name][group] for group in ("near", "far"))
        return float(sum(group["auroc"] for group in groups if group))

    return sorted(scores, key=lambda name: (name != first, -area(name)))


def set_figures(part: Figures) -> Iterator[tuple[str, str, Figures]]:
    """(group, set, figures) of every unknown set."""
    for group in ("near", "far"):
        for name, figures in ((part[group] or {}).get("sets") or {}).items():
            yield group, name, figures


def best(scores: Figures) -> set[tuple[str, str, str]]:
    """(score, group, metric) of the best value in each column of the table of scores."""
    found: set[tuple[str, str, str]] = set()
    if len(scores) < 2:
        return found
    for group in ("near", "far"):
        for metric in OOD_METRICS:
            column = {n: s[group][metric] for n, s in scores.items() if s[group]}
            found |= {(name, group, metric) for name in _winners(column, metric)}
    column = {n: s["aurc"] for n, s in scores.items() if s["aurc"] is not None}
    return found | {(name, "", "aurc") for name in _winners(column, "aurc")}


def best_aurc(scores: Figures, main: str | None, most: int = plots.DASHES) -> list[str]:
    """As many scores as there are dashes to tell them by: ``main`` and those of lowest AURC."""
    ranked = sorted(scores, key=lambda name: (name != main, scores[name]["aurc"]))
    kept = set(ranked[:most])
    return [name for name in scores if name in kept]


def comparison(views: Sequence[Figures]) -> list[dict[str, Any]]:
    """A row a bundle, with the names of the columns in which it is the best."""
    rows: list[dict[str, Any]] = []
    for shown in views:
        gate, score = shown["gate"], shown["shown_score"]
        row = {
            "accuracy": shown["id"]["accuracy"],
            "ece": shown["id"]["ece"],
            "near_auroc": (score["near"] or {}).get("auroc"),
            "far_auroc": (score["far"] or {}).get("auroc"),
            "accept": gate["id"]["accept"] if gate else None,
            "accuracy_accepted": gate["id"]["accuracy"] if gate else None,
            "near_reject": (gate["near"] or {}).get("reject") if gate else None,
            "far_reject": (gate["far"] or {}).get("reject") if gate else None,
        }
        won: set[str] = set()
        rows.append({"figures": row, "view": shown, "best": won})
    for column in list(rows[0]["figures"]):
        if column == "accept":
            continue  # the user chose it: more is not better
        values = {
            i: row["figures"][column]
            for i, row in enumerate(rows)
            if row["figures"][column] is not None
        }
        for i in _winners(values, column):
            rows[i]["best"].add(column)
    return rows


def outcome(views: Sequence[Figures]) -> str:
    """Which of several bundles is best, in one plain sentence."""
    caught = {
        group: {v["name"]: v["gate"][group]["reject"] for v in views if v["gate"][group]}
        for group in ("near", "far")
        if all(v["gate"] for v in views)
    }
    leaders = {
        group: max(found.items(), key=lambda pair: pair[1])
        for group, found in caught.items()
        if found
    }
    if not leaders:
        return f"{len(views)} bundles measured on the same images."
    names = {name for name, _ in leaders.values()}
    if len(names) == 1:
        shares = " and ".join(f"{percent(rate)} of {group}" for group, (_, rate) in leaders.items())
        (name,) = names
        accept = next(v["gate"]["id"]["accept"] for v in views if v["name"] == name)
        return (
            f"{name} catches most: {shares} unknown inputs, accepting {percent(accept)} of known."
        )
    (near, near_rate), (far, far_rate) = leaders["near"], leaders["far"]
    return (
        f"{near} catches most near unknown inputs, {percent(near_rate)} of near; "
        f"{far} most far ones, {percent(far_rate)} of far."
    )


def labels(models: Sequence[Figures]) -> list[str]:
    """What to call each bundle: its name, and more where two share it."""
    names = [str(model["name"]) for model in models]
    if len(set(names)) == len(names):
        return names
    versions = [str(model["version"]).removeprefix("sha256:")[:8] for model in models]
    longer = [f"{name} {version}" for name, version in zip(names, versions, strict=True)]
    if len(set(longer)) == len(longer):
        return longer
    return [f"{name} ({i})" for i, name in enumerate(longer, 1)]


def worst_classes(classes: Sequence[Figures]) -> list[Figures]:
    """The classes most abstained from, the first of them; those never predicted last."""
    order = sorted(classes, key=lambda one: -1 if one["abstain"] is None else -one["abstain"])
    if len(classes) <= MOST_CLASSES:
        return list(classes)
    return [one for one in order if one["abstain"] is not None][:MOST_CLASSES]


def marked(sentence: str) -> Any:
    """The verdict with its figures set off, each in the colour of what it is about."""
    from markupsafe import Markup, escape

    def emphasise(match: re.Match[str]) -> str:
        rest, group = match[2] or "", match[3] or "known"
        return f'<strong class="{group}-text">{match[1]}</strong>{rest}'

    return Markup(_FIGURE.sub(emphasise, str(escape(sentence))))


def _intervals(figures: Figures) -> Iterator[str]:
    means = [(g, f"mean of {g}", figures[g]) for g in ("near", "far") if figures[g]]
    for _, name, one in [*set_figures(figures), *means]:
        if one.get("fpr95_id_pos_ci95"):
            low, high = one["fpr95_id_pos_ci95"]
            yield f"{name} {ends((low, high))}"


def _known_plots(bundle: Figures) -> dict[str, Any]:
    from markupsafe import Markup

    bins = bundle["plots"]["reliability"]
    if bins is None:
        return {"reliability": None, "risk": None, "risk_styles": {}}
    chosen = best_aurc(bundle["scores"], bundle["gate"]["score"] if bundle["gate"] else None)
    curves = {n: bundle["plots"]["scores"][n]["risk_coverage"] for n in chosen}
    aurcs = {name: bundle["scores"][name]["aurc"] for name in curves}
    return {
        "reliability": Markup(plots.reliability_plot(bins, bundle["id"]["ece"])),
        "risk": Markup(plots.risk_plot(curves, bundle["gate"], aurcs)),
        "risk_styles": {n: f"known dash{i % plots.DASHES}" for i, n in enumerate(curves)},
    }


def _winners(column: Mapping[Any, float], metric: str) -> list[Any]:
    if len(column) < 2:
        return []
    top = points((min if metric in LOWER_IS_BETTER else max)(column.values()))
    shown = {name for name, value in column.items() if points(value) == top}
    return [] if len(shown) == len(column) else sorted(shown)
