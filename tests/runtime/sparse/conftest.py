"""Kernels are compiled once a session, into a cache of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from moon.runtime.sparse.cache import Cache
from moon.runtime.sparse.jit import Jit, fingerprint
from moon.runtime.sparse.kernels import SOURCES


@pytest.fixture(scope="session", autouse=True)
def engine_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOON_CACHE_DIR", str(tmp_path_factory.mktemp("engine-cache")))
        patch.delenv("MOON_ENGINE_GUARD", raising=False)
        patch.delenv("MOON_ENGINE_ISA", raising=False)
        yield


@pytest.fixture(scope="session")
def jit(engine_cache: None) -> Jit:
    return Jit("native", Cache(), fingerprint=fingerprint(*SOURCES))
