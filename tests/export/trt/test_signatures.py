"""Every call the adapter makes, held against what the packages really offer.

TensorRT itself does not install without a GPU's libraries, but its bindings do, and load over a
library of empty functions: their signatures are then there to read, and what a machine without a
driver does can be tried.
"""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

# Class, method, and the arguments that moon passes, by name in the bindings' own signatures.
CALLS = (
    ("Builder", "__init__", "logger"),
    ("Builder", "create_network", "flags"),
    ("Builder", "create_builder_config", ""),
    ("Builder", "create_optimization_profile", ""),
    ("Builder", "build_serialized_network", "network config"),
    ("OnnxParser", "__init__", "network logger"),
    ("OnnxParser", "parse", "model path"),
    ("OnnxParser", "get_error", "index"),
    ("ParserError", "node_name", ""),
    ("ParserError", "node_operator", ""),
    ("ParserError", "desc", ""),
    ("IBuilderConfig", "set_flag", "flag"),
    ("IBuilderConfig", "clear_flag", "flag"),
    ("IBuilderConfig", "add_optimization_profile", "profile"),
    ("IOptimizationProfile", "set_shape", "input min opt max"),
    ("INetworkDefinition", "get_input", "index"),
    ("INetworkDefinition", "get_output", "index"),
    ("Runtime", "__init__", "logger"),
    ("Runtime", "deserialize_cuda_engine", "serialized_engine"),
    ("ICudaEngine", "create_engine_inspector", ""),
    ("EngineInspector", "get_engine_information", "format"),
)
NAMES = (
    "BuilderFlag.SPARSE_WEIGHTS",
    "BuilderFlag.TF32",
    "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
    "ProfilingVerbosity.DETAILED",
    "LayerInformationFormat.JSON",
    "IBuilderConfig.profiling_verbosity",
    "OnnxParser.num_errors",
    "INetworkDefinition.num_inputs",
    "INetworkDefinition.num_outputs",
    "ITensor.name",
    "ITensor.dtype",
    "ITensor.shape",
    "ILogger.log",
    "nptype",
    "get_nv_onnx_parser_version",
)
RTX_NAMES = (
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
    "ComputeCapability.SM86",
    "Runtime.get_engine_validity",
    "Runtime.engine_header_size",
    "EngineInvalidityDiagnostics.MALFORMED_ENGINE",
    "EngineInvalidityDiagnostics.VERSION_MISMATCH",
    "EngineInvalidityDiagnostics.CUDA_ERROR",
    "EngineValidity.INVALID",
)

_DESCRIBE = """
import json, sys, importlib
trt = importlib.import_module(sys.argv[1])
calls, names = json.load(sys.stdin)
def at(path):
    value = trt
    for part in path.split("."):
        value = getattr(value, part, None)
    return value
print(json.dumps({
    "calls": {f"{c}.{m}": getattr(at(f"{c}.{m}"), "__doc__", None) for c, m, _ in calls},
    "missing": [name for name in names if at(name) is None],
    "flags": list(trt.BuilderFlag.__members__),
}))
"""
# What the bindings' library is linked to; none is ever called but the factories, which then give
# nothing, as they do without a driver.
_FUNCTIONS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
_LIBRARIES = ("libnvinfer.so.11", "libnvonnxparser.so.11", "libnvinfer_plugin.so.11")


@pytest.fixture(scope="module")
def loadable(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which TensorRT's bindings load."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or find_spec("tensorrt_bindings") is None:
        pytest.skip("needs a C compiler and tensorrt-cu13-bindings")
    folder = tmp_path_factory.mktemp("libraries")
    source = folder / "empty.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in _FUNCTIONS))
    for name in _LIBRARIES:
        subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / name, source], check=True)
    return {**os.environ, "LD_LIBRARY_PATH": str(folder)}


def _described(module: str, env: dict[str, str], names: tuple[str, ...]) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", _DESCRIBE, module],
        input=json.dumps([CALLS, names]),
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _check(found: Any) -> None:
    assert found["missing"] == []
    for owner, method, arguments in CALLS:
        text = found["calls"][f"{owner}.{method}"]
        assert text, f"there is no {owner}.{method}"
        for argument in arguments.split():
            assert f"{argument}: " in text, f"{owner}.{method} has no {argument}: {text}"


def test_tensorrt_rtx() -> None:
    pytest.importorskip("tensorrt_rtx")
    found = _described("tensorrt_rtx", dict(os.environ), NAMES + RTX_NAMES)
    _check(found)
    assert "FP16" not in found["flags"]


def test_tensorrt(loadable: dict[str, str]) -> None:
    found = _described("tensorrt_bindings", loadable, NAMES)
    _check(found)
    assert "FP16" not in found["flags"], "TensorRT 11 is strongly typed only"


_WITHOUT_A_DRIVER = """
import sys, tensorrt_bindings
sys.modules["tensorrt"] = tensorrt_bindings
from moon.errors import BackendError
from moon.runtime.trt.api import load
api = load("tensorrt")
print(api.targets, api.flag("SPARSE_WEIGHTS") is not None)
for make in (api.builder, api.runtime):
    try:
        make()
    except BackendError as error:
        print(error)
"""


def test_tensorrt_without_a_driver(loadable: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_A_DRIVER],
        capture_output=True,
        text=True,
        env={**loadable, "PYTHONPATH": str(Path(__file__).parents[3])},
    )
    assert done.returncode == 0, done.stderr
    first, *errors = done.stdout.splitlines()
    assert first == "() True"
    for line, what in zip(errors, ("builder", "runtime"), strict=True):
        assert line.startswith("TensorRT 11.") and f"makes no {what} here" in line
        assert "moon doctor" in line
