"""Plans in a bundle: used where they fit, passed over where they do not, written at once or not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moon.bundle import Bundle
from moon.calibrated import model_hash
from moon.errors import BundleError, MoonError
from moon.files import sha256_bytes
from moon.manifest import FileEntry, self_hash
from moon.onnxfile import patch_scalar
from moon.rewrite import with_engine_file
from moon.runtime import open_backend
from moon.runtime.calibrate import calibrate
from moon.runtime.sparse import stored, worth
from moon.runtime.sparse.engine import SparseEngine
from moon.runtime.sparse.isa import target
from moon.runtime.sparse.jit import fingerprint
from moon.runtime.sparse.kernels import SOURCES
from moon.runtime.sparse.stored import facts, find, store
from moon.runtime.sparse.tuning import Measured, Target, Tuned, Tuning, Verdict
from moon.runtime.verify import verify

from .exported import export

PLAN = {"tile": 2, "together": 4, "reading": "shift", "block": 40}
FOLDER = "engines/"


@pytest.fixture(autouse=True)
def engaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine runs what is too small to gain by it."""
    monkeypatch.setattr(worth, "LEAST_SAVED", 0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("stored")).path


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Bundle:
    shutil.copytree(made, tmp_path / "b.moon")
    return Bundle.open(tmp_path / "b.moon")


def tuning(bundle: Bundle, verdict: Verdict = "sparse", images: int = 1, **target_: str) -> Tuning:
    cpu, _ = target()
    engine = SparseEngine(bundle.model_bytes())
    x = bundle.preprocess.normalise(bundle.golden()["pixels"][:1])
    names = [one.tensor for one in engine.profile(x, runs=1).layers if one.plan]
    here: dict[str, str] = {
        "cpu": cpu, "isa": engine.isa, "kernels": fingerprint(*SOURCES),
        "model": model_hash(bundle.model_bytes()),
    }  # fmt: skip
    measured = Measured(default_ms=2.0, tuned_ms=1.0, onnxruntime_ms=3.0, layers={})
    tuned = Tuned(
        threads=1, plans=dict.fromkeys(names, PLAN), verdict=verdict, measured=measured
    )  # fmt: skip
    return Tuning(target=Target(**{**here, **target_}), moon="0.1.0", batches={images: tuned})


def outputs(bundle: Bundle, told: list[str] | None = None, threads: int = 1) -> Any:
    warn = pytest.fail if told is None else told.append
    backend = open_backend(bundle, "sparse", threads=threads, warn=warn)
    x = bundle.preprocess.normalise(bundle.golden()["pixels"][:1])
    return backend.info(), backend.run(x)["logits"]


def test_plans_are_used_and_change_nothing_but_rounding(bundle: Bundle) -> None:
    info, before = outputs(bundle)
    assert info["tuned_batches"] == []
    written = store(bundle, tuning(bundle))
    assert written.manifest.version == bundle.manifest.version
    assert written.manifest.sha256 != bundle.manifest.sha256
    info, after = outputs(written)
    assert info["tuned_batches"] == [1] and info["isa"]
    model = written.model_bytes()
    engine = SparseEngine(model, tuning=find(written, model)[0])
    x = bundle.preprocess.normalise(bundle.golden()["pixels"][:1])
    assert [one.plan for one in engine.profile(x, runs=1).layers if one.plan] == [PLAN] * 3
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)
    assert np.array_equal(outputs(written, [], threads=2)[1], after)
    assert all(check.ok for check in verify(written))


def test_they_outlive_another_threshold(bundle: Bundle) -> None:
    written = store(bundle, tuning(bundle))
    again = calibrate(written, "sklearn:digits#test", reject=0.2)
    assert again.manifest.version != written.manifest.version
    assert outputs(again)[0]["tuned_batches"] == [1]


def test_a_verdict_hands_the_model_over(bundle: Bundle) -> None:
    told: list[str] = []
    info, _ = outputs(store(bundle, tuning(bundle, verdict="onnxruntime")), told)
    assert "faster when both were measured" in info["handed_over"] and info["isa"] is None
    assert len(told) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kernels": "0" * 64}, "another version of the engine"),
        ({"model": "0" * 64}, "another model"),
    ],
)
def test_plans_for_another_are_passed_over(
    bundle: Bundle, change: dict[str, str], words: str
) -> None:
    data = tuning(bundle, **change).to_bytes()
    cpu, isa = target()[0], SparseEngine(bundle.model_bytes()).isa
    written = with_engine_file(bundle, stored.file_name(cpu, isa), data)
    told: list[str] = []
    info, logits = outputs(written, told)
    assert info["tuned_batches"] == [] and info["isa"]
    assert len(told) == 1 and f"it is for {words}; moon bench --tune measures again" in told[0]
    assert np.array_equal(logits, outputs(bundle, told)[1])


def test_plans_for_another_cpu_say_nothing(bundle: Bundle) -> None:
    written = with_engine_file(
        bundle, "engines/sparse-z80-sse.json", tuning(bundle, cpu="z80").to_bytes()
    )
    assert outputs(written)[0]["tuned_batches"] == []


