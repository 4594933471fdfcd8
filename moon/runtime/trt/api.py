"""One adapter for both packages: loading, versions, what each can, and its objects.

Nothing here needs a GPU. The two packages, and TensorRT 10 and 11, differ in little: which flags
a network has, whether GPUs can be targeted that are not here, and what an engine's header says.
"""

from __future__ import annotations

import importlib
import re
import threading
from dataclasses import dataclass
from typing import Any

from moon.errors import BackendError, MissingExtraError
from moon.runtime.trt.log import Log, Message
from moon.runtime.trt.package import PACKAGES, Name, Package

__all__ = ["Api", "Validity", "load", "numbers"]

_loaded: dict[str, Api] = {}
_lock = threading.RLock()


@dataclass(frozen=True)
class Validity:
    """What a runtime says of an engine's header.

    Attributes:
        ok: nothing is known against it. Without a GPU that is all that can be said.
        why: what is against it, "" where nothing is.
        complete: the GPU was asked too.
    """

    ok: bool
    why: str
    complete: bool


class Api:
    """A package that is loaded. Make one with :func:`load`.

    Attributes:
        package: which.
        trt: its module.
        version: as it says it, such as ``1.7.1.116``.
        log: what it says.
    """

    def __init__(self, package: Package, module: Any) -> None:
        self.package = package
        self.trt = module
        self.version = str(module.__version__)
        self.log = Log()
        self._logger = _logger(module, self.log)

    @property
    def name(self) -> Name:
        """``tensorrt`` or ``tensorrt_rtx``."""
        return self.package.name

    @property
    def title(self) -> str:
        """Name and version, for people."""
        return f"{self.package.title} {self.version}"

    @property
    def parser_version(self) -> str:
        """Version of its ONNX parser, by the one number it gives: 200 for 2.0.0."""
        number = getattr(self.trt, "get_nv_onnx_parser_version", None)
        return "" if number is None else str(number())

    @property
    def targets(self) -> tuple[int, ...]:
        """Compute capabilities that it builds for without such a GPU; none for ``tensorrt``."""
        members = getattr(getattr(self.trt, "ComputeCapability", None), "__members__", {})
        found = (re.fullmatch(r"SM(\d+)", name) for name in members)
        return tuple(sorted(int(one[1]) for one in found if one))

    def builder(self) -> Any:
        """A new ``Builder``.

        Raises:
            BackendError: it cannot be had, as ``tensorrt`` without a GPU; says why.
        """
        return self._made("builder", self.trt.Builder)

    def runtime(self) -> Any:
        """A new ``Runtime``.

        Raises:
            BackendError: it cannot be had; says why.
        """
        return self._made("runtime", self.trt.Runtime)

    def network(self, builder: Any) -> Any:
        """An empty network whose types are those of the ONNX file.

        TensorRT 11 knows no other, and may drop the flag that asks for it.
        """
        flag = getattr(self.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        return builder.create_network(0 if flag is None else 1 << int(flag))

    def parser(self, network: Any) -> Any:
        """A new ``OnnxParser`` that fills ``network``."""
        return self.trt.OnnxParser(network, self._logger)

    def flag(self, name: str) -> Any | None:
        """A ``BuilderFlag``, None where this version has none of that name."""
        return getattr(self.trt.BuilderFlag, name, None)

    def check(self, engine: bytes, runtime: Any | None = None) -> Validity:
        """What can be said of an engine without loading it.

        ``tensorrt`` has no such question; then nothing is known against it.

        Args:
            engine: the file, or at least its header.
            runtime: one to ask; default a new one.
        """
        runtime = self.runtime() if runtime is None else runtime
        if not hasattr(runtime, "get_engine_validity"):
            return Validity(ok=True, why="", complete=False)
        with self.log.collect() as messages:
            validity, bits = runtime.get_engine_validity(engine[: runtime.engine_header_size])
        return self._validity(validity, int(bits), messages)

    def _validity(self, validity: Any, bits: int, messages: list[Message]) -> Validity:
        kinds = self.trt.EngineInvalidityDiagnostics.__members__
        against = {name for name, value in kinds.items() if bits & int(value)}
        said = next((one.text for one in messages if "engine" in one.text.lower()), "")
        said = re.sub(r"[\x00-\x1f]", lambda found: str(ord(found[0])), said)
        if "MALFORMED_ENGINE" in against:
            return Validity(ok=False, why=f"it is no engine of {self.title}", complete=False)
        version = re.search(r"created with \S+ version (\d+(?:\.\d+)*)", said)
        if "VERSION_MISMATCH" in against or version:
            of = f"version {version[1]}" if version else "another version"
            why = f"it was built by {of}, and {self.title} is installed"
            return Validity(ok=False, why=why, complete=False)
        valid = validity != self.trt.EngineValidity.INVALID
        if valid or not against - {"CUDA_ERROR"}:
            return Validity(ok=True, why="", complete=valid)
        words = ", ".join(sorted(against)).lower().replace("_", " ")
        return Validity(ok=False, why=said or words, complete=True)

    def _made(self, what: str, kind: Any) -> Any:
        with self.log.collect() as messages:
            try:
                made = kind(self._logger)
            except Exception as error:  # pybind raises what it likes for a null pointer
                raise self._refused(what, messages, str(error)) from error
        if made is None:
            raise self._refused(what, messages, "no reason given")
        return made

    def _refused(self, what: str, messages: list[Message], otherwise: str) -> BackendError:
        why = next(iter(Log.errors(messages)), otherwise)
        return BackendError(
            f"{self.title} makes no {what} here: {why}",
            remedy="moon doctor shows the GPU and its driver",
        )


def load(name: Name) -> Api:
    """Import a package, once.

    Raises:
        MissingExtraError: it is not installed.
        BackendError: it is older than moon needs, or its libraries do not load; says which.
    """
    with _lock:
        if name not in _loaded:
            _loaded[name] = _load(PACKAGES[name])
        return _loaded[name]


def numbers(version: str) -> tuple[int, ...]:
    """``10.3.0.26`` as (10, 3, 0, 26), up to the first part that is no number."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def _load(package: Package) -> Api:
    try:
        module = importlib.import_module(package.name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == package.name:
            raise MissingExtraError(package.name, package.extra, package.title) from error
        raise _broken(package, error) from error
    except (ImportError, OSError) as error:
        raise _broken(package, error) from error
    if not hasattr(module, "Builder"):  # a folder of type stubs, or what an uninstall left
        raise MissingExtraError(package.name, package.extra, package.title)
    if numbers(str(module.__version__)) < package.oldest:
        least = ".".join(map(str, package.oldest))
        raise BackendError(
            f"{package.title} {module.__version__} is too old, moon needs {least}",
            remedy=f"Upgrade it: {package.install}",
        )
    return Api(package, module)


def _broken(package: Package, error: Exception) -> BackendError:
    return BackendError(
        f"{package.title} is installed, and its libraries do not load: {error}",
        remedy=f"Install it whole: {package.install}",
    )


def _logger(module: Any, log: Log) -> Any:
    class Logger(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            log.say(severity, msg)

    return Logger()
