"""Ledger: one drift test for all workers, in a file that they take turns with.

A test for each worker would see only its share of the images, and take as many times longer
to be sure as there are workers. The file is small and written in one call, so that a killed
worker leaves it whole; kept elsewhere than among the temporary files, it outlives the service.
A worker takes its turn a few times a second, with all that it has decided since: a turn for each
request would be a sixth of what a small one costs.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import logging
import os
import struct
import zlib
from collections.abc import Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from moon.drift import NOTHING, TILTS_G, DriftTest, Watched
from moon.errors import MoonError
from moon.gate import Decision

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Ledger"]

logger = logging.getLogger("moon.serve")

_MAGIC = b"moondr1\0"
_COUNTS = struct.Struct("<qq")
_SUM = struct.Struct("<I")
# What a killed worker may take with it.
GATHER_SECONDS = 0.1
_SIZE = len(_MAGIC) + 32 + _COUNTS.size + 2 * 8 * len(TILTS_G) + _SUM.size


class Ledger:
    """What a drift test knows, shared.

    Args:
        test: of the gate that decides.
        model: what it is a test of, such as the bundle's version.
        path: the file; None for a single process's memory.

    Raises:
        MoonError: the file cannot be opened.
    """

    def __init__(self, test: DriftTest, model: str, path: str | None = None) -> None:
        self.test = test
        self._memory = NOTHING
        self._identity = _identity(test, model)
        self._file: int | None = None
        self._gathered: list[Decision] = []
        self._turn: asyncio.TimerHandle | None = None
        if path is not None:
            try:
                self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise MoonError(
                    f"could not open the drift test's state {path}: {error.strerror or error}",
                    remedy="Name a file in a folder that exists and can be written to",
                ) from error
            self._begin(self._file)

    def add(self, decisions: Sequence[Decision]) -> None:
        """Count decisions, in order, within `GATHER_SECONDS`; without an event loop at once.

        Those by a threshold of another gate do not count.
        """
        self._gathered += [one for one in decisions if one.threshold in self.test.bounds]
        if self._turn is not None or not self._gathered:
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.write()
        else:
            self._turn = loop.call_later(GATHER_SECONDS, self.write)

    def write(self) -> None:
        """Count now what was added."""
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None
        ours, self._gathered = self._gathered, []
        if not ours:
            return
        rejected = [not one.accepted for one in ours]
        thresholds = [one.threshold for one in ours]
        if self._file is None:
            self._memory = self.test.watch(rejected, thresholds, self._memory)
            return
        with self._locked(self._file, fcntl.LOCK_EX):
            before = self._load(self._file)
            if before is None:  # another version took over, and this one is on its way out
                return
            after = self.test.watch(rejected, thresholds, before)
            os.pwrite(self._file, self._pack(after), 0)

    def read(self) -> Watched:
        """What all workers have seen; of others, not the last that they will write."""
        self.write()
        if self._file is None:
            return self._memory
        with self._locked(self._file, fcntl.LOCK_SH):
            return self._load(self._file) or NOTHING

    def close(self) -> None:
        """Write what was added, and let go of the file."""
        self.write()
        if self._file is not None:
            os.close(self._file)
            self._file = None

    @contextmanager
    def _locked(self, file: int, how: int) -> Iterator[None]:
        fcntl.flock(file, how)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)

    def _begin(self, file: int) -> None:
        with self._locked(file, fcntl.LOCK_EX):
            if self._load(file) is None:
                if os.fstat(file).st_size:
                    # Another gate's evidence says nothing of this one's traffic.
                    logger.warning("the drift test begins anew: its state is of another model")
                os.ftruncate(file, 0)
                os.pwrite(file, self._pack(NOTHING), 0)

    def _load(self, file: int) -> Watched | None:
        data = os.pread(file, _SIZE + 1, 0)
        body, found = data[: -_SUM.size], data[-_SUM.size :]
        known = len(data) == _SIZE and body.startswith(_MAGIC + self._identity)
        if not known or found != _SUM.pack(zlib.crc32(body)):
            return None
        rest = body[len(_MAGIC) + len(self._identity) :]
        images, rejected = _COUNTS.unpack_from(rest)
        both = np.frombuffer(rest, dtype="<f8", offset=_COUNTS.size).astype(np.float64)
        return Watched(images, rejected, both[: len(TILTS_G)], both[len(TILTS_G) :])

    def _pack(self, watched: Watched) -> bytes:
        both = np.concatenate([watched.started_G, watched.recent_G]).astype("<f8").tobytes()
        counts = _COUNTS.pack(watched.images, watched.rejected)
        body = _MAGIC + self._identity + counts + both
        return body + _SUM.pack(zlib.crc32(body))


def _identity(test: DriftTest, model: str) -> bytes:
    what = json.dumps([model, list(test.bounds.items()), TILTS_G.tolist()])
    return hashlib.sha256(what.encode()).digest()