@pytest.mark.parametrize("data", [b"", b"{}", b"[" * 9999, b"\x00\xff"])
def test_what_is_no_plan_is_passed_over(bundle: Bundle, data: bytes) -> None:
    cpu, isa = target()[0], SparseEngine(bundle.model_bytes()).isa
    written = with_engine_file(bundle, stored.file_name(cpu, isa), data)
    told: list[str] = []
    info, _ = outputs(written, told)
    assert info["isa"] and info["tuned_batches"] == []
    assert len(told) == 1 and "is passed over" in told[0]
    assert facts(written)[0]["error"]
    # And it is replaced by what is measured.
    assert outputs(store(written, tuning(written)))[0]["tuned_batches"] == [1]


def test_a_flipped_byte_stops_the_bundle(bundle: Bundle) -> None:
    written = store(bundle, tuning(bundle))
    (path,) = (written.path / "engines").iterdir()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"engines/sparse-.*\.json is damaged: its checksum"):
        Bundle.open(written.path)
    with pytest.raises(BundleError, match="damaged"):
        open_backend(written, "sparse")


def test_a_file_that_is_not_listed_is_not_read(bundle: Bundle) -> None:
    name = stored.file_name(target()[0], SparseEngine(bundle.model_bytes()).isa)
    (bundle.path / "engines").mkdir()
    (bundle.path / name).write_bytes(tuning(bundle).to_bytes())
    assert find(Bundle.open(bundle.path), bundle.model_bytes()) == (None, "")


def test_other_numbers_of_images_stay(bundle: Bundle) -> None:
    first = store(bundle, tuning(bundle, images=8))
    both = store(first, tuning(first, images=1))
    assert outputs(both)[0]["tuned_batches"] == [1, 8]
    assert [(one["together"], one["verdict"]) for one in facts(both)] == [
        (1, "sparse"),
        (8, "sparse"),
    ]
    assert json.dumps(facts(both), allow_nan=False)


def test_equal_findings_give_equal_bundles(bundle: Bundle) -> None:
    one = store(bundle, tuning(bundle))
    again = store(one, tuning(one))
    assert again.manifest.sha256 == one.manifest.sha256


def test_a_gate_that_came_meanwhile_stays(bundle: Bundle) -> None:
    found = tuning(bundle)
    gate = calibrate(Bundle.open(bundle.path), "sklearn:digits#test", reject=0.3).gate()
    written = store(bundle, found)
    assert written.gate() == gate != bundle.gate()


def test_another_model_that_came_meanwhile_is_not_given_the_plans(bundle: Bundle) -> None:
    found = tuning(bundle, model="0" * 64)
    before = snapshot(bundle.path)
    with pytest.raises(BundleError, match="another model than the one that was tuned"):
        store(bundle, found)
    assert snapshot(bundle.path) == before


def snapshot(path: Path) -> dict[str, bytes]:
    return {str(one): one.read_bytes() for one in sorted(path.rglob("*")) if one.is_file()}


@pytest.mark.parametrize("where", ["_flush_tree", "_swap_in"])
def test_half_a_change_is_none(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    found, before = tuning(bundle), snapshot(bundle.path)

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"moon.files.{where}", fail)
    with pytest.raises(MoonError, match=r"could not write .*: No space left"):
        store(bundle, found)
    monkeypatch.undo()
    assert snapshot(bundle.path) == before
    assert [one.name for one in bundle.path.parent.iterdir()] == [bundle.path.name]


def test_engines_files_alone(bundle: Bundle) -> None:
    with pytest.raises(ValueError, match=r"gate\.json is no file of engines/"):
        with_engine_file(bundle, "gate.json", b"{}")


def test_a_hash_of_a_model_is_of_its_weights(bundle: Bundle) -> None:
    model = bundle.model_bytes()
    assert model_hash(patch_scalar(model, "threshold", 3.0)) == model_hash(model)
    assert model_hash(model[:-40] + b"x" + model[-39:]) != model_hash(model)
    assert model_hash(b"\xff" * 50) == sha256_bytes(b"\xff" * 50)


def test_hostile_plans_of_a_right_checksum(bundle: Bundle) -> None:
    """Whoever wrote them can write the checksums as well; the answers stay right."""
    expected = outputs(bundle)[1]
    name = stored.file_name(target()[0], SparseEngine(bundle.model_bytes()).isa)
    for plan in (
        {"tile": 16, "together": 4, "reading": "rows", "block": 1},
        {"tile": 13, "together": 3, "reading": "direct", "block": 1 << 30},
        {"tile": 1 << 20, "together": 1, "reading": "frame", "block": 1 << 30},
        {"tile": 5, "together": 4, "reading": "gather", "block": 1 << 30},
    ):
        plain = json.loads(tuning(bundle).to_bytes())
        plans = plain["batches"]["1"]["plans"]
        plain["batches"]["1"]["plans"] = dict.fromkeys([*plans, "", "gone"], plan)
        plant(bundle.path, name, json.dumps(plain).encode())
        info, logits = outputs(Bundle.open(bundle.path))
        assert info["isa"] and info["tuned_batches"] == [1]
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def plant(path: Path, name: str, data: bytes) -> None:
    """A file with its checksum, by hand."""
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_bytes(data)
    plain = json.loads((path / "manifest.json").read_text())
    plain["files"][name] = FileEntry(sha256=sha256_bytes(data), size=len(data)).to_json()
    plain["sha256"] = self_hash(plain)
    (path / "manifest.json").write_text(json.dumps(plain))
