"""An engine on a GPU: loaded from its bytes, with execution contexts to run it."""

from __future__ import annotations

import threading
from typing import Any

from moon.errors import BackendError
from moon.runtime.sparse.cache import Cache
from moon.runtime.trt.api import Api
from moon.runtime.trt.device import Device
from moon.runtime.trt.execution import Execution
from moon.runtime.trt.kept import KeptCode
from moon.runtime.trt.log import Log
from moon.runtime.trt.tensor import Ports

__all__ = ["Engine"]

_AGAIN = "Build the engine again, with the TensorRT that is installed and for this GPU"
_DRIVER = "Install a newer NVIDIA driver, one for the CUDA that this TensorRT was made for"


class Engine:
    """An ``ICudaEngine``. Safe for several threads.

    Args:
        api: the package.
        device: the GPU.
        data: the engine, its checksum checked: a damaged one can bring the process down.
        title: what to call it in messages.
        graphs: capture CUDA graphs.
        store: where TensorRT-RTX's code is kept, with its key; None keeps none.

    Attributes:
        ports: what goes in and comes out.
        kept: the code that TensorRT-RTX compiles; None with another package.
        graphs_by_itself: the package captures graphs, and nobody else need.

    Raises:
        BackendError: the package refuses it; says why.
    """

    def __init__(
        self,
        api: Api,
        device: Device,
        data: bytes,
        title: str,
        *,
        graphs: bool = True,
        store: tuple[Cache, bytes] | None = None,
    ) -> None:
        self._api, self._device, self._title, self._graphs = api, device, title, graphs
        self._lock = threading.Lock()
        with device:
            self._runtime = api.runtime()
            validity = api.check(data, self._runtime)
            if not validity.ok:
                raise BackendError(f"{title} does not run here: {validity.why}", remedy=_AGAIN)
            self._engine = self._made(
                "cannot be loaded", lambda: self._runtime.deserialize_cuda_engine(data)
            )
            self.ports = Ports.of(self._engine, api)
            self._config = self._configured()
            self.kept = self._keeping(store)

    @property
    def graphs_by_itself(self) -> bool:
        return self._config is not None and hasattr(self._config, "cuda_graph_strategy")

    def execution(self) -> Execution:
        """A new execution context.

        Raises:
            BackendError: it cannot be made, such as for want of memory; says why.
        """
        # One configuration serves all: they share the code that was compiled.
        arguments = () if self._config is None else (self._config,)
        with self._lock, self._device:
            context = self._made(
                "gives no execution context",
                lambda: self._engine.create_execution_context(*arguments),
            )
        return Execution(context, self._api.log)

    def save(self) -> None:
        """Keep on disk what was compiled meanwhile, where that is kept."""
        if self.kept is not None:
            with self._device:
                self.kept.save()

    def close(self) -> None:
        """Let go of it; every execution context must have been closed."""
        if self._engine is None:
            return
        self.save()
        with self._device:
            self.kept = None
            # The order in which they came of each other, the other way round.
            self._config = None
            self._engine = None
            self._runtime = None

    def _configured(self) -> Any:
        """TensorRT-RTX's ``IRuntimeConfig``; None where the package has nothing to set in it."""
        strategies = getattr(self._api.trt, "CudaGraphStrategy", None)
        if strategies is None:
            return None
        config = self._made("takes no settings", lambda: self._engine.create_runtime_config())
        config.cuda_graph_strategy = (
            strategies.WHOLE_GRAPH_CAPTURE if self._graphs else strategies.DISABLED
        )
        return config

    def _keeping(self, store: tuple[Cache, bytes] | None) -> KeptCode | None:
        if store is None or not hasattr(self._config, "create_runtime_cache"):
            return None
        cache = self._config.create_runtime_cache()
        if cache is None:
            return None
        kept = KeptCode(cache, *store)
        self._config.set_runtime_cache(cache)
        return kept

    def _made(self, what: str, make: Any) -> Any:
        with self._api.log.collect() as messages:
            try:
                made = make()
            except Exception as error:  # pybind raises RuntimeError and TypeError alike
                raise self._refused(what, Log.errors(messages) or [str(error)]) from error
        if made is None:
            raise self._refused(what, Log.errors(messages))
        return made

    def _refused(self, what: str, reasons: list[str]) -> BackendError:
        why = reasons[0] if reasons else "no reason given"
        remedy = _DRIVER if "driver" in why else _AGAIN
        return BackendError(f"{self._title} {what}: {why}", remedy=remedy)
