"""From a Source to arrays: decoded in a pool of threads, in memory or as a stream of batches.

Shape suffixes: N items, H height, W width, C channels.
"""

from __future__ import annotations

import hashlib
import os
import struct
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from moon.data.items import Item, Source
from moon.data.labels import match_labels
from moon.data.preprocess import Preprocess
from moon.data.split import split_validation
from moon.errors import DataError, ImageError, MoonError, UsageError
from moon.progress import Progress, silent

__all__ = [
    "data_sha256",
    "load_pixels",
    "match_labels",
    "split_validation",
    "stored_bytes",
    "stream",
]

Indices = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]

# Long enough that handing a task over costs little, short enough to share a batch out.
_TASK = 64
_BATCHES_AHEAD = 2
_MOST_WORKERS = 16
# Below this time an image, handing the interpreter's lock around costs more than a second
# core gains: break-even is near 0.1 ms (28-pixel PNGs take 0.02 ms, 500-pixel JPEGs 3 ms).
_WORTH_A_THREAD_S = 0.0002
_PROBES = 4


def load_pixels(
    source: Source,
    preprocess: Preprocess,
    indices: npt.ArrayLike | None = None,
    *,
    workers: int | None = None,
    progress: Progress = silent,
) -> Pixels:
    """Decode and preprocess items into one array.

    Args:
        indices: which items, in what order; default all.
        workers: decoding threads; by default one a core where images are large enough to
            gain from it, else one. The result does not depend on it.

    Returns:
        uint8 [N, H, W, C].

    Raises:
        ImageError: an item cannot be read, naming it.
    """
    chosen = _chosen(source, indices)
    try:
        pixels_NHWC = np.empty((len(chosen), *preprocess.shape), np.uint8)
    except MemoryError as error:
        raise DataError(
            f"{len(chosen):,} images of {source.spec} do not fit in memory",
            remedy="Use fewer of them: [0:N] after the source",
        ) from error
    done = 0
    batches = stream(source, preprocess, 1024, indices=chosen, workers=workers, progress=progress)
    for positions, batch in batches:
        pixels_NHWC[done : done + len(positions)] = batch
        done += len(positions)
    return pixels_NHWC


def stream(
    source: Source,
    preprocess: Preprocess,
    batch_size: int,
    *,
    indices: npt.ArrayLike | None = None,
    workers: int | None = None,
    progress: Progress = silent,
) -> Iterator[tuple[Indices, Pixels]]:
    """Decode and preprocess items batch by batch, at most two batches ahead of the caller.

    Yields:
        Indices int64 [B] into the source and their pixels uint8 [B, H, W, C]; the last
        batch may be smaller.

    Raises:
        ImageError: an item cannot be read, naming it.
        UsageError: ``batch_size`` or ``workers`` is below 1.
    """
    if batch_size < 1:
        raise UsageError(f"the batch size must be at least 1, got {batch_size}")
    if workers is not None and workers < 1:
        raise UsageError(f"the number of decoding threads must be at least 1, got {workers}")
    chosen = _chosen(source, indices)
    return _batches(source, preprocess, batch_size, chosen, workers, progress)


def data_sha256(source: Source, indices: npt.ArrayLike | None = None) -> str:
    """Hexadecimal SHA-256 over the items and labels, in order, read one at a time.

    It covers encoded bytes, or pixels where there are no others, and not names or places.

    Raises:
        ImageError: an item cannot be read.
    """
    digest = hashlib.sha256()
    for i in _chosen(source, indices):
        data = stored_bytes(source.item(int(i)))
        label = -1 if source.labels is None else int(source.labels[i])
        digest.update(struct.pack("<Qq", len(data), label))
        digest.update(data)
    return digest.hexdigest()


def _chosen(source: Source, indices: npt.ArrayLike | None) -> Indices:
    if indices is None:
        return np.arange(len(source))
    chosen = np.asarray(indices, np.int64).reshape(-1)
    if len(chosen) and not (chosen.min() >= 0 and chosen.max() < len(source)):
        raise DataError(
            f"{source.spec} has {len(source)} items, so no item "
            f"{chosen.max() if chosen.min() >= 0 else chosen.min()}",
            remedy="Has the data changed since the indices were made?",
        )
    return chosen


