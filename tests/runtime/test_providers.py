"""ONNX Runtime's providers. Those that the installed ONNX Runtime has are used for real."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnxruntime
import pytest

from moon.backend_name import BackendName
from moon.bundle import Bundle
from moon.errors import BackendError, CalibrationError
from moon.rewrite import with_gate
from moon.runtime import providers as table
from moon.runtime.backend import Availability, open_backend
from moon.runtime.binding import Binding
from moon.runtime.calibrate import calibrate
from moon.runtime.onnxruntime import open_session, session_options
from moon.runtime.placement import CPU, RECORD, Node, Placement, from_profile, from_record
from moon.runtime.predictor import Predictor
from moon.runtime.provider_probe import attempt, essence, probe
from moon.runtime.providers import PROVIDERS, Provider, providers
from tests.bundles import images, make_bundle

AZURE = "AzureExecutionProvider"
needs_azure = pytest.mark.skipif(
    AZURE not in onnxruntime.get_available_providers(),
    reason="this ONNX Runtime has no provider that takes no nodes",
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("b") / "tiny")


@pytest.fixture(scope="module")
def here() -> Mapping[str, Availability]:
    return providers()


@pytest.fixture
def azure(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A provider that is there, is made, and takes no node: it is for calls of a web service."""
    one = Provider("azure", AZURE, "a web service", "pip install onnxruntime")
    monkeypatch.setattr(table, "PROVIDERS", MappingProxyType({**PROVIDERS, "azure": one}))
    yield


@pytest.mark.parametrize("name", list(PROVIDERS))
def test_a_provider_computes_the_same_or_says_what_is_missing(
    bundle: Bundle,
    here: Mapping[str, Availability],
    capfd: pytest.CaptureFixture[str],
    name: str,
) -> None:
    backend = f"onnxruntime:{name}"
    batch = bundle.preprocess.normalise(images(9))
    expected = open_backend(bundle).run(batch)
    told: list[str] = []
    if backend in here and here[backend].ok:
        opened = open_backend(bundle, backend, warn=told.append)
        info = opened.info()
        assert opened.name == backend and info["provider"] == PROVIDERS[name].ep
        assert info["nodes"][PROVIDERS[name].ep] > 0 and not info["fell_back"]
        for size in (1, 2, 7, 9):
            assert opened.run(batch[:size])["logits"] == pytest.approx(
                expected["logits"][:size], abs=2e-3
            )
        # Some providers take the graph's threshold for a constant.
        for bar in (np.inf, -np.inf, float(np.median(expected["score"]))):
            found = opened.run(batch, bar)
            assert np.array_equal(found["accept"], found["score"] >= np.float32(bar))
    else:
        with pytest.raises(BackendError, match=PROVIDERS[name].ep):
            open_backend(bundle, backend)
        opened = open_backend(bundle, f"{backend},fallback=cpu", warn=told.append)
        assert len(told) == 1 and f"{backend} cannot run here" in told[0]
        assert opened.name == "onnxruntime" and opened.info()["provider"] == CPU
        assert PROVIDERS[name].ep in opened.info()["fell_back"]
        assert np.array_equal(opened.run(batch)["logits"], expected["logits"])
    # ONNX Runtime prints, on stdout too, where commands print JSON.
    assert capfd.readouterr() == ("", "")


def test_providers_that_cannot_run_say_what_to_do(here: Mapping[str, Availability]) -> None:
    assert "onnxruntime:cuda" in here
    for name, found in here.items():
        assert found.reason and (found.ok or found.install), name
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        assert "onnxruntime-gpu" in here["onnxruntime:cuda"].install


def test_an_unknown_provider_lists_those_there_are(bundle: Bundle) -> None:
    with pytest.raises(BackendError, match=r"no provider gpu that moon knows.*cpu, cuda"):
        open_backend(bundle, "onnxruntime:gpu")


@needs_azure
@pytest.mark.usefixtures("azure")
def test_a_provider_that_takes_no_node_is_refused_unless_asked(bundle: Bundle) -> None:
    """ONNX Runtime lists it among the session's providers, and runs everything on the CPU."""
    with pytest.raises(BackendError, match=f"{AZURE} takes no part of this model"):
        open_backend(bundle, "onnxruntime:azure")
    told: list[str] = []
    opened = open_backend(bundle, "onnxruntime:azure,fallback=cpu", warn=told.append)
    assert opened.name == "onnxruntime" and "takes no part" in opened.info()["fell_back"]
    assert len(told) == 1


