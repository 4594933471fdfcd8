"""From a bundle to an engine: real engines of TensorRT-RTX, and a driver that stands in.

The package is real, and built the engines here; the driver is `driver.c`, which has no GPU behind
it, so that loading is as far as it goes. Nothing is run.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moon.bundle import Bundle
from moon.errors import BackendError, BundleError, MoonError
from moon.files import sha256_bytes
from moon.gate_calibration import calibrate_conformal
from moon.runtime.backend import NoEngineError, backends, open_backend
from moon.runtime.trt import cuda
from moon.runtime.trt.api import load
from moon.runtime.trt.cuda import Driver, GpuFacts
from moon.runtime.trt.here import available
from moon.runtime.trt.kept import KeptCode, kept_key, open_store
from moon.runtime.trt.sidecar import EngineRecord
from moon.runtime.trt.stored import engine_bytes, records
from moon.runtime.verify import verify
from tests.bundles import make_bundle
from tests.runtime.trt.test_cuda import library as library

pytest.importorskip("tensorrt_rtx")
pytest.importorskip("onnx")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with an engine for sm_86, really built."""
    from moon.export.trt.engine import add_engine
    from moon.export.trt.request import EngineRequest

    bundle = make_bundle(tmp_path_factory.mktemp("built") / "bundle")
    return add_engine(bundle, EngineRequest(targets=(86,), precision="fp32"))[0]


@pytest.fixture
def bundle(built: Bundle, tmp_path: Path) -> Bundle:
    shutil.copytree(built.path, tmp_path / "bundle")
    return Bundle.open(tmp_path / "bundle")


