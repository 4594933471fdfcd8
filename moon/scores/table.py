"""What each score needs, and the ways to fit it and to restore it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from moon.errors import UsageError
from moon.scores.fdbd import Fdbd, fit_fdbd
from moon.scores.fitted import Fitted, FittedScore
from moon.scores.klm import Klm, fit_klm
from moon.scores.knn import Knn, fit_knn
from moon.scores.nci import Nci, fit_nci
from moon.scores.nnguide import NNGuide, fit_nnguide
from moon.scores.plain import (
    Ebo,
    Gen,
    Mls,
    Msp,
    Unknown,
    fit_ebo,
    fit_gen,
    fit_mls,
    fit_msp,
    fit_unknown,
)
from moon.scores.react import React, fit_react
from moon.scores.rmds import Rmds, fit_rmds
from moon.scores.scale import Scale, fit_scale
from moon.scores.temperature import Temperature, fit_temperature
from moon.scores.training import Training
from moon.scores.vim import Vim, fit_vim

__all__ = ["SCORE_TABLE", "ScoreSpec", "fit_score", "restore_score"]


@dataclass(frozen=True, kw_only=True)
class ScoreSpec:
    """A score's entry in the table.

    Attributes:
        kind: the dataclass of its constants; documents and scores.
        fit: computes the constants from a :class:`Training`; its keywords are the options.
        fits: what of the training it needs: some of features, logits, labels and head (weight
            and, if any, bias).
        constants: sizes of its float constants, empty where there are none; K known classes, D
            features, B vectors in a bank.
        in_graph: standard ONNX operators can compute it.
        paper: where it is from.
    """

    kind: type[Fitted]
    fit: Callable[..., Fitted]
    fits: tuple[str, ...] = ()
    constants: str = ""
    in_graph: bool = True
    paper: str

    @property
    def name(self) -> str:
        return self.kind.name

    @property
    def reads(self) -> tuple[str, ...]:
        """What it scores: logits, features or both."""
        return self.kind.reads

    @property
    def options(self) -> tuple[str, ...]:
        """Keywords of ``fit``."""
        return tuple(inspect.signature(self.fit).parameters)[1:]


_ENTRIES = (
    ScoreSpec(kind=Msp, fit=fit_msp, paper="Hendrycks and Gimpel, ICLR 2017"),
    ScoreSpec(kind=Ebo, fit=fit_ebo, paper="Liu et al., NeurIPS 2020"),
    ScoreSpec(kind=Mls, fit=fit_mls, paper="Hendrycks et al., ICML 2022"),
    ScoreSpec(kind=Unknown, fit=fit_unknown, paper="Thulasidasan et al., ICML 2019"),
    ScoreSpec(
        kind=Temperature,
        fit=fit_temperature,
        fits=("logits", "labels"),
        constants="1",
        paper="Guo et al., ICML 2017",
    ),
    ScoreSpec(kind=Gen, fit=fit_gen, paper="Liu et al., CVPR 2023"),
    ScoreSpec(
        kind=Klm,
        fit=fit_klm,
        fits=("logits",),
        constants="K^2",
        paper="Hendrycks et al., ICML 2022",
    ),
    ScoreSpec(
        kind=Knn, fit=fit_knn, fits=("features",), constants="B D", paper="Sun et al., ICML 2022"
    ),
    ScoreSpec(
        kind=Vim,
        fit=fit_vim,
        fits=("features", "logits", "head"),
        constants="D (D - d) + D + 1",
        paper="Wang et al., CVPR 2022",
    ),
    ScoreSpec(
        kind=Fdbd,
        fit=fit_fdbd,
        fits=("features", "head"),
        constants="K^2 + D",
        paper="Liu and Qin, ICML 2024",
    ),
    ScoreSpec(
        kind=Rmds,
        fit=fit_rmds,
        fits=("features", "labels"),
        constants="2 D^2 + K D + D",
        paper="Ren et al., 2021",
    ),
    ScoreSpec(
        kind=Nci,
        fit=fit_nci,
        fits=("features", "head"),
        constants="K D + D + 1",
        paper="Liu and Qin, CVPR 2025",
    ),
    ScoreSpec(
        kind=React,
        fit=fit_react,
        fits=("features", "head"),
        constants="K D + K + 1",
        paper="Sun et al., NeurIPS 2021",
    ),
    ScoreSpec(
        kind=Scale,
        fit=fit_scale,
        fits=("head",),
        constants="K D + K",
        paper="Xu et al., ICLR 2024",
    ),
    ScoreSpec(
        kind=NNGuide,
        fit=fit_nnguide,
        fits=("features", "logits"),
        constants="B D",
        paper="Park et al., ICCV 2023",
    ),
)

# Name -> entry. ODIN, which needs gradients, is moon.evaluation.odin.
SCORE_TABLE: Mapping[str, ScoreSpec] = MappingProxyType({entry.name: entry for entry in _ENTRIES})


def fit_score(name: str, training: Training, **options: Any) -> FittedScore:
    """The score called ``name`` with constants from ``training``.

    Args:
        options: keywords of the score's own ``fit``, such as ``k`` of knn.

    Raises:
        UsageError: no such score or option, a value of another type, or the training lacks what
            it needs.
    """
    spec = _spec(name)
    for option in options:
        if option not in spec.options:
            has = f"has {', '.join(spec.options)}" if spec.options else "has none"
            raise UsageError(f"the score {name} has no option {option}", remedy=f"It {has}")
        _check_option(spec, option, options[option])
    return spec.fit(training, **options)


def restore_score(name: str, arrays: Mapping[str, ArrayLike]) -> FittedScore:
    """The score called ``name`` from the arrays that its ``to_arrays`` gave.

    Raises:
        UsageError: no such score, or not its constants.
    """
    return _spec(name).kind.from_arrays(arrays)


# What an option's annotation admits; numpy's numbers are numbers.
_TYPES: Mapping[str, tuple[str, tuple[type, ...]]] = MappingProxyType(
    {
        "int": ("a whole number", (int, np.integer)),
        "float": ("a number", (int, float, np.integer, np.floating)),
        "bool": ("true or false", (bool, np.bool_)),
        "str": ("a word", (str,)),
    }
)


def _check_option(spec: ScoreSpec, option: str, value: object) -> None:
    annotation = str(inspect.signature(spec.fit).parameters[option].annotation)
    kind, _, rest = annotation.partition(" | ")
    if kind not in _TYPES or (rest == "None" and value is None):
        return
    said, types = _TYPES[kind]
    right = isinstance(value, types) and (kind == "bool" or not isinstance(value, bool | np.bool_))
    if not right or (option == "seed" and int(value) < 0):  # type: ignore[call-overload]
        least = " of 0 or more" if option == "seed" else ""
        raise UsageError(
            f"the option {option} of the score {spec.name} must be {said}{least}, not {value!r}"
        )


def _spec(name: str) -> ScoreSpec:
    if name not in SCORE_TABLE:
        raise UsageError(
            f"no score is called {name}", remedy=f"Choose one of {', '.join(SCORE_TABLE)}"
        )
    return SCORE_TABLE[name]
