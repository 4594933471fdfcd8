"""What a sparsifier saves, and the refusal of states that are not its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from moon.errors import TrainingError
from moon.trainer.sparsity.masked import MaskedLayer
from moon.trainer.sparsity.rules import Rule
from moon.trainer.sparsity.selection import obeys
from moon.trainer.sparsity.structure import Structure

__all__ = ["Course", "restore", "save"]

VERSION = 1


@dataclass(kw_only=True)
class Course:
    """How far the evolution has come: the plain numbers of a sparsifier's state.

    Attributes:
        seed: of all draws.
        step: optimizer steps taken.
        updated_at: the step of the last update; -1 before the first.
        updates: how many there were.
        grown: connections grown by them.
        pending: an update is due since an earlier step, whose gradients were not finite.
        frozen: by hand; the schedule's own end is not written down.
    """

    seed: int
    step: int = 0
    updated_at: int = -1
    updates: int = 0
    grown: int = 0
    pending: bool = False
    frozen: bool = False


def save(
    course: Course, rule: Rule, structure: Structure, layers: Sequence[MaskedLayer]
) -> dict[str, Any]:
    """Masks (bool tensors, copies) and plain numbers."""
    return {
        "version": VERSION,
        "rule": rule.name,
        "structure": structure.name,
        **asdict(course),
        "masks": {layer.name: layer.mask.clone() for layer in layers},
    }


def restore(
    state: Mapping[str, Any], rule: Rule, structure: Structure, layers: Sequence[MaskedLayer]
) -> tuple[Course, Mapping[str, Tensor]]:
    """The course and the masks of a saved state; nothing is changed.

    Raises:
        TrainingError: it is of another version, rule, structure, model or density, or no
            state of a sparsifier at all.
    """
    if not isinstance(state, Mapping) or state.get("version") != VERSION:
        found = state.get("version") if isinstance(state, Mapping) else None
        raise TrainingError(
            f"the sparsifier state has version {found}, not {VERSION}",
            remedy="Load what state_dict() returned, with the release that wrote it",
        )
    # States older than structures have none.
    state = {"structure": "unstructured", **state}
    plain = list(Course.__dataclass_fields__)
    lacking = [key for key in ("rule", "masks", *plain) if key not in state]
    if lacking or not isinstance(state["masks"], Mapping):
        raise TrainingError(
            f"the sparsifier state has no {lacking[0] if lacking else 'masks'}",
            remedy="Load what state_dict() returned",
        )
    for what, wanted in {"rule": rule.name, "structure": structure.name}.items():
        if state[what] != wanted:
            raise TrainingError(
                f"the state was saved with the {what} {state[what]}, this run has {wanted}",
                remedy="Resume with the same settings",
            )
    _check_masks(state["masks"], rule, structure, {layer.name: layer for layer in layers})
    return Course(**{name: state[name] for name in plain}), state["masks"]


def _check_masks(
    saved: Mapping[str, Tensor],
    rule: Rule,
    structure: Structure,
    expected: Mapping[str, MaskedLayer],
) -> None:
    different = sorted(set(saved) ^ set(expected))
    if different:
        raise TrainingError(
            f"the saved masks and the model differ in the layer {different[0]}",
            remedy="Resume with the same model, density and dense layers",
        )
    for name, layer in expected.items():
        mask = saved[name]
        nonzeros = int(mask.sum())
        enough = nonzeros == layer.target or (rule.prunes and nonzeros > layer.target)
        if mask.shape != layer.mask.shape or not enough:
            raise TrainingError(
                f"the saved mask of {name} has shape {tuple(mask.shape)} and {nonzeros} "
                f"nonzeros, the model needs {tuple(layer.mask.shape)} and "
                f"{'at least ' if rule.prunes else ''}{layer.target}",
                remedy="Resume with the same model and density",
            )
        if not obeys(mask, layer.target, structure, pruning=nonzeros > layer.target):
            raise TrainingError(
                f"the saved mask of {name} does not have the structure {structure.name}",
                remedy="Resume from a state that this structure wrote",
            )
