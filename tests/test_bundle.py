from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from moon.bundle import Bundle, gates_bytes, golden_bytes, write_bundle
from moon.data.fingerprint import TrainingSketch
from moon.errors import BundleError, MoonError, UsageError
from moon.files import sha256_bytes
from moon.gate_calibration import calibrate_conformal
from moon.manifest import content_version, self_hash
from moon.onnxfile import patch_scalar, read_scalar
from moon.runtime.onnxruntime import OnnxRuntime
from tests.bundles import CLASSES, images, make_bundle


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "tiny").path


@pytest.fixture
def path(kept: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kept, tmp_path / "tiny"))


def reseal(path: Path, **files: bytes | None) -> None:
    """Change files (None: drop from the list) and put every hash right, as an attacker would."""
    plain = json.loads((path / "manifest.json").read_text())
    for name, data in files.items():
        if data is None:
            plain["files"].pop(name)
            continue
        (path / name).write_bytes(data)
        plain["files"][name] = {"sha256": sha256_bytes(data), "bytes": len(data)}
    rewrite_manifest(path, lambda _: plain)


def rewrite_manifest(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    plain = change(json.loads((path / "manifest.json").read_text()))
    plain["version"] = content_version(plain)
    plain["sha256"] = self_hash(plain)
    (path / "manifest.json").write_text(json.dumps(plain))


def snapshot(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_what_was_written_is_read(path: Path) -> None:
    bundle = Bundle.open(path)
    assert bundle.classes == CLASSES and bundle.manifest.unknown_index == 3
    assert bundle.preprocess.shape == (8, 8, 1)
    assert sorted(p.name for p in path.iterdir()) == [
        "gate.json", "golden.npz", "manifest.json", "model.onnx",
    ]  # fmt: skip
    gate = bundle.gate()
    assert gate is not None and bundle.gate("onnxruntime") is gate
    assert bundle.gate_score == gate.score == "ebo"
    assert read_scalar(bundle.model_bytes(), "threshold") == gate.threshold
    onnx.checker.check_model(onnx.load_model_from_string(bundle.model_bytes()), full_check=True)


def test_golden_outputs_are_what_the_graph_gives(path: Path) -> None:
    bundle = Bundle.open(path)
    golden = bundle.golden()
    outputs = OnnxRuntime(bundle.model_bytes()).run(bundle.preprocess.normalise(golden["pixels"]))
    for name, value in outputs.items():
        assert np.array_equal(golden[name], value), name


def test_writing_twice_gives_the_same_bytes(kept: Path, tmp_path: Path) -> None:
    assert snapshot(make_bundle(tmp_path / "again").path) == snapshot(kept)


def test_every_flipped_byte_of_the_small_files_is_noticed(path: Path) -> None:
    for name in ("manifest.json", "gate.json"):
        whole = (path / name).read_bytes()
        for i in range(0, len(whole), max(1, len(whole) // 150)):
            broken = bytearray(whole)
            broken[i] ^= 0x01
            (path / name).write_bytes(bytes(broken))
            if name == "manifest.json" and _same_json(whole, bytes(broken)):
                continue  # only spacing changed
            with pytest.raises(BundleError):
                Bundle.open(path)
        (path / name).write_bytes(whole)
    Bundle.open(path)


def _same_json(one: bytes, other: bytes) -> bool:
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


@pytest.mark.parametrize("name", ["model.onnx", "golden.npz", "gate.json"])
@pytest.mark.parametrize("where", [0.0, 0.31, 0.5, 0.77, 0.999])
def test_a_flipped_byte_stops_it_and_is_named(path: Path, name: str, where: float) -> None:
    broken = bytearray((path / name).read_bytes())
    broken[int(where * len(broken))] ^= 0x40
    (path / name).write_bytes(bytes(broken))
    with pytest.raises(BundleError, match=f"{name} is damaged: its checksum.*good copy"):
        Bundle.open(path)


@pytest.mark.parametrize("name", ["model.onnx", "golden.npz", "gate.json"])
def test_a_cut_or_grown_file_is_named(path: Path, name: str) -> None:
    whole = (path / name).read_bytes()
    for data in (whole[:-1], whole + b"x", b""):
        (path / name).write_bytes(data)
        with pytest.raises(BundleError, match=f"{name} is damaged: it has {len(data)} bytes"):
            Bundle.open(path)


@pytest.mark.parametrize("name", ["model.onnx", "golden.npz", "gate.json"])
def test_a_missing_file_is_named(path: Path, name: str) -> None:
    (path / name).unlink()
    with pytest.raises(BundleError, match=f"{name} is missing from the bundle"):
        Bundle.open(path)


@pytest.mark.parametrize("name", ["model.onnx", "golden.npz"])
def test_a_required_file_must_be_listed(path: Path, name: str) -> None:
    reseal(path, **{name: None})
    with pytest.raises(BundleError, match=r"is not listed in manifest.json"):
        Bundle.open(path)
    (path / name).unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        Bundle.open(path)


def test_a_byte_changed_after_opening_is_noticed_when_read(path: Path) -> None:
    bundle = Bundle.open(path)
    broken = bytearray((path / "model.onnx").read_bytes())
    broken[100] ^= 1
    (path / "model.onnx").write_bytes(bytes(broken))
    with pytest.raises(BundleError, match=r"model.onnx is damaged"):
        bundle.model_bytes()


def test_a_bundle_rewritten_after_opening_says_so(path: Path) -> None:
    bundle = Bundle.open(path)
    new = bundle.with_gate(calibrate_conformal(np.arange(50.0), 0.1, score="ebo"))
    with pytest.raises(BundleError, match=r"was changed after it was opened. Open it again"):
        bundle.model_bytes()
    assert len(new.model_bytes()) > 0


def test_relabelled_classes_are_noticed(path: Path) -> None:
    text = (path / "manifest.json").read_text().replace('"cat"', '"cow"')
    (path / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match="do not match its sha256"):
        Bundle.open(path)


@pytest.mark.parametrize("value", [5.0, float("inf"), float("-inf"), float("nan")])
def test_a_graph_with_another_threshold_is_refused_though_every_hash_fits(
    path: Path, value: float
) -> None:
    model = (path / "model.onnx").read_bytes()
    if np.isnan(value):
        raw = np.float32(read_scalar(model, "threshold")).tobytes()
        model = model.replace(raw, np.float32(np.nan).tobytes())
    else:
        model = patch_scalar(model, "threshold", value)
    reseal(path, **{"model.onnx": model})
    with pytest.raises(BundleError, match=r"threshold of model.onnx.*not that of gate.json"):
        Bundle.open(path)


def test_zero_and_minus_zero_are_different_thresholds(path: Path) -> None:
    gate = calibrate_conformal(np.zeros(50), 0.1, score="ebo")
    bundle = Bundle.open(path).with_gate(gate)
    reseal(path, **{"model.onnx": patch_scalar(bundle.model_bytes(), "threshold", -0.0)})
    with pytest.raises(BundleError, match=r"threshold of model.onnx"):
        Bundle.open(path)


def test_a_graph_that_gates_by_another_score_is_refused(path: Path) -> None:
    model = (path / "model.onnx").read_bytes()
    reseal(path, **{"model.onnx": patch_scalar(model, "gate_score", 0)})
    with pytest.raises(BundleError, match=r"model.onnx gates by msp, but gate.json"):
        Bundle.open(path)
    for index in (-1, 4):
        reseal(path, **{"model.onnx": patch_scalar(model, "gate_score", index)})
        with pytest.raises(BundleError, match=f"gate_score {index} names no score"):
            Bundle.open(path)


def test_dropping_the_gate_does_not_leave_an_accepting_graph(path: Path) -> None:
    reseal(path, **{"gate.json": None})
    (path / "gate.json").unlink()
    with pytest.raises(BundleError, match=r"threshold of model.onnx.*not that of gate.json, inf"):
        Bundle.open(path)


def test_an_uncalibrated_bundle_accepts_nothing(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", calibrated=False)
    assert bundle.gate() is None and bundle.gate("onnxruntime") is None
    assert not (tmp_path / "b" / "gate.json").exists()
    assert read_scalar(bundle.model_bytes(), "threshold") == np.inf
    assert not bundle.golden()["accept"].any()


@pytest.mark.parametrize("where", ["manifest.json", "gate.json"])
@pytest.mark.parametrize("schema", [0, 2, "1"])
def test_an_unknown_schema_is_refused(path: Path, where: str, schema: object) -> None:
    if where == "manifest.json":
        rewrite_manifest(path, lambda plain: {**plain, "schema_version": schema})
    else:
        plain = json.loads((path / where).read_text())
        reseal(path, **{where: json.dumps({**plain, "schema_version": schema}).encode()})
    with pytest.raises(BundleError, match=f"{where} has schema_version .* this moon reads 1"):
        Bundle.open(path)


@pytest.mark.parametrize("target", ["../outside.bin", "engines/../../outside.bin", "/etc/hostname"])
def test_listed_paths_that_leave_the_folder_are_refused(path: Path, target: str) -> None:
    (path.parent / "outside.bin").write_bytes(b"x")

    def add(plain: dict[str, Any]) -> dict[str, Any]:
        plain["files"][target] = {"sha256": sha256_bytes(b"x"), "bytes": 1}
        return plain

    rewrite_manifest(path, add)
    with pytest.raises(BundleError, match="not a plain path inside the bundle"):
        Bundle.open(path)


@pytest.mark.parametrize("name", ["model.onnx", "gate.json", "golden.npz"])
def test_a_symbolic_link_is_refused_even_with_the_right_content(path: Path, name: str) -> None:
    (path / name).rename(path.parent / name)
    (path / name).symlink_to(path.parent / name)
    with pytest.raises(BundleError, match=f"{name} is a symbolic link"):
        Bundle.open(path)


def test_a_linked_manifest_is_refused(path: Path) -> None:
    (path / "manifest.json").rename(path.parent / "m.json")
    (path / "manifest.json").symlink_to(path.parent / "m.json")
    with pytest.raises(BundleError, match=r"no manifest.json"):
        Bundle.open(path)


def test_links_and_pipes_among_engines_are_refused(path: Path) -> None:
    (path / "engines").mkdir()
    (path / "engines" / "away").symlink_to(path.parent)
    with pytest.raises(BundleError, match="engines/away is a symbolic link"):
        Bundle.open(path)
    (path / "engines" / "away").unlink()
    os.mkfifo(path / "engines" / "pipe")
    with pytest.raises(BundleError, match="engines/pipe is neither a file nor a folder"):
        Bundle.open(path)


def test_a_linked_bundle_folder_is_the_users_own_business(path: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(path)
    assert Bundle.open(tmp_path / "link").manifest == Bundle.open(path).manifest


@pytest.mark.parametrize("name", ["notes.txt", ".hidden", "extra/model.onnx", "enginesx/a"])
def test_unlisted_files_are_refused(path: Path, name: str) -> None:
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_bytes(b"x")
    with pytest.raises(BundleError, match=f"{name} is not listed in manifest.json"):
        Bundle.open(path)


def test_unlisted_engines_are_allowed_and_listed_ones_checked(path: Path) -> None:
    (path / "engines").mkdir()
    (path / "engines" / "tuned.json").write_bytes(b"{}")
    Bundle.open(path)
    reseal(path, **{"engines/tuned.json": b"{}"})
    Bundle.open(path)
    (path / "engines" / "tuned.json").write_bytes(b"[]")
    with pytest.raises(BundleError, match=r"engines/tuned.json is damaged"):
        Bundle.open(path)


def test_external_data_is_refused(path: Path) -> None:
    model = onnx.load_model_from_string((path / "model.onnx").read_bytes())
    tensor = next(t for t in model.graph.initializer if t.name == "fc.weight")
    (path.parent / "weights.bin").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../weights.bin")
    reseal(path, **{"model.onnx": model.SerializeToString()})
    with pytest.raises(BundleError, match=r"keeps the tensor fc.weight outside the file"):
        Bundle.open(path)


@pytest.mark.parametrize("data", [b"", b"not a model", b"\xff" * 50])
def test_a_model_that_is_no_onnx_file_is_refused(path: Path, data: bytes) -> None:
    reseal(path, **{"model.onnx": data})
    with pytest.raises(BundleError, match=r"ONNX"):
        Bundle.open(path)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"\xff", b'{"schema_version": 1}', b'{"schema_version": 1, "gates": {}}',
     b'{"schema_version": 1, "gates": {"default": 3}}', b"[" * 100_000],
)  # fmt: skip
def test_a_malformed_gate_file_is_refused(path: Path, data: bytes) -> None:
    reseal(path, **{"gate.json": data})
    with pytest.raises(BundleError, match="gate"):
        Bundle.open(path)


def pickled() -> bytes:
    import io

    buffer = io.BytesIO()
    np.savez(buffer, pixels=np.array([{"a": 1}], dtype=object))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "golden.npz is not readable"),
        (b"PK\x03\x04 nonsense", "golden.npz is not readable"),
        (pickled(), "golden.npz is not readable"),
        (golden_bytes(images(2), {}), "lacks the array accept"),
    ],
)
def test_malformed_golden_files_are_refused(path: Path, data: bytes, message: str) -> None:
    reseal(path, **{"golden.npz": data})
    with pytest.raises(BundleError, match=message):
        Bundle.open(path)


def test_golden_arrays_of_the_wrong_shape_are_refused(path: Path) -> None:
    golden = Bundle.open(path).golden()
    pixels = golden.pop("pixels")
    for name, value in (("logits", golden["logits"][:, :3]), ("label", golden["label"][:2])):
        reseal(path, **{"golden.npz": golden_bytes(pixels, {**golden, name: value})})
        with pytest.raises(BundleError, match=f"golden.npz: {name} has shape"):
            Bundle.open(path)
    reseal(path, **{"golden.npz": golden_bytes(pixels.astype(np.float32), golden)})  # type: ignore[arg-type]
    with pytest.raises(BundleError, match="pixels must be uint8"):
        Bundle.open(path)


def test_what_is_no_bundle_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("file", "is a file"),
        ("nope", "does not exist"),
        ("empty", "no manifest"),
    ):
        with pytest.raises(BundleError, match=message):
            Bundle.open(tmp_path / name)
    (tmp_path / "empty" / "manifest.json").write_text("{nonsense")
    with pytest.raises(BundleError, match="not readable JSON"):
        Bundle.open(tmp_path / "empty")


