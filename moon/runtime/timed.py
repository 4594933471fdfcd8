"""What a backend with a device of its own may offer besides running: the parts of a latency."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray

__all__ = ["Parts", "Timed"]


class Parts(Protocol):
    """Milliseconds on the device's own clock, such as CUDA events."""

    @property
    def host_to_device_ms(self) -> float: ...

    @property
    def compute_ms(self) -> float: ...

    @property
    def device_to_host_ms(self) -> float: ...


@runtime_checkable
class Timed(Protocol):
    """A backend that can tell how long copying in, computing and copying out took."""

    def timed(
        self, batch: NDArray[Any], threshold: float | None = None
    ) -> tuple[dict[str, NDArray[Any]], Parts]:
        """As ``Backend.run``, and the parts of that run."""
