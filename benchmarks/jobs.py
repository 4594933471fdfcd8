"""Runs side by side: each a process of its own, resumable, none stopped by another's failure.

Under OUT, `NAME-seedS/run` is the run of a recipe, `NAME-seedS/result-KEY.json` what was measured
of it, and `logs/NAME-seedS.txt` what its process said on stderr. `checkpoints/NAME-seedS.moonckpt`
is the same run as one small file (`moon.trainer.compact`), to be measured elsewhere.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock

from moon.errors import MoonError, UsageError
from moon.files import canonical_json, sha256_bytes, sha256_file, write_json
from moon.trainer.compact import SUFFIX
from moon.trainer.recipe import Recipe

WORKER = Path(__file__).with_name("worker.py")
# Seconds between two lines of one run.
EVERY = 10.0
Say = Callable[[str], None]


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
        """What was measured, unless the weights have changed since."""
        try:
            found = json.loads(self.result_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        now = identity(self.weights)
        return None if now is not None and now != found.get("identity") else found

    @property
    def todo(self) -> str:
        """What is left: `train`, `pack`, `measure`, "not trained" where it may not be, or ""."""
        if self.train and not (self.trained and self._same_recipe()):
            return "train"  # A run of another recipe is for the worker to refuse.
        if self.sets is not None and self.result() is not None:
            return ""
        if not self.weights.exists() or (self.weights == self.run and not self.trained):
            return "" if self.sets is None else "not trained"
        if self.sets is not None:
            return "measure"
        return "pack" if self.pack and not self.pack.exists() else ""

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
        result = None if self.sets is None else str(self.result_path)
        pack = self.train and self.pack
        job = {
            "recipe": self.recipe.to_dict(),
            "train_as": self.train_as,
            "run_hash": run_hash(self.recipe, self.train_as),
            "train": self.train and not self.trained,
            "weights": str(self.weights),
            "pack": str(pack) if pack else None,
            "sets": None if self.sets is None else self.sets.to_json(),
            "result": result,
            "key": self.key,
            "device": self.device,
        }
        write_json(path, job)
        return path


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


class StoppedError(Exception):
    """Ctrl-C or SIGTERM; all workers have ended, and every run can be taken up again."""


class Pool:
    """Workers, so many at a time.

    Args:
        parallel: how many.
        say: told a line now and then.
    """

    def __init__(self, parallel: int, say: Say) -> None:
        if parallel < 1:
            raise UsageError(f"--jobs must be at least 1, got {parallel}")
        self._parallel, self._say = parallel, say
        self._running: set[subprocess.Popen] = set()
        self._lock = Lock()
        self._stopped = False

    def run(self, jobs: Sequence[Job]) -> dict[str, str]:
        """Do what is left of the jobs.

        Returns:
            Why each job failed that did, by name.

        Raises:
            StoppedError: stopped from outside.
        """
        before = signal.signal(signal.SIGTERM, _interrupt)
        failures: dict[str, str] = {}
        try:
            with ThreadPoolExecutor(self._parallel) as threads:
                pending = [
                    (job, threads.submit(self._one, job, f"[{i}/{len(jobs)}] {job.name}"))
                    for i, job in enumerate(jobs, 1)
                ]
                try:
                    for job, future in pending:
                        if reason := future.result():
                            failures[job.name] = reason
                except KeyboardInterrupt:
                    self._stop()
                    raise StoppedError from None
        finally:
            signal.signal(signal.SIGTERM, before)
        return failures

    def _one(self, job: Job, title: str) -> str:
        """Run one job; why it failed, or ""."""
        log = job.out / "logs" / f"{job.name}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        path = job.write()
        with log.open("wb") as errors:
            with self._lock:
                if self._stopped:
                    return "stopped"
                process = subprocess.Popen(
                    [sys.executable, WORKER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                    stderr=errors, text=True, env=self._environment(), start_new_session=True,
                )  # fmt: skip
                self._running.add(process)
            with process:
                self._tell(process, title)
                # Before stdin is closed, which would end it.
                code = process.wait()
            with self._lock:
                self._running.discard(process)
        if self._stopped:
            return "stopped"
        if code == 0:
            self._say(f"{title}: done")
            return ""
        reason = _last_line(log) or f"its process ended with {code}"
        self._say(f"{title}: FAILED: {reason}")
        return reason

    def _tell(self, process: subprocess.Popen, title: str) -> None:
        """Pass on the worker's lines, the first and then one every few seconds."""
        told = 0.0
        for line in process.stdout or ():
            if time.monotonic() - told >= EVERY:
                told = time.monotonic()
                self._say(f"{title}: {line.rstrip()}")

    def _stop(self) -> None:
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.kill()

    def _environment(self) -> dict[str, str]:
        threads = max(1, (os.cpu_count() or 1) // self._parallel)
        return {"OMP_NUM_THREADS": str(threads), **os.environ}


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt
