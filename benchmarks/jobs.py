"""What is to be done of a run and what is there of it already.

Under OUT, `NAME-seedS/run` is the run of a recipe, `NAME-seedS/result-KEY.json` what was measured
of it, and `logs/NAME-seedS.txt` what its process said on stderr. `checkpoints/NAME-seedS.moonckpt`
is the same run as one small file (`moon.trainer.compact`), to be measured elsewhere.

A result counts for the weights and the test images it was measured on: when either have changed,
by content, they are measured again. `NAME-seedS/images.json` has the fingerprint of the training
images, and a run is refused, not reused, once they are others. `NAME-seedS/packed.json` says which
weights the compact file holds.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from fingerprint import fingerprint

from moon.errors import MoonError
from moon.files import canonical_json, sha256_bytes, sha256_file, write_json
from moon.trainer.compact import SUFFIX
from moon.trainer.recipe import Recipe

IMAGES = "images.json"
PACKED = "packed.json"


@dataclass(frozen=True, kw_only=True)
class TestSets:
    """What runs are measured on: SOURCEs, and by what names results remember them."""

    __test__ = False

    known: str
    near: dict[str, str] = field(default_factory=dict)
    far: dict[str, str] = field(default_factory=dict)
    limit: int | None = None
    jpeg: int | None = None
    portable: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        rest = {"limit": self.limit, "jpeg": self.jpeg}
        return {"id": self.known, "near": self.near, "far": self.far, **rest}

    def key(self) -> dict[str, object]:
        """The same wherever the files lie."""
        call = self.portable.get
        return {
            **self.to_json(),
            "id": call("id", self.known),
            "near": {name: call(name, source) for name, source in self.near.items()},
            "far": {name: call(name, source) for name, source in self.far.items()},
        }

    def contents(self) -> dict[str, object]:
        """A fingerprint of every set."""
        return {
            "id": fingerprint(self.known),
            "near": {name: fingerprint(source) for name, source in self.near.items()},
            "far": {name: fingerprint(source) for name, source in self.far.items()},
        }


@dataclass(frozen=True, kw_only=True)
class Job:
    """A recipe with its seed, where it is kept, and what is to be done with it.

    Args:
        name: of the folder under ``out``.
        train_as: what results call the training images, wherever they lie.
        train: whether it may be trained where it is not finished.
        packed: the folder of compact checkpoints, to write (with ``train``) or to read.
        sets: to measure on; None to measure nothing.
    """

    name: str
    recipe: Recipe
    out: Path
    train_as: str
    train: bool = True
    packed: Path | None = None
    sets: TestSets | None = None
    device: str = "auto"

    @property
    def run(self) -> Path:
        return self.out / self.name / "run"

    @property
    def trained(self) -> bool:
        return (self.run / "checkpoint.json").is_file()

    @property
    def pack(self) -> Path | None:
        return None if self.packed is None else self.packed / f"{self.name}{SUFFIX}"

    @property
    def weights(self) -> Path:
        """The file or folder to read weights from; the run's own where it trains."""
        packed = self.pack
        return packed if not self.train and packed and packed.is_file() else self.run

    @property
    def key(self) -> dict[str, object]:
        sets = None if self.sets is None else self.sets.key()
        return {"run": run_hash(self.recipe, self.train_as), "sets": sets}

    @property
    def result_path(self) -> Path:
        name = sha256_bytes(canonical_json(self.key))[:12]
        return self.out / self.name / f"result-{name}.json"

    def result(self) -> dict | None:
        """What was measured, unless the weights or the test images have changed since."""
        found = _json(self.result_path)
        if found is None or self.sets is None:
            return None
        now = identity(self.weights)
        if now is not None and now != found.get("identity"):
            return None
        contents = self.sets.contents()
        return found if found.get("contents", contents) == contents else None

    @property
    def todo(self) -> str:
        """What is left: `train`, `pack`, `measure`, "not trained" where it may not be, or ""."""
        if self.train and not (self.trained and self._same_recipe() and not self._other_images()):
            return "train"  # A run of another recipe or other images is for the worker to refuse.
        if self.sets is not None and self.result() is not None:
            return ""
        if not self.weights.exists() or (self.weights == self.run and not self.trained):
            return "" if self.sets is None else "not trained"
        if self.sets is not None:
            return "measure"
        return "" if self.pack is None or self._is_packed(self.pack) else "pack"

    def _is_packed(self, pack: Path) -> bool:
        """Whether the compact file is whole and of the run's present weights."""
        there = _json(self.out / self.name / PACKED)
        return there is not None and there == {"run": identity(self.run), "file": identity(pack)}

    def _other_images(self) -> bool:
        """Whether the run that is there was begun with other training images than there are."""
        there = _json(self.out / self.name / IMAGES)
        begun = self.trained or (self.run / "last").exists()
        return begun and there is not None and there["train"] != fingerprint(self.recipe.data.train)

    def _same_recipe(self) -> bool:
        try:
            facts = json.loads((self.run / "checkpoint.json").read_text(encoding="utf-8"))
            there = Recipe.from_dict(facts["recipe"])
        except (OSError, ValueError, KeyError, MoonError):
            return False
        return run_hash(there, self.train_as) == run_hash(self.recipe, self.train_as)

    def write(self) -> Path:
        """The file that tells a worker all this."""
        path = self.out / self.name / "job.json"
        changed = self.train and self._other_images()
        if self.train and not (self.trained or (self.run / "last").exists()):
            images = {"train": fingerprint(self.recipe.data.train)}
            write_json(self.out / self.name / IMAGES, images)
        result = None if self.sets is None else str(self.result_path)
        pack = self.train and self.pack
        job = {
            "recipe": self.recipe.to_dict(),
            "train_as": self.train_as,
            "run_hash": run_hash(self.recipe, self.train_as),
            "train": self.train and not self.trained,
            "changed": changed,
            "weights": str(self.weights),
            "pack": str(pack) if pack else None,
            "packed": str(self.out / self.name / PACKED),
            "sets": None if self.sets is None else self.sets.to_json(),
            "result": result,
            "key": self.key,
            "contents": None if self.sets is None else self.sets.contents(),
            "device": self.device,
        }
        write_json(path, job)
        return path


def _json(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def run_hash(recipe: Recipe, train_as: str) -> str:
    """The recipe's hash, were its images at ``train_as``."""
    return replace(recipe, data=replace(recipe.data, train=train_as)).hash


def identity(weights: Path) -> str | None:
    """A hash that changes with the weights; None where there are none."""
    try:
        if weights.is_file():
            return sha256_file(weights)
        facts = json.loads((weights / "checkpoint.json").read_text(encoding="utf-8"))
        return str(facts["file"]["sha256"])
    except (OSError, ValueError, KeyError):
        return None