@pytest.fixture
def gpu(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that says there is a GPU called Stand-in, sm_86."""
    driver = Driver(library)
    monkeypatch.setattr(cuda, "_loaded", lambda: driver)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_LIBRARIES", ("libnosuchcuda.so.1",))
    monkeypatch.setattr(cuda, "_loaded", cuda._loaded.__wrapped__)


def _record(bundle: Bundle) -> EngineRecord:
    (found,) = records(bundle).values()
    assert isinstance(found, EngineRecord)
    return found


def _stored(bundle: Bundle, **changes: Any) -> Bundle:
    """The bundle with another record beside its engine."""
    from moon.rewrite import with_engine_files

    (name,) = records(bundle)
    return with_engine_files(bundle, {name: replace(_record(bundle), **changes).to_bytes()})


def test_a_real_engine_comes_as_far_as_the_library(bundle: Bundle, gpu: None) -> None:
    """All checks pass; TensorRT-RTX itself then finds no real driver, and that is one line."""
    with pytest.raises(BackendError, match=r"tensorrt_rtx-.*sm_86-fp32.engine cannot be") as raised:
        open_backend(bundle, "tensorrt_rtx")
    assert "\n" not in str(raised.value) and "CUDA" in str(raised.value)


def test_no_driver(bundle: Bundle, no_gpu: None) -> None:
    with pytest.raises(BackendError, match=r"TensorRT-RTX cannot run here: there is no NVIDIA"):
        open_backend(bundle, "tensorrt_rtx")
    found = backends()
    assert (
        not found["tensorrt_rtx"].ok
        and "is installed, and there is no" in found["tensorrt_rtx"].reason
    )


def test_without_an_engine_it_is_said_what_to_do(tmp_path: Path, gpu: None) -> None:
    plain = make_bundle(tmp_path / "plain")
    with pytest.raises(
        NoEngineError, match=r"holds no engine for TensorRT-RTX .* on Stand-in \(sm_86"
    ):
        open_backend(plain, "tensorrt_rtx")
    (check,) = [one for one in verify(plain) if one.name == "tensorrt_rtx"]
    assert check.ok and check.detail.startswith("not run: ")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"package_version": "1.2.0.44"}, r"needs version 1\.2\.0\.44, and 1\.\d"),
        ({"targets": (120,)}, r"it is for sm_120, and the GPU is sm_86"),
        ({"model_sha256": "0" * 64}, r"built from another model \(000000000000"),
    ],
)
def test_an_engine_of_another_version_gpu_or_model(
    bundle: Bundle, gpu: None, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(NoEngineError, match=words) as raised:
        open_backend(_stored(bundle, **changes), "tensorrt_rtx")
    assert "moon export" in str(raised.value) and "\n" not in str(raised.value)


def test_calibrating_again_leaves_the_engine_right(bundle: Bundle, gpu: None) -> None:
    from tests.runtime.trt.test_outcome import _scores

    again = bundle.with_gate(calibrate_conformal(_scores(bundle, "msp")[0], 0.3, score="msp"))
    assert again.gate_score == "msp"
    with pytest.raises(BackendError, match="cannot be loaded"):  # by the library, not by us
        open_backend(again, "tensorrt_rtx")


def test_a_flipped_byte_never_reaches_the_library(bundle: Bundle, gpu: None) -> None:
    path = bundle.path / _record(bundle).file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(BundleError, match=r"is damaged: its checksum is not the one"):
        open_backend(bundle, "tensorrt_rtx")
    with pytest.raises(BundleError, match="damaged"):
        Bundle.open(bundle.path)


@pytest.mark.parametrize("kept", [0, 10, 64, 1000])
def test_a_truncated_engine_that_its_record_vouches_for(
    bundle: Bundle, gpu: None, kept: int
) -> None:
    """Whoever makes checksums too can still not bring the process down by a cut file."""
    from moon.rewrite import with_engine_files

    record = _record(bundle)
    data = engine_bytes(bundle, record)[:kept]
    sealed = with_engine_files(bundle, {record.file: data})
    sealed = _stored(sealed, sha256=sha256_bytes(data), size=len(data))
    with pytest.raises(MoonError) as raised:
        open_backend(sealed, "tensorrt_rtx")
    assert "\n" not in str(raised.value)


def test_a_package_that_does_not_fit_the_gpu(
    bundle: Bundle, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    h100 = GpuFacts("NVIDIA H100", (9, 0), 80 << 30, False)
    monkeypatch.setattr(Driver, "facts", lambda self, ordinal=0: h100)
    with pytest.raises(BackendError, match=r"TensorRT-RTX does not run on NVIDIA H100.*\[trt\]"):
        open_backend(bundle, "tensorrt_rtx")
    assert not available("tensorrt_rtx").ok
    assert "NVIDIA H100" in available("tensorrt").reason


def test_which_package_fits_is_said(gpu: None) -> None:
    assert available("tensorrt_rtx").ok
    assert available("tensorrt_rtx").reason.endswith("on Stand-in (sm_86)")


def test_an_onnx_graph_alone_is_refused(bundle: Bundle) -> None:
    with pytest.raises(BackendError, match=r"given an ONNX graph alone.*--baseline onnxruntime"):
        open_backend(bundle.model_bytes(), "tensorrt_rtx")


def test_the_methods_used_are_those_of_the_package() -> None:
    """By their signatures in TensorRT-RTX's own bindings."""
    trt = load("tensorrt_rtx").trt
    for kind, method, words in (
        (trt.IExecutionContext, "set_input_shape", "name: str, shape: tuple"),
        (trt.IExecutionContext, "set_tensor_address", "name: str, memory: typing.SupportsInt"),
        (trt.IExecutionContext, "execute_async_v3", "stream_handle: typing.SupportsInt"),
        (trt.ICudaEngine, "create_execution_context", "runtime_config: "),
        (trt.ICudaEngine, "create_runtime_config", "IRuntimeConfig"),
        (trt.ICudaEngine, "get_tensor_profile_shape", "name: str, profile_index"),
        (trt.ICudaEngine, "get_tensor_location", "name: str"),
        (trt.IRuntimeConfig, "create_runtime_cache", "IRuntimeCache"),
        (trt.IRuntimeConfig, "set_runtime_cache", "cache: "),
        (trt.IRuntimeCache, "deserialize", "blob: "),
        (trt.IRuntimeCache, "serialize", "IHostMemory"),
        (trt.Runtime, "deserialize_cuda_engine", "serialized_engine"),
    ):
        assert words in getattr(kind, method).__doc__, (kind, method)
    assert trt.IRuntimeConfig.cuda_graph_strategy.fset is not None
    assert {"DISABLED", "WHOLE_GRAPH_CAPTURE"} <= set(trt.CudaGraphStrategy.__members__)


class _Cache:
    """``IRuntimeCache`` that takes what begins with its own name."""

    def __init__(self) -> None:
        self.content = b""

    def serialize(self) -> bytes:
        return self.content

    def deserialize(self, blob: bytes) -> bool:
        if not blob.startswith(b"rtx"):
            return False
        self.content = blob
        return True


KEY = {
    "engine": "0" * 64, "version": "1.7.1.116", "gpu": "Stand-in",
    "compute_capability": (8, 6), "driver": "580",
}  # fmt: skip


@pytest.mark.parametrize("changed", list(KEY))
def test_compiled_code_is_of_one_engine_gpu_driver_and_version(changed: str) -> None:
    other = (8, 9) if changed == "compute_capability" else "other"
    assert kept_key(**KEY) != kept_key(**{**KEY, changed: other})  # type: ignore[arg-type]


def test_compiled_code_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOON_CACHE_DIR", str(tmp_path / "cache"))
    key = kept_key(**KEY)  # type: ignore[arg-type]
    first = KeptCode(_Cache(), open_store(), key)
    assert not first.found
    first.cache.content = b"rtx: kernels"
    first.save()
    again = KeptCode(_Cache(), open_store(), key)
    assert again.found and again.cache.content == b"rtx: kernels"
    (entry,) = (tmp_path / "cache" / "tensorrt").iterdir()
    before = entry.stat().st_mtime_ns
    again.save()  # nothing new
    assert entry.stat().st_mtime_ns == before


@pytest.mark.parametrize("at", [0, 20, 50, -1])
def test_damaged_code_is_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    monkeypatch.setenv("MOON_CACHE_DIR", str(tmp_path / "cache"))
    key = kept_key(**KEY)  # type: ignore[arg-type]
    first = KeptCode(_Cache(), open_store(), key)
    first.cache.content = b"rtx: kernels"
    first.save()
    (entry,) = (tmp_path / "cache" / "tensorrt").iterdir()
    data = bytearray(entry.read_bytes())
    data[at] ^= 1
    entry.write_bytes(bytes(data))
    assert not KeptCode(_Cache(), open_store(), key).found
    assert not entry.exists()


def test_code_of_another_environment_is_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOON_CACHE_DIR", str(tmp_path / "cache"))
    key = kept_key(**KEY)  # type: ignore[arg-type]
    open_store().put(key, b"not of this GPU")
    assert not KeptCode(_Cache(), open_store(), key).found
