"""Checkpoint: a trained classifier with all that is needed to export, calibrate and explain it.

On disk, in a run's folder: ``checkpoint.safetensors`` holds the weights under their own names
and each sparse layer's mask under ``mask:NAME``, bit-packed; ``checkpoint.json`` holds the rest
and the hash of the weights file, and is written last.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import moon
from moon.data.fingerprint import TrainingSketch
from moon.data.preprocess import Preprocess
from moon.errors import MoonError, TrainingError
from moon.fields import Fields
from moon.files import sha256_bytes, write_bytes, write_json
from moon.trainer.accounting.flops import LayerCost
from moon.trainer.models import build
from moon.trainer.recipe import Recipe

__all__ = ["Checkpoint", "Validation", "versions"]

SCHEMA_VERSION = 1
TENSORS = "checkpoint.safetensors"
FACTS = "checkpoint.json"
MASK = "mask:"


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The held-out images: a SOURCE, which of its items (None for all), and their hash
    as of :func:`moon.data.load.data_sha256`."""

    source: str
    indices: tuple[int, ...] | None
    sha256: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """A trained classifier.

    Args:
        recipe: as it was run.
        classes: names of the known classes, in the order of the logits.
        unknown_index: the logit of the unknown; None where there is none.
        preprocess: from images to the model's input.
        state: every parameter and buffer by name, on the CPU.
        masks: bool, of each sparse layer's weight by name: True where it may be nonzero.
        validation: the images that were held out.
        layers: size and cost of every Conv and Linear weight.
        metrics: ``accuracy`` on the held-out images, ``sparsity``, FLOPs and the like.
        versions: of what trained it.
        training: a sample of the training images' fingerprints; None in checkpoints of earlier
            releases.
    """

    recipe: Recipe
    classes: tuple[str, ...]
    unknown_index: int | None
    preprocess: Preprocess
    state: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]
    validation: Validation
    layers: tuple[LayerCost, ...]
    metrics: Mapping[str, Any]
    versions: Mapping[str, str]
    training: TrainingSketch | None = None

    @property
    def outputs(self) -> int:
        """Number of logits."""
        return len(self.classes) + (self.unknown_index is not None)

    def model(self) -> nn.Module:
        """The classifier, from normalised float32 [N, C, H, W] to logits, in eval mode.

        Raises:
            TrainingError: the weights are not those of the recipe's model.
        """
        model = build(
            self.recipe.model,
            outputs=self.outputs,
            channels=self.preprocess.channels,
            size=self.preprocess.crop,
        )
        try:
            model.load_state_dict(dict(self.state))
        except RuntimeError as error:
            raise TrainingError(
                f"the checkpoint's weights do not fit {self.recipe.model}: {error}"
            ) from error
        return model.eval()

    def save(self, run: str | os.PathLike[str]) -> None:
        """Write both files into the folder, the JSON last.

        Raises:
            MoonError: could not be written.
        """
        from safetensors.torch import save

        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state.items()}
        for name, mask in self.masks.items():
            tensors[MASK + name] = torch.from_numpy(_packed(mask))
        data = save(tensors)
        file = {"name": TENSORS, "sha256": sha256_bytes(data), "bytes": len(data)}
        facts = {**self.facts(), "file": file}
        write_bytes(Path(run) / TENSORS, data)
        write_json(Path(run) / FACTS, facts)

    def facts(self) -> dict[str, Any]:
        """All but the tensors, as JSON; ``from_facts`` reads it."""
        return {
            "schema_version": SCHEMA_VERSION,
            "recipe": self.recipe.to_dict(),
            "recipe_sha256": self.recipe.hash,
            "classes": list(self.classes),
            "unknown_index": self.unknown_index,
            "preprocess": self.preprocess.to_json(),
            "validation": asdict(self.validation),
            "layers": [asdict(layer) for layer in self.layers],
            "metrics": dict(self.metrics),
            "versions": dict(self.versions),
            "training": None if self.training is None else self.training.to_json(),
        }

    @classmethod
    def load(cls, run: str | os.PathLike[str]) -> Checkpoint:
        """Read a run's folder, checking the weights against their hash.

        Raises:
            TrainingError: there is no checkpoint, or it is damaged.
        """
        folder = Path(run)
        fields = Fields(_read_json(folder), FACTS, TrainingError)
        _check_version(fields, folder / FACTS)
        tensors = _read_tensors(folder, fields.mapping("file"))
        state = {name: value for name, value in tensors.items() if not name.startswith(MASK)}
        masks = {
            name.removeprefix(MASK): _unpacked(name, value, state)
            for name, value in tensors.items()
            if name.startswith(MASK)
        }
        return cls._of(fields, state, masks, folder / FACTS)

    @classmethod
    def from_facts(
        cls,
        facts: object,
        state: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        where: str | os.PathLike[str],
    ) -> Checkpoint:
        """Put together again what ``facts`` took apart; errors name the file ``where``.

        Raises:
            TrainingError: the facts are of another schema, or damaged.
        """
        fields = Fields(facts, str(where), TrainingError)
        _check_version(fields, where)
        return cls._of(fields, state, masks, where)

    @classmethod
    def _of(
        cls,
        fields: Fields,
        state: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        where: str | os.PathLike[str],
    ) -> Checkpoint:
        try:
            return cls(
                recipe=Recipe.from_dict(fields.mapping("recipe")),
                classes=fields.texts("classes"),
                unknown_index=fields.maybe_integer("unknown_index"),
                preprocess=Preprocess.from_json(fields.mapping("preprocess")),
                state=state,
                masks=masks,
                validation=_validation(fields.mapping("validation")),
                layers=tuple(_layer(row) for row in _rows(fields.take("layers"))),
                metrics=fields.mapping("metrics"),
                versions=fields.mapping("versions"),
                training=_training(fields.take_or("training", None)),
            )
        except TrainingError:
            raise
        except MoonError as error:
            raise TrainingError(f"{where} is damaged: {error.cause}") from error