def test_writing_refuses_what_could_not_be_opened_and_leaves_nothing(tmp_path: Path) -> None:
    good = make_bundle(tmp_path / "good")
    plain = good.manifest.to_json()
    fields = {key: plain[key] for key in plain if key not in ("version", "sha256", "files")}
    files = {name: (good.path / name).read_bytes() for name in good.manifest.files}
    for name in ("model.onnx", "golden.npz"):
        fewer = {key: data for key, data in files.items() if key != name}
        with pytest.raises(BundleError, match=f"{name} is missing"):
            write_bundle(tmp_path / "bad", manifest_fields=fields, files=fewer)
    with pytest.raises(BundleError, match="not a plain path"):
        write_bundle(tmp_path / "bad", manifest_fields=fields, files={**files, "../x": b""})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["good"]


def test_an_existing_bundle_is_replaced_only_by_force(tmp_path: Path) -> None:
    make_bundle(tmp_path / "b")
    with pytest.raises(UsageError, match="exists"):
        make_bundle(tmp_path / "b", seed=1)
    before = Bundle.open(tmp_path / "b").manifest.version
    assert make_bundle(tmp_path / "b", seed=1, force=True).manifest.version != before


def test_force_does_not_replace_a_folder_of_other_things(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"holds other files"):
        make_bundle(tmp_path / "photos", force=True)
    assert (tmp_path / "photos" / "a.jpg").exists()


