"""Sessions of ONNX Runtime on another provider than its CPU's, and none on the CPU unasked.

ONNX Runtime goes on with the CPU in three ways and says so in none that a program would see:
where a provider cannot be made, where it leaves nodes alone, and where a run of it fails. The
first two are found here and are errors, unless a user writes ``fallback=cpu``; the third is
turned off.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from moon.backend_name import BackendName
from moon.errors import BackendError, MoonError
from moon.runtime.ending import UNDER_WAY
from moon.runtime.onnxruntime import DTYPES, open_session, session_options
from moon.runtime.placement import CPU, RECORD, Placement, from_profile, from_record
from moon.runtime.provider_probe import essence, reason
from moon.runtime.providers import Provider, offered, provider_of

__all__ = ["create", "open_on_provider"]

_ERROR, _FATAL, _WARNING = 3, 4, 2
_NAMED = 3
_STRICT = "session.disable_cpu_ep_fallback"


def open_on_provider(
    model: bytes, name: BackendName, *, threads: int, spin: bool, warn: Callable[[str], None]
) -> tuple[Any, Placement]:
    """A session on the provider that ``name`` asks for, and what runs where.

    Args:
        model: an ONNX file.
        name: with its provider's options and entries of the session's configuration.
        threads: of the CPU, for one inference.
        spin: let idle threads spin.
        warn: told, in a line, of nodes on the CPU, and of a fallback that was asked for.

    Raises:
        BackendError: the provider cannot run here or leaves layers to the CPU, and ``name``
            does not allow for that; or it refuses the model or an option.
    """
    provider = provider_of(name)
    if provider is None:
        session = open_session(model, threads=threads, spin=spin, entries=name.entries)
        return session, Placement(CPU)
    try:
        session, profiled = create(model, name, provider, threads=threads, spin=spin)
        placement = _placement(session, provider, profiled)
        _check_options(session, name, provider)
        _check_layers(placement, provider, name)
    except BackendError as error:
        if not name.falls_back:
            raise
        warn(f"{name.key} cannot run here, so ONNX Runtime's CPU provider does: {error.cause}")
        session = open_session(model, threads=threads, spin=spin, entries=name.entries)
        return session, Placement(CPU, fell_back=error.cause)
    _say(placement, provider, warn)
    return session, placement


def create(
    model: bytes,
    name: BackendName,
    provider: Provider,
    *,
    threads: int,
    spin: bool,
    severity: int = _FATAL,
    explain: bool = True,
) -> tuple[Any, bool]:
    """A session that has the provider, and whether it is being profiled.

    Args:
        severity: from which on ONNX Runtime's own lines go to stderr.
        explain: find out why it could not be made, in a process of its own.

    Raises:
        BackendError: it could not be made.
    """
    ort = _module()
    if not offered(ort, provider):
        raise BackendError(
            f"this ONNX Runtime {ort.__version__} has no {provider.ep}",
            remedy=f"{provider.install}. Or add ,fallback=cpu to go on with the CPU",
        )
    options = session_options(threads=threads, spin=spin, entries=name.entries)
    options.log_severity_level = _ERROR if severity < _FATAL else _FATAL
    remembers = hasattr(ort.InferenceSession, "get_provider_graph_assignment_info")
    if remembers:
        options.add_session_config_entry(RECORD, "1")
    else:
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(tempfile.gettempdir(), "moon-placement"))
    wanted: list[Any] = [(provider.ep, dict(name.options))]
    wanted += [ep for ep in provider.behind if ep in ort.get_available_providers()]
    if name.entries.get(_STRICT, "0") == "0":  # else it refuses to be given the CPU's by name
        wanted.append(CPU)
    try:
        with UNDER_WAY, _quiet(ort, severity):
            _load_libraries(ort, provider)
            # By default a session that fails prints to stdout, and is made again on the CPU.
            session = ort.InferenceSession(model, options, providers=wanted, enable_fallback=0)
    except MoonError:
        raise
    except Exception as error:  # its exceptions share no base class but Exception
        # TensorRT's says that libraries are missing, and not which.
        unsaid = explain and "TensorRT libraries" in str(error)
        why, more = reason(model, name) if unsaid else (essence(str(error)), "")
        raise _refused(provider, why, more) from error
    if provider.ep not in session.get_providers():
        raise _refused(provider, *(reason(model, name) if explain else ("", "")))
    return session, not remembers


def _refused(provider: Provider, why: str, more: str) -> BackendError:
    return BackendError(
        f"{provider.ep} cannot be used: {why}",
        remedy=f"{more or provider.needs}. Or add ,fallback=cpu to go on with the CPU",
    )


def _module() -> Any:
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise BackendError(
            f"ONNX Runtime cannot be loaded: {error}", remedy="pip install onnxruntime"
        ) from error
    return ort


@contextlib.contextmanager
def _quiet(ort: Any, severity: int) -> Iterator[None]:
    """Without what ONNX Runtime and its helpers print: it becomes one line of ours, or nothing."""
    ort.set_default_logger_severity(severity)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            # Of a provider that a plugin brings it warns that it does not know it.
            warnings.filterwarnings("ignore", message=".*not in available provider names")
            yield
    finally:
        ort.set_default_logger_severity(_WARNING)


def _load_libraries(ort: Any, provider: Provider) -> None:
    """Make known what the provider needs: CUDA as pip installs it, or a plugin."""
    if provider.memory == "cuda" and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()
    if not provider.plugin or provider.ep in ort.get_available_providers():
        return
    if not hasattr(ort, "register_execution_provider_library"):
        raise BackendError(
            f"ONNX Runtime {ort.__version__} takes no plugins", remedy="Install a later one"
        )
    plugin = import_module(provider.plugin)
    if all(device.ep_name != provider.ep for device in ort.get_ep_devices()):
        try:
            ort.register_execution_provider_library(provider.ep, plugin.get_library_path())
        except Exception as error:
            if "already registered" not in str(error):
                raise
    if all(device.ep_name != provider.ep for device in ort.get_ep_devices()):
        raise _refused(provider, "it finds no device of its own on this machine", "")


def _placement(session: Any, provider: Provider, profiled: bool) -> Placement:
    """What runs where; a session that is being profiled runs once for it."""
    if not profiled:
        return Placement.of(provider.ep, from_record(session))
    feeds = {}
    for node in session.get_inputs():
        shape = [size if isinstance(size, int) else 1 for size in node.shape]
        feeds[node.name] = np.zeros(shape, DTYPES.get(node.type, "float32"))
    try:
        with UNDER_WAY:
            session.run(None, feeds)
    except Exception as error:
        raise BackendError(f"{provider.ep} cannot run the model: {essence(str(error))}") from error
    finally:
        file = Path(session.end_profiling())
    try:
        return Placement.of(provider.ep, from_profile(file))
    finally:
        file.unlink(missing_ok=True)


def _check_options(session: Any, name: BackendName, provider: Provider) -> None:
    """Some providers list their options; one that is not among them had no effect."""
    taken = session.get_provider_options().get(provider.ep, {})
    unknown = [key for key in name.options if taken and key not in taken]
    if unknown:
        raise BackendError(
            f"{provider.ep} has no option {unknown[0]}",
            remedy=f"It has {', '.join(sorted(taken))}",
        )


def _check_layers(placement: Placement, provider: Provider, name: BackendName) -> None:
    if not placement.counts.get(provider.ep) and not any(
        placement.counts.get(ep) for ep in provider.behind
    ):
        raise BackendError(
            f"{provider.ep} takes no part of this model",
            remedy="Use --backend onnxruntime, which runs all of it",
        )
    if placement.layers and not name.falls_back:
        left = placement.layers
        named = ", ".join(str(node) for node in left[:_NAMED])
        more = f" and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
        raise BackendError(
            f"{provider.ep} leaves {len(left)} of {sum(placement.counts.values())} nodes of the "
            f"model to the CPU: {named}{more}",
            remedy="Add ,fallback=cpu to run them there, or use another backend",
        )


def _say(placement: Placement, provider: Provider, warn: Callable[[str], None]) -> None:
    if placement.layers:
        warn(
            f"ONNX Runtime's CPU provider runs {len(placement.layers)} nodes of the model that "
            f"{provider.ep} does not: {placement.layers[0]} first"
        )
    if placement.others:
        ops = ", ".join(sorted({node.op for node in placement.others}))
        warn(
            f"ONNX Runtime's CPU provider runs {len(placement.others)} of the nodes that score "
            f"and decide: {ops}"
        )