def _check_version(fields: Fields, where: str | os.PathLike[str]) -> None:
    version = fields.integer("schema_version")
    if version != SCHEMA_VERSION:
        raise TrainingError(
            f"{where} has schema version {version}, this is {SCHEMA_VERSION}",
            remedy="Use the version of the toolkit that trained it",
        )


def versions() -> dict[str, str]:
    """Of the toolkit and of what decides a run's bits."""
    return {
        "moon": moon.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def _packed(mask: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.packbits(mask.detach().cpu().contiguous().numpy())


def _unpacked(name: str, packed: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    weight = state.get(name.removeprefix(MASK))
    count = 0 if weight is None else weight.numel()
    if weight is None or packed.dtype != torch.uint8 or packed.numel() != -(-count // 8):
        raise TrainingError(f"{TENSORS} is damaged: {name} fits no weight")
    bits = np.unpackbits(packed.numpy(), count=count).astype(bool)
    return torch.from_numpy(bits).reshape(weight.shape)


def _read_json(folder: Path) -> object:
    try:
        return json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        unfinished = (folder / "recipe.toml").exists()
        cause = "has not finished" if unfinished else "is no finished run"
        raise TrainingError(
            f"{folder} {cause}: it has no {FACTS}",
            remedy="Finish it with moon train --resume" if unfinished else "Check the path",
        ) from None
    except (OSError, ValueError) as error:
        raise TrainingError(f"cannot read {folder / FACTS}: {error}") from error


def _read_tensors(folder: Path, file: Mapping[str, Any]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = folder / TENSORS
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TrainingError(f"cannot read {path}: {error.strerror or error}") from error
    if sha256_bytes(data) != file.get("sha256"):
        raise TrainingError(
            f"{path} is not the file that {FACTS} describes (its SHA-256 differs)",
            remedy="Copy the whole run again, or train it again",
        )
    try:
        return load(data)
    except SafetensorError as error:
        raise TrainingError(f"{path} is no safetensors file: {error}") from error


def _validation(table: dict[str, Any]) -> Validation:
    fields = Fields(table, "validation", TrainingError)
    every = table.get("indices") is None
    return Validation(
        source=fields.text("source"),
        indices=None if every else fields.integers("indices"),
        sha256=fields.text("sha256"),
    )


def _training(plain: object) -> TrainingSketch | None:
    return None if plain is None else TrainingSketch.from_json(plain, "training", TrainingError)


def _rows(value: object) -> list[object]:
    if not isinstance(value, list):
        raise TrainingError(f"layers in {FACTS} is no list")
    return value


def _layer(row: object) -> LayerCost:
    fields = Fields(row, "a layer", TrainingError)
    return LayerCost(
        name=fields.text("name"),
        shape=fields.integers("shape"),
        nonzeros=fields.integer("nonzeros"),
        density=fields.number("density"),
        flops=fields.integer("flops"),
        dense_flops=fields.integer("dense_flops"),
        # Absent from checkpoints of earlier releases.
        value_bytes=fields.maybe_integer("value_bytes") or 4,
        activation_bytes=fields.maybe_integer("activation_bytes"),
        saved_bytes=fields.maybe_integer("saved_bytes"),
        gradient_bytes=fields.maybe_integer("gradient_bytes"),
        slot_bytes=fields.maybe_integer("slot_bytes"),
        mask_bytes=fields.maybe_integer("mask_bytes"),
    )