@needs_azure
@pytest.mark.usefixtures("azure")
def test_a_fallback_decides_by_the_gate_of_what_runs(bundle: Bundle, tmp_path: Path) -> None:
    own = make_bundle(tmp_path / "own")
    default = own.gate()
    assert default is not None
    other = dataclasses.replace(default, backend="onnxruntime:azure")
    own = with_gate(own, other, "onnxruntime:azure")
    assert own.gate("onnxruntime:azure,device_id=1") is own.gates["onnxruntime:azure"]
    assert own.gate("onnxruntime:cuda") is own.gate("onnxruntime:cpu") is own.gate()
    name = "onnxruntime:azure,fallback=cpu"
    predictor = Predictor.open(own, backend=name, warn=lambda message: None)
    assert predictor.backend.name == "onnxruntime"
    assert predictor._gate is own.gate()
    np.savez(tmp_path / "set.npz", val_images=images(60, seed=11))
    with pytest.raises(CalibrationError, match="onnxruntime:azure cannot run here, and its"):
        calibrate(own, f"{tmp_path / 'set.npz'}#val", backend=name, warn=lambda message: None)
    # The CPU's provider by name is the default gate.
    again = calibrate(own, f"{tmp_path / 'set.npz'}#val", backend="onnxruntime:cpu")
    gate = again.gate()
    assert gate is not None and gate.backend == "onnxruntime" and gate.n == 60


def test_entries_of_the_session_reach_it(bundle: Bundle) -> None:
    told = open_backend(bundle, "onnxruntime,session.intra_op.allow_spinning=0").info()
    assert told["entries"] == {"session.intra_op.allow_spinning": "0"}
    options = session_options(threads=1, spin=True, entries={"session.use_env_allocators": "1"})
    assert options.get_session_config_entry("session.use_env_allocators") == "1"


def test_layers_on_the_cpu_are_told_from_nodes_that_decide() -> None:
    ep = "CUDAExecutionProvider"
    nodes = [
        Node("Conv", "Conv_0", ep),
        Node("HardSwish", "HardSwish_1", CPU),
        Node("Gemm", "", CPU),
        Node("MatMul", "head/knn/MatMul", CPU),
        Node("IsNaN", "", CPU),
    ]
    found = Placement.of(ep, nodes)
    assert [str(node) for node in found.layers] == ["HardSwish HardSwish_1", "Gemm"]
    assert [node.op for node in found.others] == ["MatMul", "IsNaN"]
    assert found.to_json()["nodes"] == {ep: 1, CPU: 4}


def test_a_profile_tells_what_the_record_tells(bundle: Bundle, tmp_path: Path) -> None:
    """Releases before 1.24 keep no record, so that a profiled run stands in for it."""
    options = session_options(threads=1, spin=True, entries={RECORD: "1"})
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(bundle.model_bytes(), options, providers=[CPU])
    session.run(None, {"input": bundle.preprocess.normalise(images(2))})
    profiled = from_profile(session.end_profiling())
    assert {node.ep for node in profiled} == {CPU}
    if hasattr(session, "get_provider_graph_assignment_info"):
        recorded = from_record(session)
        assert sorted(n.op for n in profiled) == sorted(n.op for n in recorded)


@pytest.mark.parametrize("graph", ["0", "1"])
def test_bound_tensors_give_what_a_plain_run_gives(bundle: Bundle, graph: str) -> None:
    """On the CPU's memory; a CUDA graph is ignored there, and where its outputs lie is not."""
    session = open_session(bundle.model_bytes())
    bound = Binding(session, "cpu", {"enable_cuda_graph": graph})
    assert bound.captures == (graph == "1")
    pool = bundle.preprocess.normalise(images(40))
    plain = open_backend(bundle)
    for size in (1, 2, 7, 3, 4, 5, 6, 8, 9, 10, 1, 7):
        for start in (0, 20):
            batch = pool[start : start + size]
            found, expected = bound.run({"input": batch}), plain.run(batch)
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                assert found[name].dtype == value.dtype
                assert np.array_equal(found[name], value), name
    bar = np.array(np.median(expected["score"]), np.float32)
    found = bound.run({"input": pool, "threshold": bar})
    assert np.array_equal(found["accept"], found["score"] >= bar)
    kept = found["logits"].copy()
    bound.run({"input": pool[::-1], "threshold": bar})
    assert np.array_equal(found["logits"], kept)  # a result is not a view of what comes next
    with pytest.raises(BackendError, match="ONNX Runtime failed"):
        bound.run({"nothing": pool})
    with pytest.raises(BackendError, match="device_id=x is no number"):
        Binding(session, "cpu", {"device_id": "x"})