def test_another_gate_changes_gate_graph_golden_and_manifest_together(path: Path) -> None:
    old = Bundle.open(path)
    golden = old.golden()
    middle = float(np.median(golden["score_msp"]))
    scores = np.append(np.full(5, middle - 0.01), np.full(95, middle)).astype(np.float32)
    gate = calibrate_conformal(scores, 0.06, score="msp")
    new = old.with_gate(gate)
    assert new.gate() == gate and new.gate_score == "msp"
    assert new.manifest.version != old.manifest.version
    model = new.model_bytes()
    assert (
        read_scalar(model, "threshold") == gate.threshold and read_scalar(model, "gate_score") == 0
    )
    found = new.golden()
    outputs = OnnxRuntime(model).run(new.preprocess.normalise(found["pixels"]))
    for name, value in outputs.items():
        assert np.array_equal(found[name], value), name
    assert 0 < found["accept"].sum() < len(found["accept"])
    assert Bundle.open(path).gate() == gate
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_another_gate_keeps_engines(path: Path) -> None:
    (path / "engines" / "deep").mkdir(parents=True)
    (path / "engines" / "deep" / "a.plan").write_bytes(b"plan")
    gate = calibrate_conformal(np.arange(50.0), 0.1, score="ebo")
    Bundle.open(path).with_gate(gate)
    assert (path / "engines" / "deep" / "a.plan").read_bytes() == b"plan"


