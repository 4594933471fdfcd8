"""The comparisons of the paper as data: which recipes, on what, and the paper's own figures.

The paper is Lei, Xu, Zhang, Mallick, "Embracing Unknown Step by Step: Towards Reliable Sparse
Training in Real World" (TMLR; arXiv 2403.20047). Its figures are recorded here for two of its
tables only:

    1   RigL on CIFAR-10 with ResNet-18: AUROC of MSP, near and far, 80 to 99%
    4   accuracy and ECE; of it the rows of SET at 95% on CIFAR-10

The tables with a name instead of a number group what else the paper compares. The grouping and
its order are ours, the settings those that the paper states (w_f, T_e, vote time, sparsities,
in-distribution sets), and no figure of the paper is recorded for them: where the paper has one,
the column says `-`. `digits` is no part of the paper: it needs no data, and takes a minute.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moon.trainer.recipe import Recipe
from moon.trainer.recipes import find_recipe

# AUROC, accuracy in percent; ECE as a fraction, as the paper prints them.
Figures = Mapping[str, float]
PAPER_EPOCHS = 100
MODELS = {"resnet18": "ResNet-18", "resnet50": "ResNet-50", "cnn": "small CNN"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table.

    Args:
        label: what the table calls it.
        tail: the recipe's name after DATA-MODEL-, such as ``rigl95-moon``.
        changes: settings of the recipe that differ.
        epochs: such settings in epochs of 100, which follow the length of the run.
        paper: the paper's figures: near, far, accuracy, ece.
    """

    label: str
    tail: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    epochs: Mapping[str, int] = field(default_factory=dict)
    paper: Figures = field(default_factory=dict)

    def recipe(self, stem: str, settings: list[str], epochs: int | None) -> Recipe:
        """The recipe of DATA-MODEL ``stem``, the row's own settings last.

        Raises:
            RecipeError: there is none of that name, or settings contradict each other.
        """
        length = [] if epochs is None else [f"epochs={epochs}"]
        plain = find_recipe(f"{stem}-{self.tail}").override([*settings, *length])
        scaled = {k: max(1, round(v * plain.epochs / PAPER_EPOCHS)) for k, v in self.epochs.items()}
        own = [f"{key}={value}" for key, value in {**self.changes, **scaled}.items()]
        changed = plain.override(own)
        if changed.hash == plain.hash:
            return plain  # Under the name by which other tables know it.
        given = {**self.changes, **self.epochs}
        mark = "".join(f"_{key.rpartition('.')[2]}-{value}" for key, value in given.items())
        return changed.override([f"name={plain.name}{mark}"])


@dataclass(frozen=True, kw_only=True)
class PaperTable:
    """A comparison on one in-distribution set.

    Args:
        data: the in-distribution set, a key of ``image_sets.PROTOCOLS``.
        model: of the built-in recipes.
        numbered: whether it is a table of the paper, with figures recorded.
        published: whether the paper has runs of this kind at all.
    """

    title: str
    data: str
    rows: tuple[Row, ...]
    model: str = "resnet18"
    numbered: bool = False
    published: bool = True

    def title_of(self, model: str | None) -> str:
        """The title with the model that is trained, by default the table's own."""
        name = model or self.model
        return self.title.format(model=MODELS.get(name, name))


def _pairs(rule: str, name: str, sparsities: tuple[int, ...]) -> tuple[Row, ...]:
    return tuple(
        Row(label=f"{label} {percent}%", tail=f"{rule}{percent}{tail}")
        for percent in sparsities
        for label, tail in ((name, ""), (f"MOON + {name}", "-moon"))
    )


_TABLE_1 = {
    80: ((88.17, 90.88), (90.53, 92.86)),
    90: ((88.45, 90.03), (89.63, 92.37)),
    95: ((86.67, 88.19), (88.71, 91.62)),
    99: ((81.84, 84.49), (84.43, 87.70)),
}
_MOON95 = Row(label="MOON + RigL 95%", tail="rigl95-moon")
_RIGL95 = Row(label="RigL 95%", tail="rigl95")


def _vary(label: str, changes: str, values: tuple[float, ...]) -> tuple[Row, ...]:
    return tuple(
        Row(label=f"{label} = {value:g}", tail="rigl95-moon", changes={changes: f"{value:g}"})
        for value in values
    )