def _cores() -> int:
    # A container may own fewer cores than the machine has.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _batches(
    source: Source,
    preprocess: Preprocess,
    batch_size: int,
    chosen: Indices,
    workers: int | None,
    progress: Progress,
) -> Iterator[tuple[Indices, Pixels]]:
    starts = range(0, len(chosen), batch_size)
    parts = (chosen[start : start + batch_size] for start in starts)
    threads = workers or _threads(source, preprocess, chosen)
    done = 0
    with _Decoder(source, preprocess, threads) as decoder:
        for batch in _ahead(map(decoder.start, parts)):
            pixels_NHWC = batch.finished()
            done += len(batch.positions)
            progress(done, len(chosen), "decoding")
            yield batch.positions, pixels_NHWC


def _ahead(batches: Iterator[_Batch]) -> Iterator[_Batch]:
    """The same batches, each handed on once the next two have been started."""
    waiting: deque[_Batch] = deque()
    for batch in batches:
        waiting.append(batch)
        if len(waiting) > _BATCHES_AHEAD:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()


def _threads(source: Source, preprocess: Preprocess, chosen: Indices) -> int:
    """Enough threads for this source: with tiny images they only wait for each other."""
    times = []
    for i in chosen[:_PROBES].tolist():
        start = time.perf_counter()
        _pixels_of(source, preprocess, i)
        times.append(time.perf_counter() - start)
    if len(chosen) <= _PROBES or min(times) < _WORTH_A_THREAD_S:
        return 1
    return min(_MOST_WORKERS, _cores())


class _Batch:
    def __init__(self, positions: Indices, pixels: Pixels, tasks: list[Future[None]]) -> None:
        self.positions = positions
        self._pixels = pixels
        self._tasks = tasks

    def finished(self) -> Pixels:
        for task in self._tasks:
            task.result()
        return self._pixels


class _Decoder:
    """Fills batches in threads of its own: Pillow decodes outside the interpreter's lock."""

    def __init__(self, source: Source, preprocess: Preprocess, threads: int) -> None:
        self._source = source
        self._preprocess = preprocess
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="moon-decode")

    def __enter__(self) -> _Decoder:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def start(self, positions: Indices) -> _Batch:
        pixels = np.empty((len(positions), *self._preprocess.shape), np.uint8)
        parts = [slice(start, start + _TASK) for start in range(0, len(positions), _TASK)]
        tasks = [self._pool.submit(self._fill, pixels[part], positions[part]) for part in parts]
        return _Batch(positions, pixels, tasks)

    def _fill(self, out: Pixels, positions: Indices) -> None:
        for row, i in enumerate(positions.tolist()):
            out[row] = _pixels_of(self._source, self._preprocess, i)


def _pixels_of(source: Source, preprocess: Preprocess, i: int) -> Pixels:
    try:
        return preprocess.pixels(source.item(i))
    except ImageError as error:
        name = source.name(i)
        if name in error.cause:
            raise
        raise ImageError(f"{name}: {error.cause}", remedy=error.remedy) from error
    except MoonError:
        raise
    except OSError as error:
        raise ImageError(f"could not read {source.name(i)}: {error}") from error


def stored_bytes(item: Item) -> bytes:
    """What stands for an item in a hash: its file's bytes, or its type, size and pixels.

    Raises:
        ImageError: its file cannot be read.
    """
    if isinstance(item, bytes):
        return item
    if isinstance(item, Path):
        try:
            return item.read_bytes()
        except OSError as error:
            raise ImageError(f"could not read {item}: {error.strerror or error}") from error
    if isinstance(item, Image.Image):
        return f"{item.mode} {item.size} ".encode() + item.tobytes()
    return f"{item.dtype} {item.shape} ".encode() + item.tobytes()
