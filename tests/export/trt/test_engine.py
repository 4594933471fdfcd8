"""From a bundle to a bundle with an engine, for real, and all that stops it half-way."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from moon.bundle import Bundle
from moon.data.source import open_source
from moon.errors import ExportError, MoonError, ParityError, UsageError
from moon.export import from_onnx, to_bundle
from moon.export.trt import engine as module
from moon.export.trt.engine import add_engine
from moon.export.trt.request import EngineRequest
from moon.runtime.calibrate import calibrate
from moon.runtime.trt.check import check_engines
from moon.runtime.trt.package import installed
from moon.runtime.trt.stored import Wanted, engine_bytes, facts, find
from moon.runtime.verify import verify
from tests.export.conftest import TEST, MakeForeign, from_digits
from tests.export.trt.networks import model, node, two_four

pytestmark = pytest.mark.skipif(
    installed("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed"
)
RTX = EngineRequest(targets=(86,))


@pytest.fixture(scope="module")
def plain(digits_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return from_digits(digits_onnx, tmp_path_factory.mktemp("plain") / "b")


@pytest.fixture(scope="module")
def built(plain: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = shutil.copytree(plain.path, tmp_path_factory.mktemp("built") / "b")
    request = EngineRequest(targets=(75, 86), compress=True)
    return add_engine(path, request, images=open_source(TEST))[0]


@pytest.fixture
def copy(plain: Bundle, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(plain.path, tmp_path / "b"))


def test_the_record_says_what_was_built(built: Bundle, plain: Bundle) -> None:
    assert built.manifest.version == plain.manifest.version
    [fact] = facts(built)
    assert fact["targets"] == ["sm_75", "sm_86"] and fact["package"] == "tensorrt_rtx"
    assert fact["precision"] == "fp16" and fact["compression"] == "zstd"
    assert fact["stored_bytes"] < fact["bytes"] and fact["stale"] is False
    assert list(fact["inputs"]) == ["input", "threshold", "thresholds", "gate_score"]
    assert fact["inputs"]["threshold"] == {"dtype": "float32", "shape": []}
    assert fact["outputs"]["accept"] == {"dtype": "bool", "shape": [-1]}
    assert fact["parity"]["images"] > 300 and 0 < fact["parity"]["max_abs"] < 2e-2
    assert fact["parity"]["gate_agreement"] >= 0.995
    assert fact["sparsity"]["eligible"] == [] and fact["sparsity"]["asked"] is False


def test_the_engine_is_found_whole_and_its_header_holds(built: Bundle) -> None:
    from moon.runtime.trt.api import load

    api = load("tensorrt_rtx")
    record = find(built, Wanted(package="tensorrt_rtx", version=api.version, sm=75)).record
    assert record is not None
    data = engine_bytes(built, record)
    assert api.check(data).ok
    checks = [check for check in verify(built) if check.name == record.file]
    assert [check.ok for check in checks] == [True] and "header valid" in checks[0].detail


def test_calibrating_again_leaves_the_engine_fit(built: Bundle, tmp_path: Path) -> None:
    again = Bundle.open(shutil.copytree(built.path, tmp_path / "b"))
    gated = calibrate(again, open_source(TEST), score="msp", reject=0.2)
    assert gated.model_bytes() != built.model_bytes()
    assert [ok for _, ok, _ in check_engines(gated)] == [True]
    assert facts(gated)[0]["stale"] is False


def test_an_engine_is_replaced_and_others_stay(built: Bundle, tmp_path: Path) -> None:
    path = shutil.copytree(built.path, tmp_path / "b")
    add_engine(path, EngineRequest(targets=(75, 86), precision="fp32"))
    bundle, record = add_engine(path, EngineRequest(targets=(75, 86)))
    assert len(facts(bundle)) == 2 and not record.file.endswith(".zst")
    assert sum(name.startswith("engines/") for name in bundle.manifest.files) == 4


def test_an_export_of_a_run_brings_its_engine(run_folder: Path, tmp_path: Path) -> None:
    bundle = to_bundle(run_folder, tmp_path / "b", trt=RTX)
    assert facts(bundle)[0]["parity"]["images"] > 300
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b"]


def test_without_the_engine_there_is_no_bundle(
    digits_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MoonError, match="sm_87"):
        from_digits(digits_onnx, tmp_path / "b", trt=EngineRequest(targets=(87,)))

    def fail(*given: object, **options: object) -> None:
        raise ExportError("the builder failed")

    monkeypatch.setattr(module, "build", fail)
    with pytest.raises(ExportError, match="the builder failed"):
        from_digits(digits_onnx, tmp_path / "b", trt=RTX)
    assert not list(tmp_path.iterdir())


def test_a_bundle_stays_as_it_was_when_the_build_fails(
    copy: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: object, **options: object) -> None:
        raise ExportError("the builder failed")

    before = _tree(copy.path)
    monkeypatch.setattr(module, "build", fail)
    with pytest.raises(ExportError):
        add_engine(copy, RTX)
    assert _tree(copy.path) == before and list(copy.path.parent.iterdir()) == [copy.path]


def _tree(path: Path) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in path.rglob("*") if one.is_file()}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(copy: Bundle) -> None:
    copy.path.parent.chmod(0o555)
    try:
        with pytest.raises(ExportError, match="could not write in"):
            add_engine(copy, RTX)
    finally:
        copy.path.parent.chmod(0o755)


def test_a_write_that_fails_leaves_the_old_bundle(
    copy: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _tree(copy.path)

    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moon.files._flush_tree", full)
    with pytest.raises(MoonError, match="No space left"):
        add_engine(copy, RTX)
    assert _tree(copy.path) == before and list(copy.path.parent.iterdir()) == [copy.path]


def test_fp16_overflow_names_the_layer(digits_onnx: Path, tmp_path: Path) -> None:
    proto = onnx.load(digits_onnx)
    first = next(n for n in proto.graph.node if n.op_type == "Conv")
    for tensor in proto.graph.initializer:
        if tensor.name == first.input[1]:
            values = numpy_helper.to_array(tensor) * np.float32(3e4)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(proto, tmp_path / "loud.onnx")
    bundle = from_digits(tmp_path / "loud.onnx", tmp_path / "b", data=None)
    with pytest.raises(
        ParityError, match=r"in fp16 the layer \S+ \(\w+\) .*65504.*--trt-precision fp32"
    ):
        add_engine(bundle, RTX)
    add_engine(bundle, EngineRequest(targets=(86,), precision="fp32"))


def test_a_half_bundle_has_no_fp32_layers(digits_onnx: Path, tmp_path: Path) -> None:
    bundle = from_digits(digits_onnx, tmp_path / "b", precision="fp16", data=None)
    with pytest.raises(UsageError, match="computes in fp16"):
        add_engine(bundle, EngineRequest(targets=(86,), precision="fp32"))
    _, record = add_engine(bundle, RTX)
    assert record.precision == "fp16" and record.parity["max_abs"] == 0


def test_a_two_four_model_is_told_to_the_builder(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    constants = {
        "stem": rng.standard_normal((16, 1, 3, 3)).astype(np.float32) / 3,
        "body": two_four(16, 16),
        "fc": rng.standard_normal((16, 4)).astype(np.float32),
    }
    nodes = [
        node("Conv", ["input", "stem"], "a", pads=[1, 1, 1, 1]),
        node("Relu", ["a"], "b"),
        node("Conv", ["b", "body"], "c", pads=[1, 1, 1, 1]),
        node("GlobalAveragePool", ["c"], "d"),
        node("Flatten", ["d"], "e"),
        node("MatMul", ["e", "fc"], "logits"),
    ]
    onnx.save(model(nodes, constants), tmp_path / "two_four.onnx")
    bundle = from_onnx(
        tmp_path / "two_four.onnx", tmp_path / "b", classes="abcd", mean=[0], std=[1]
    )
    _, record = add_engine(bundle, RTX)
    assert record.flags == ("SPARSE_WEIGHTS",) and record.sparsity.asked
    assert record.sparsity.eligible is not None and len(record.sparsity.eligible) == 1
    assert record.sparsity.picked is None and "does not say which" in record.sparsity.why


_WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
from moon.export.trt.engine import add_engine
from moon.export.trt.request import EngineRequest
print(add_engine(sys.argv[1], EngineRequest(targets=(86,)))[1].file)
"""


def test_no_torch_is_needed(copy: Bundle) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_TORCH, str(copy.path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in Bundle.open(copy.path).manifest.files


def test_an_uncalibrated_model_of_ones_own(foreign: MakeForeign, tmp_path: Path) -> None:
    bundle = from_onnx(foreign(), tmp_path / "b", classes="abcde", mean=[0.5], std=[0.5], trt=RTX)
    [fact] = facts(bundle)
    assert bundle.gate() is None and fact["parity"]["gate_agreement"] is None


def test_what_computes_otherwise_is_refused(copy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "halved", _noisy)
    with pytest.raises(ParityError, match=r"differ by|the same labels"):
        add_engine(copy, RTX)


def _noisy(network: onnx.ModelProto) -> onnx.ModelProto:
    from moon.export.trt.network import halved

    half = halved(network)
    last = [t for t in half.graph.initializer if t.data_type == 10 and len(t.dims) == 4][-1]
    values = numpy_helper.to_array(last) * np.float16(1.2)
    last.CopyFrom(numpy_helper.from_array(values, last.name))
    return half