def test_a_gate_of_one_backend_stands_beside_the_default(path: Path) -> None:
    bundle = Bundle.open(path)
    default = bundle.gate()
    own = calibrate_conformal(np.arange(50.0), 0.1, score="ebo")
    bundle = bundle.with_gate(own, "fake")
    assert bundle.gate("fake") == own and bundle.gate("onnxruntime") == bundle.gate() == default
    again = calibrate_conformal(np.arange(70.0), 0.1, score="ebo")
    bundle = bundle.with_gate(again)
    assert bundle.gate("fake") == own and bundle.gate() == again
    other = calibrate_conformal(np.arange(70.0), 0.1, score="msp")
    with pytest.raises(BundleError, match="needs a default gate by the same score"):
        bundle.with_gate(other, "fake")
    assert set(bundle.with_gate(other).gates) == {"default"}


def test_a_gate_by_a_score_not_carried_is_refused(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", unknown=False)
    gate = calibrate_conformal(np.arange(50.0), 0.1, score="unknown")
    with pytest.raises(BundleError, match=r"does not carry the score unknown.*msp, ebo, mls"):
        bundle.with_gate(gate)


def test_gates_of_two_scores_in_one_file_are_refused(path: Path) -> None:
    default = Bundle.open(path).gate()
    assert default is not None
    other = calibrate_conformal(np.arange(50.0), 0.1, score="msp")
    reseal(path, **{"gate.json": gates_bytes({"default": default, "fake": other})})
    with pytest.raises(BundleError, match=r"gates by ebo, but gate.json \(fake\) by msp"):
        Bundle.open(path)


def test_a_failed_rewrite_leaves_the_bundle_as_it_was(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(path)
    bundle = Bundle.open(path)
    gate = calibrate_conformal(np.arange(50.0), 0.1, score="ebo")

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(MoonError, match="No space left"):
        bundle.with_gate(gate)
    monkeypatch.undo()
    assert snapshot(path) == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def with_training(path: Path, data: bytes) -> Path:
    reseal(path, **{"training.json": data})
    return path


def test_a_sketch_of_the_training_images_is_read_and_part_of_the_version(path: Path) -> None:
    before = Bundle.open(path)
    assert before.training is None
    sketch = TrainingSketch(images=70, fingerprints=np.array([1, 5, 2**64 - 1], np.uint64))
    after = Bundle.open(with_training(path, sketch.to_bytes()))
    assert after.training == sketch
    assert after.manifest.version != before.manifest.version
    files = {name: (path / name).read_bytes() for name in after.manifest.files}
    again = write_bundle(
        path.parent / "again", manifest_fields=after.manifest.to_json(), files=files
    )
    assert again.training == sketch
    assert again.manifest == after.manifest


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xff", "training.json is not readable JSON"),
        (b"[" * 100_000, "training.json is not readable JSON"),
        (b"[]", "training.json must be a JSON object"),
        (b'{"schema": 2}', "training.json has schema 2"),
        (
            b'{"schema": 1, "images": 1, "sampled": 1, "fingerprints": "AAAA"}',
            "training.json has not 1 fingerprints but 3 bytes",
        ),
    ],
)
def test_a_malformed_sketch_is_refused(path: Path, data: bytes, message: str) -> None:
    with pytest.raises(BundleError) as caught:
        Bundle.open(with_training(path, data))
    assert message in str(caught.value)


def test_a_damaged_or_unlisted_sketch_is_refused(path: Path) -> None:
    data = TrainingSketch(images=9, fingerprints=np.array([1], np.uint64)).to_bytes()
    (path / "training.json").write_bytes(data)
    with pytest.raises(BundleError, match=r"training\.json is not listed"):
        Bundle.open(path)
    with_training(path, data)
    (path / "training.json").write_bytes(data.replace(b"9", b"8"))
    with pytest.raises(BundleError, match=r"training\.json is damaged"):
        Bundle.open(path)
