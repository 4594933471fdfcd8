"""The scripts of benchmarks/ import each other as neighbours, and so do their tests."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
MODULES = (
    "bytes",
    "compare",
    "fingerprint",
    "head_alone",
    "image_sets",
    "jobs",
    "load",
    "measure",
    "paper",
    "paper_tables",
    "paper_view",
    "plausible",
    "pool",
    "score_cost",
    "scores",
    "scores_view",
    "spread",
    "structures",
    "worker",
)


@pytest.fixture(scope="session")
def scripts() -> dict[str, ModuleType]:
    sys.path.insert(0, str(FOLDER))
    try:
        return {name: importlib.import_module(name) for name in MODULES}
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture
def in_process(scripts, monkeypatch):
    """Jobs are done here, one after the other, which spares a second of imports each."""
    jobs, pool, worker = scripts["jobs"], scripts["pool"], scripts["worker"]

    def one(self, job, title):
        import json

        try:
            worker.do(json.loads(job.write().read_text()))
        except jobs.MoonError as error:
            return str(error)
        return ""

    monkeypatch.setattr(pool.Pool, "_one", one)
