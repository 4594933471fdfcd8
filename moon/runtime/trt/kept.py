"""What TensorRT-RTX compiles for a GPU at the first inference, kept between processes.

It is code for that GPU, so it never goes into a bundle but into the user's own cache, as the
sparse engine's kernels do and by the same rules: a folder in which nobody else can write, entries
of one user, each with its key and checksum, written aside and renamed. So TensorRT-RTX is given
nothing that is damaged, and checks itself that what it is given is of this GPU, driver and version.
What cannot be kept, or does not fit, is compiled again.
"""

from __future__ import annotations

import threading
from typing import Any

from moon.files import canonical_json, sha256_bytes
from moon.runtime.sparse.cache import Cache, default_folder

__all__ = ["KeptCode", "kept_key", "open_store"]

_FORM = "tensorrt_rtx runtime cache, 1"
_LARGEST = 256 << 20
_LIMIT = 1 << 30


def open_store() -> Cache:
    """The folder ``tensorrt`` in that of the sparse engine's kernels: $MOON_CACHE_DIR moves both.

    Nothing is kept where there is no folder to be trusted; ``reason`` says why.
    """
    folder = default_folder()
    return Cache(None if folder is None else folder / "tensorrt", _LIMIT, _LARGEST)


def kept_key(
    *, engine: str, version: str, gpu: str, compute_capability: tuple[int, int], driver: str
) -> bytes:
    """32 bytes that stand for an engine on a GPU.

    Args:
        engine: its SHA-256.
        version: of TensorRT-RTX.
        gpu: its name.
        compute_capability: of the GPU.
        driver: its version.
    """
    parts = [_FORM, engine, version, gpu, list(compute_capability), driver]
    return bytes.fromhex(sha256_bytes(canonical_json(parts)))


class KeptCode:
    """One ``IRuntimeCache`` and its copy on disk. Safe for several threads.

    Args:
        cache: of TensorRT-RTX, empty.
        store: where the copy is.
        key: from :func:`kept_key`.

    Attributes:
        found: a copy was there, and was taken.
    """

    def __init__(self, cache: Any, store: Cache, key: bytes) -> None:
        self.cache, self._store, self._key = cache, store, key
        self._lock = threading.Lock()
        self._saved = b""
        blob = store.get(key)
        self.found = blob is not None and self._took(blob)

    def save(self) -> None:
        """Keep what was compiled meanwhile, if anything was; never raises."""
        with self._lock:
            try:
                blob = bytes(self.cache.serialize())
            except Exception:  # pybind raises what it likes, and without a copy all works
                return
            digest = bytes.fromhex(sha256_bytes(blob))
            if blob and digest != self._saved:
                self._store.put(self._key, blob)
                self._saved = digest

    def _took(self, blob: bytes) -> bool:
        try:
            took = bool(self.cache.deserialize(blob))
        except Exception:  # as above: what is not taken is compiled again
            return False
        if took:
            self._saved = bytes.fromhex(sha256_bytes(blob))
        return took
