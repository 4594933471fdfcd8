"""Kernels are compiled once a session, into the cache of the session."""

from __future__ import annotations

import pytest

from moon.runtime.sparse import worth
from moon.runtime.sparse.cache import Cache
from moon.runtime.sparse.jit import Jit, fingerprint
from moon.runtime.sparse.kernels import SOURCES


@pytest.fixture(scope="session")
def jit(engine_cache: None) -> Jit:
    return Jit("native", Cache(), fingerprint=fingerprint(*SOURCES))


@pytest.fixture
def small_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is small is run by the engine unforced; what is tiny is not."""
    monkeypatch.setattr(worth, "LEAST_SAVED", 500_000)
