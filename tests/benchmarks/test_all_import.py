"""Every benchmark imports: nothing that it needs of the project has gone."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
# Services, which open a bundle as they are imported, or need a package of their own.
SERVICES = ("fastapi_service", "stock_service")
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in SERVICES)


@pytest.mark.parametrize("name", NAMES)
def test_it_imports(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Some are run as files of this folder, others as modules from above it.
    monkeypatch.syspath_prepend(str(FOLDER))
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    importlib.import_module(f"benchmarks.{name}" if "from benchmarks" in text else name)
    assert sys.path[0] == str(FOLDER)
