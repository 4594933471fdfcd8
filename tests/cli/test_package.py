"""``import moon`` is light, and its names are there when used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import moon

NAMES = ["Bundle", "Predictor", "Recipe", "__version__", "calibrate", "fit", "to_bundle"]


def python(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_public_names() -> None:
    assert moon.__all__ == NAMES
    assert set(NAMES) <= set(dir(moon))


def test_importing_it_loads_nothing_heavy() -> None:
    heavy = ["numpy", "torch", "onnx", "onnxruntime", "PIL", "typer", "rich", "sklearn", "pyarrow"]
    code = f"import sys, moon; print([m for m in {heavy} if m in sys.modules])"
    assert python(code) == "[]"


def test_the_command_line_loads_nothing_heavy_before_a_command_runs() -> None:
    heavy = ["numpy", "torch", "onnx", "onnxruntime", "PIL", "sklearn", "pyarrow", "matplotlib"]
    code = f"import sys, moon.cli.app; print([m for m in {heavy} if m in sys.modules])"
    assert python(code) == "[]"


def test_predicting_names_need_no_torch() -> None:
    code = "import sys, moon; moon.Predictor, moon.Bundle, moon.calibrate, moon.runtime"
    assert python(f"{code}; print('torch' in sys.modules)") == "False"


def test_names_load_what_they_are() -> None:
    from moon.export.to_bundle import to_bundle
    from moon.runtime.calibrate import calibrate
    from moon.runtime.predictor import Predictor
    from moon.trainer.fit import fit

    assert moon.fit is fit
    assert moon.to_bundle is to_bundle
    assert moon.calibrate is calibrate
    assert moon.Predictor is Predictor
    assert moon.trainer.Sparsifier.__name__ == "Sparsifier"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nope'"):
        _ = moon.nope