def test_bound_tensors_of_several_threads_do_not_mix(bundle: Bundle) -> None:
    bound = Binding(open_session(bundle.model_bytes()), "cpu", {"enable_cuda_graph": "1"})
    pool = bundle.preprocess.normalise(images(60))
    expected = open_backend(bundle).run(pool)["logits"]
    wrong: list[int] = []

    def work(first: int) -> None:
        for i in range(60):
            at = (first * 7 + i) % 57
            found = bound.run({"input": pool[at : at + 3]})["logits"]
            if not np.allclose(found, expected[at : at + 3], atol=1e-5):
                wrong.append(at)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "provider_bridge_ort.cc:2043 onnxruntime::Provider& onnxruntime::ProviderLibrary::Get()"
            " [ONNXRuntimeError] : 1 : FAIL : Failed to load library /x/libonnxruntime_providers_"
            "cuda.so with error: libcublasLt.so.13: cannot open shared object file: No such file",
            "libcublasLt.so.13: cannot open shared object file: No such file",
        ),
        (
            "/onnxruntime/core/providers/openvino/openvino_provider_factory.cc:141 std::string "
            "onnxruntime::openvino_ep::ParseDeviceType(std::shared_ptr<OVCore>, const onnxruntime"
            "::ProviderOptions&) [ERROR] [OpenVINO] Device GPU is not available\n",
            "Device GPU is not available",
        ),
        (
            "[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Must provide one or more OrtEpDevice.",
            "Must provide one or more OrtEpDevice.",
        ),
        ("nothing of its kind", "nothing of its kind"),
    ],
)
def test_what_a_log_says_without_places_in_its_source(line: str, said: str) -> None:
    assert essence(line) == said


def test_a_provider_is_tried_in_a_process_of_its_own(bundle: Bundle) -> None:
    assert probe(BackendName("onnxruntime")) is None
    refused = probe(BackendName("onnxruntime", "xnnpack"))
    if "XnnpackExecutionProvider" in onnxruntime.get_available_providers():
        assert refused is None
    else:
        assert refused is not None and "XnnpackExecutionProvider" in str(refused)
        said = attempt(bundle.model_bytes(), "onnxruntime:xnnpack")
        assert said is not None and "has no XnnpackExecutionProvider" in said


def test_providers_need_neither_torch_nor_onnx() -> None:
    code = (
        "import sys; from moon.runtime.providers import providers; providers(); "
        "import moon.runtime.provider_session, moon.runtime.binding; "
        "assert not {'torch', 'onnx'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.gpu
@pytest.mark.parametrize("options", ["", ",enable_cuda_graph=1"])
def test_cuda_computes_what_the_cpu_computes(bundle: Bundle, options: str) -> None:
    opened = open_backend(bundle, f"onnxruntime:cuda{options}")
    pool = bundle.preprocess.normalise(images(64))
    expected = open_backend(bundle).run(pool)
    for size in (1, 2, 7, 64):
        for _ in range(3):  # captured, then replayed
            found = opened.run(pool[:size])
            assert found["logits"] == pytest.approx(expected["logits"][:size], abs=1e-2)
        again = opened.run(pool[-size:])
        assert again["logits"] == pytest.approx(expected["logits"][-size:], abs=1e-2)


@pytest.mark.gpu
def test_an_option_that_cuda_does_not_have_is_refused(bundle: Bundle) -> None:
    with pytest.raises(BackendError, match="CUDAExecutionProvider"):
        open_backend(bundle, "onnxruntime:cuda,device_i=1")
