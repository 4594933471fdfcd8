"""Damaged and hostile bundles, and missing packages: one line with its remedy, status 1."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest

from moon.files import sha256_file
from moon.manifest import content_version, self_hash
from tests.cli.conftest import KNOWN, Moon, Result, environment
from tests.cli.test_bad_input import PHOTOS, RECIPE, refused


def openers(moon: Moon, bundle: Path, image: Path) -> Iterator[Result]:
    """Every command that opens a bundle; none may write ``out``."""
    out = bundle.parent / "out"
    yield moon("predict", bundle, image)
    yield moon("eval", bundle, "--id", KNOWN, "--far", PHOTOS, "--out", out)
    yield moon("calibrate", bundle, "--data", KNOWN)
    yield moon("score", bundle, KNOWN, "--out", out)
    yield moon("bench", bundle, "--queries", "8")
    yield moon("inspect", bundle)
    yield moon("serve", bundle, "--port", "1")
    yield moon("verify", bundle)
    assert not out.exists()


@pytest.mark.parametrize("name", ["manifest.json", "model.onnx", "gate.json", "golden.npz"])
def test_a_bundle_with_a_flipped_byte(
    moon: Moon, bundle: Path, images: list[Path], name: str
) -> None:
    path = bundle / name
    whole = path.read_bytes()
    draws = random.Random(name)
    for where in sorted(draws.sample(range(len(whole) - 2), 12)):
        flipped = bytearray(whole)
        flipped[where] ^= 1 << draws.randrange(8)
        path.write_bytes(flipped)
        result = moon("verify", bundle)
        refused(result, name, "Take a good copy of the bundle, or export it again")
    for result in openers(moon, bundle, images[0]):
        refused(result, name, "Take a good copy")


def reseal(bundle: Path, extra: str | None = None) -> None:
    """Make every hash fit again; ``extra`` lists a file more."""
    path = bundle / "manifest.json"
    plain: dict[str, Any] = json.loads(path.read_text())
    for name, entry in plain["files"].items():
        entry |= {"sha256": sha256_file(bundle / name), "bytes": (bundle / name).stat().st_size}
    if extra is not None:
        plain["files"][extra] = {"sha256": "0" * 64, "bytes": 1}
    plain["version"] = content_version(plain)
    plain["sha256"] = self_hash(plain)
    path.write_text(json.dumps(plain))


@pytest.mark.parametrize(
    "target", ["../images/secret", "/etc/passwd", "engines/../../x", "a\\..\\b"]
)
def test_a_path_leaving_the_bundle(
    moon: Moon, bundle: Path, images: list[Path], target: str
) -> None:
    reseal(bundle)
    assert moon("verify", bundle).code == 0, "what reseal writes is believed"
    reseal(bundle, target)
    for result in openers(moon, bundle, images[0]):
        refused(result, repr(target), "is not a plain path inside the bundle")


def test_a_link_leaving_the_bundle(moon: Moon, bundle: Path, images: list[Path]) -> None:
    outside = bundle.parent / "gate.json"
    (bundle / "gate.json").rename(outside)
    (bundle / "gate.json").symlink_to(outside)
    for result in openers(moon, bundle, images[0]):
        refused(result, "gate.json is a symbolic link", "Replace it by the file itself")


def test_weights_outside_the_bundle(moon: Moon, bundle: Path, images: list[Path]) -> None:
    model = onnx.load(bundle / "model.onnx")
    tensor = max(model.graph.initializer, key=lambda one: len(one.raw_data))
    place = {"location": "../../secret", "offset": "0", "length": str(len(tensor.raw_data))}
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in place.items():
        tensor.external_data.add(key=key, value=value)
    (bundle / "model.onnx").write_bytes(model.SerializeToString())
    reseal(bundle)
    for result in openers(moon, bundle, images[0]):
        refused(result, f"model.onnx keeps the tensor {tensor.name} outside the file")


TRAIN = ["train", *RECIPE, "--set", "epochs=1", "--out", "RUN2"]


@pytest.mark.parametrize(
    ("package", "words", "texts"),
    [
        ("torch", TRAIN, ["torch", "[train]"]),
        ("torch", ["export", "RUN", "--out", "B2"], ["torch", "[train]"]),
        ("torch", ["demo", "--out", "B2"], ["torch", "[train]"]),
        ("torchvision", ["calibrate", "BUNDLE", "--data", "torchvision:MNIST"],
         ["torchvision", "[train]"]),
        ("sklearn", ["calibrate", "BUNDLE", "--data", KNOWN], ["scikit-learn", "[train]"]),
        ("bentoml", ["serve", "BUNDLE", "--port", "1"], ["bentoml", "[serve]"]),
        ("uvicorn", ["serve", "BUNDLE", "--port", "1"], ["uvicorn", "[serve]"]),
        ("pyarrow", ["score", "BUNDLE", KNOWN, "--out", "B2"], ["pyarrow", "moon-toolkit"]),
        ("PIL", ["predict", "BUNDLE", "x.png"], ["pillow", "moon-toolkit"]),
        ("onnxruntime", ["predict", "BUNDLE", "x.png"], ["pip install onnxruntime"]),
    ],
)  # fmt: skip
def test_a_missing_package_names_what_to_install(
    run: Path, exported: Path, tmp_path: Path, package: str, words: list[str], texts: list[str]
) -> None:
    script = f"import sys; sys.modules[{package!r}] = None; from moon.cli import main; "
    paths = {"RUN": str(run), "BUNDLE": str(exported)}
    paths |= {name: str(tmp_path / name) for name in ("RUN2", "B2")}
    done = subprocess.run(
        [sys.executable, "-c", script + "sys.exit(main())", *(paths.get(w, w) for w in words)],
        env=environment(), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    refused(Result(done.returncode, done.stdout, done.stderr), *texts)
    assert not list(tmp_path.iterdir())


def test_what_a_run_and_an_export_need_is_missed_at_once(
    moon: Moon, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "safetensors.torch", None)
        result = moon("train", *RECIPE, "--set", "epochs=1", "--out", tmp_path / "r")
    refused(result, "safetensors", "[train]")
    assert "epoch" not in result.err
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    result = moon("export", run, "--out", tmp_path / "b")
    refused(result, "onnxscript", "[train]")
    assert not list(tmp_path.iterdir())