TABLES: dict[str, PaperTable] = {
    "1": PaperTable(
        title="Table 1: RigL with and without MOON, CIFAR-10, {model}, AUROC",
        data="cifar10",
        numbered=True,
        rows=tuple(
            Row(
                label=f"{label} {percent}%",
                tail=f"rigl{percent}{tail}",
                paper={"near": near, "far": far},
            )
            for percent, pair in _TABLE_1.items()
            for label, tail, (near, far) in zip(
                ("RigL", "MOON + RigL"), ("", "-moon"), pair, strict=True
            )
        ),
    ),
    "4": PaperTable(
        title="Table 4, in part: SET with and without MOON, CIFAR-10, {model}",
        data="cifar10",
        numbered=True,
        rows=(
            Row(label="SET 95%", tail="set95", paper={"accuracy": 92.56, "ece": 0.035}),
            Row(label="MOON + SET 95%", tail="set95-moon", paper={"accuracy": 93.59, "ece": 0.020}),
        ),
    ),
    "sparsities": PaperTable(
        title="RigL with and without MOON at the other sparsities, CIFAR-10, {model}",
        data="cifar10",
        rows=_pairs("rigl", "RigL", (50, 60, 70)),
    ),
    "set": PaperTable(
        title="SET with and without MOON, CIFAR-10, {model}",
        data="cifar10",
        rows=_pairs("set", "SET", (80, 90, 95, 99)),
    ),
    "dense": PaperTable(
        title="Dense with and without MOON, CIFAR-10, {model}",
        data="cifar10",
        rows=(
            Row(label="dense", tail="dense"),
            Row(label="MOON + dense", tail="dense-moon"),
        ),
    ),
    "parts": PaperTable(
        title="MOON without one of its parts, CIFAR-10, {model}, RigL 95%",
        data="cifar10",
        rows=(
            _RIGL95,
            _MOON95,
            Row(label="without LM (loss)", tail="rigl95-moon-nolm"),
            Row(label="without AT (tuning of w)", tail="rigl95-moon-noat"),
            Row(label="without VT (voting)", tail="rigl95-moon-novt"),
        ),
    ),
    "w-final": PaperTable(
        title="MOON by w_f, CIFAR-10, {model}, RigL 95%",
        data="cifar10",
        rows=_vary("w_f", "moon.w_final", (0.1, 0.5, 1, 2, 4)),
    ),
    "warmup": PaperTable(
        title="MOON by T_e, CIFAR-10, {model}, RigL 95%",
        data="cifar10",
        rows=tuple(
            Row(label=f"T_e = {n}", tail="rigl95-moon", epochs={"moon.warmup_epochs": n})
            for n in (1, 2, 3, 5)
        ),
    ),
    "votes": PaperTable(
        title="MOON by vote time, CIFAR-10, {model}, RigL 95%",
        data="cifar10",
        rows=tuple(
            Row(label=f"vote time = {n}", tail="rigl95-moon", epochs={"moon.vote_epochs": n})
            for n in (2, 5, 10, 20)
        ),
    ),
    "methods": PaperTable(
        title="MOON beside other methods, CIFAR-10, {model}, RigL 95%",
        data="cifar10",
        rows=(
            _RIGL95,
            Row(label="DAC", tail="rigl95-dac"),
            Row(label="LogitNorm", tail="rigl95-logitnorm"),
            Row(label="VOS", tail="rigl95-vos"),
            Row(label="Mixup", tail="rigl95-mixup"),
            Row(label="CigL", tail="rigl95-cigl"),
            Row(label="temperature scaling", tail="rigl95-ts"),
            Row(label="MOON", tail="rigl95-moon"),
        ),
    ),
    "official": PaperTable(
        title="MOON as the paper and as the authors' code has it, CIFAR-10, {model}, RigL 95%",
        data="cifar10",
        rows=(_MOON95, Row(label="as the authors' code", tail="rigl95-moon-official")),
    ),
    "cifar100": PaperTable(
        title="RigL with and without MOON, CIFAR-100, {model}",
        data="cifar100",
        rows=_pairs("rigl", "RigL", (80, 90, 95, 99)),
    ),
    "mnist": PaperTable(
        title="RigL with and without MOON, MNIST, {model}",
        data="mnist",
        rows=_pairs("rigl", "RigL", (80, 90, 95, 99)),
    ),
    "imagenet": PaperTable(
        title="RigL with and without MOON, ImageNet, {model}",
        data="imagenet",
        model="resnet50",
        rows=_pairs("rigl", "RigL", (80, 90)),
    ),
    "digits": PaperTable(
        title="RigL and SET with and without MOON, scikit-learn's digits 0 to 7, {model}",
        data="digits",
        model="cnn",
        published=False,
        rows=(*_pairs("rigl", "RigL", (90,)), *_pairs("set", "SET", (90,))),
    ),
}
