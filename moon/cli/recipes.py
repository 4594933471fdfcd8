"""``moon recipes``: the built-in recipes and what each sets."""

from __future__ import annotations

__all__ = ["recipes"]

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.markup import escape

from moon.cli.console import output, print_json
from moon.cli.options import AsJson, Debug
from moon.cli.text import grid, percent

_FEW = 40
_OTHERS = ("logitnorm", "mixup", "dac", "vos", "cigl", "temperature")


def recipes(
    words: Annotated[
        list[str],
        typer.Argument(metavar="NAME", help="Parts of names; a whole name is shown as TOML."),
    ] = [],  # noqa: B006
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List the built-in recipes and what each sets.

    With the whole name of one, print it as a TOML file to edit and train from.
    """
    from moon.trainer.recipes import RECIPES, find_recipe

    name = " ".join(words)
    parts = name.lower().split()
    if name in RECIPES:
        chosen = [RECIPES[name]]
    else:
        chosen = [r for r in RECIPES.values() if all(part in r.name for part in parts)]
    if not chosen:
        find_recipe(name)  # raises, naming the nearest
    if as_json:
        print_json({"recipes": [recipe.to_dict() for recipe in chosen]})
    elif name in RECIPES:
        print(chosen[0].to_toml(), end="")
    elif len(chosen) <= _FEW:
        _show_each(chosen)
    else:
        _show_families(chosen)


def _show_each(chosen: Sequence[Any]) -> None:
    figures = ("sparsity", "epochs", "batch", "lr")
    table = grid("recipe", "rule", *figures, "method", right=figures)
    for recipe in chosen:
        table.add_row(
            escape(recipe.name),
            recipe.rule,
            percent(recipe.sparsity, 0),
            str(recipe.epochs),
            str(recipe.batch_size),
            f"{recipe.lr:g}",
            _method(recipe),
        )
    output().print(table)
    output().print(f"\nOne in full: moon recipes {chosen[0].name}")


def _method(recipe: Any) -> str:
    others = [name for name in _OTHERS if getattr(recipe, name)]
    if recipe.compat:
        others.append(f"compat {', '.join(recipe.compat)}")
    return ", ".join([_moon(recipe.moon), *others] if recipe.moon.enabled else others) or "plain"


def _moon(moon: Any) -> str:
    parts = {"loss": moon.loss, "auto w": moon.auto, "voting": moon.vote}
    missing = [f"no {part}" for part, on in parts.items() if not on]
    return f"MOON, w_final {moon.w_final:g}" + "".join(f", {part}" for part in missing)


def _show_families(chosen: Sequence[Any]) -> None:
    families: dict[str, list[Any]] = {}
    for recipe in chosen:
        tail = f"-{recipe.rule}"
        families.setdefault(recipe.name.partition(tail)[0], []).append(recipe)
    figures = ("epochs", "batch", "lr", "w_final")
    table = grid("data-model", "trains on", *figures, right=figures)
    table.columns[0].no_wrap = True
    for stem, members in families.items():
        first = members[0]
        table.add_row(
            escape(stem),
            escape(first.data.train.removesuffix("#train")),
            str(first.epochs),
            str(first.batch_size),
            f"{first.lr:g}",
            f"{first.moon.w_final:g}",
        )
    console = output()
    console.print(f"{len(chosen)} recipes, named DATA-MODEL-RULE[SPARSITY][-VARIANT]:\n")
    console.print(table)
    console.print()
    _explain(console, chosen)


def _explain(console: Any, chosen: Sequence[Any]) -> None:
    from moon.trainer.recipes import VARIANTS

    rules = dict.fromkeys(recipe.rule for recipe in chosen)
    shares = sorted({round(100 * recipe.sparsity) for recipe in chosen if recipe.sparsity})
    console.print(f"RULE      {', '.join(rules)} (dense has no sparsity)")
    console.print(f"SPARSITY  {', '.join(str(share) for share in shares)} percent")
    for index, (name, variant) in enumerate(VARIANTS.items()):
        head = "VARIANT " if index == 0 else " " * 8
        console.print(f"{head}  {name or '(none)':14} {variant.says}")
    example = next((r.name for r in chosen if r.name.endswith("rigl95-moon")), chosen[0].name)
    console.print(f"\nNarrow it: moon recipes mnist cnn. One in full: moon recipes {example}")
