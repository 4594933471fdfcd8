"""Why a provider of ONNX Runtime cannot be used: ONNX Runtime says it on stderr only.

So it is asked again in a process of its own, whose stderr is read. That also leaves this
process whole where a driver's library crashes.
"""

from __future__ import annotations

import re
import subprocess
import sys

from moon.backend_name import BackendName
from moon.errors import BackendError
from moon.wire import bytes_field, varint_field

__all__ = ["attempt", "essence", "probe", "reason"]

# Loading CUDA's libraries takes seconds; a driver that hangs would take for ever.
_SECONDS = 120
_TRY = (
    "import sys; from moon.runtime.provider_probe import attempt; "
    "sys.exit(attempt(sys.stdin.buffer.read(), sys.argv[1]))"
)
_OURS = re.compile(r"^\w+ExecutionProvider cannot be used: ")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_LOGGED = re.compile(r"\[[EWF]:onnxruntime[^\]]*\]\s*(.*)")
_REQUIRES = re.compile(r"Require (cuDNN [\w.*]+ and CUDA [\w.*]+)")
_STATUS = re.compile(r"\[ONNXRuntimeError\] : \d+ : \w+ : ")
_DRIVER = re.compile(
    r"libcuda\.so|nvcuda\.dll|no CUDA-capable device|driver version is insufficient"
)


def reason(model: bytes, name: BackendName) -> tuple[str, str]:
    """Why the provider is not had, and what that calls for: "" where only the table knows.

    Args:
        model: what was to be run.
        name: with the provider.
    """
    return _read(_tried(model, name))


def _read(done: subprocess.CompletedProcess[bytes] | str) -> tuple[str, str]:
    if isinstance(done, str):
        return done, ""
    text = _COLOUR.sub("", done.stderr.decode(errors="replace"))
    if done.returncode < 0:
        return f"its library crashes (signal {-done.returncode})", ""
    found = [essence(line) for line in _LOGGED.findall(text)]
    why = found[0] if found else (essence(text.strip().splitlines()[-1]) if text.strip() else "")
    if _DRIVER.search(why):
        return why, "Install NVIDIA's driver, on a machine with such a GPU"
    needed = _REQUIRES.search(text)
    if needed is not None:
        return why, (f"It needs {needed[1]}: pip install 'onnxruntime-gpu[cuda,cudnn]' brings both")
    return why or "ONNX Runtime does not say why", ""


def probe(name: BackendName) -> BackendError | None:
    """Try a provider on a graph of one node; the error where it cannot be used.

    Raises:
        BackendError: no such provider.
    """
    from moon.runtime.providers import provider_of

    provider = provider_of(name)
    if provider is None:
        return None
    done = _tried(_one_node(), name)
    if not isinstance(done, str) and done.returncode == 0:
        return None
    why, more = _read(done)
    return BackendError(f"{provider.device}: {why}", remedy=more or provider.needs)


def attempt(model: bytes, name: str) -> str | None:
    """Open a model on a provider, ONNX Runtime's log on stderr; what is wrong, or None."""
    from moon.runtime.provider_session import create
    from moon.runtime.providers import provider_of

    asked = BackendName.parse(name)
    provider = provider_of(asked)
    if provider is None:
        return None
    try:
        create(model, asked, provider, threads=1, spin=False, severity=2, explain=False)
    except BackendError as error:
        return error.cause
    return None


def essence(text: str) -> str:
    """What a line of ONNX Runtime's log or exceptions says, without places in its source."""
    said = _OURS.sub("", _STATUS.split(text)[-1])
    said = said.rsplit(" with error: ", 1)[-1]
    said = re.sub(r"^(/\S+:\d+ |\S+\.cc:\d+ )", "", said.strip())
    # "FILE:LINE SIGNATURE message", the signature ending where its bracket does.
    said = re.sub(r"^[\w:<>*& ,]+\(.*?\)(?: const)? (?=\S)", "", said)
    said = said.rsplit("[OpenVINO] ", 1)[-1]
    said = " ".join(said.split())
    return said[:300]


def _tried(model: bytes, name: BackendName) -> subprocess.CompletedProcess[bytes] | str:
    command = [sys.executable, "-c", _TRY, str(name)]
    try:
        return subprocess.run(
            command, input=model, capture_output=True, check=False, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"its libraries did not load within {_SECONDS} seconds"
    except OSError as error:
        return f"it could not be tried: {error}"


def _one_node() -> bytes:
    """An ONNX file of one Relu on float32 [1, 1]."""

    def text(number: int, value: str) -> bytes:
        return bytes_field(number, value.encode())

    one = bytes_field(1, varint_field(1, 1))
    kind = bytes_field(1, varint_field(1, 1) + bytes_field(2, one + one))

    def value(name: str) -> bytes:
        return text(1, name) + bytes_field(2, kind)

    node = text(1, "x") + text(2, "y") + text(4, "Relu")
    graph = bytes_field(1, node) + text(2, "g")
    graph += bytes_field(11, value("x")) + bytes_field(12, value("y"))
    opset = bytes_field(8, varint_field(2, 17))
    return varint_field(1, 8) + bytes_field(7, graph) + opset
