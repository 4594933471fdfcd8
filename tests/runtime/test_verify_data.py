"""``moon verify --data``: backends against one another, where there is no PyTorch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from moon.bundle import Bundle
from moon.errors import DataError, UsageError
from moon.rewrite import with_gate
from moon.runtime.sampled import that_run
from moon.runtime.verify import verify
from tests.bundles import images, make_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "tiny")


@pytest.fixture
def source(tmp_path: Path) -> str:
    np.savez(tmp_path / "set.npz", val_images=images(300, seed=11))
    return f"{tmp_path / 'set.npz'}#val"


def test_every_backend_but_the_reference_is_compared(bundle: Bundle, source: str) -> None:
    checks = verify(bundle, source)
    golden = ["files", "gate", *that_run()]
    assert [c.name for c in checks][: len(golden)] == golden
    over = checks[len(golden) :]
    assert [c.name for c in over] == [f"{n} on {source}" for n in that_run() if n != "onnxruntime"]
    assert all(check.ok for check in checks)
    sparse = next(check for check in over if check.name.startswith("sparse"))
    assert "300 images: logits within" in sparse.detail and "decisions 100.00%" in sparse.detail
    assert sparse.figures is not None and sparse.figures["images"] == 300
    fewer = verify(bundle, source, backends=["sparse"], limit=40)
    assert len(fewer) == 4 and "40 images" in fewer[-1].detail


def test_a_backend_that_decides_otherwise_is_found(bundle: Bundle, source: str) -> None:
    """A gate of its own that is far from the default one decides otherwise, by its own scores."""
    gate = bundle.gate()
    assert gate is not None
    stored = np.asarray(gate.scores)
    k = int(np.searchsorted(stored, np.median(stored))) + 1
    own = dataclasses.replace(
        gate, backend="sparse", threshold=float(np.float32(stored[k - 1])), k=k
    )
    bundle = with_gate(bundle, own, "sparse")
    last = verify(bundle, source, backends=["sparse"])[-1]
    assert not last.ok and "decides otherwise for" in last.detail
    assert "more than the 0 allowed" in last.detail
    assert f"moon calibrate {bundle.path} --data SOURCE --backend sparse" in last.remedy
    assert last.figures is not None and last.figures["own_gate"] and last.figures["flips"] > 50
    assert verify(bundle, source, backends=["sparse"], flips=300)[-1].ok


def test_a_backend_that_computes_something_else_is_found(bundle: Bundle, source: str) -> None:
    last = verify(bundle, source, backends=["fake"])[-1]
    assert not last.ok and "gives logits that differ by" in last.detail
    missing = verify(bundle, source, backends=["onnxruntime:xnnpack"])
    assert [check.ok for check in missing] == [True, True, False, False]


def test_wrong_arguments_are_named(bundle: Bundle, source: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the limit must be 1 or more"):
        verify(bundle, source, limit=0)
    with pytest.raises(UsageError, match="the flips allowed must be 0 or more"):
        verify(bundle, source, flips=-1)
    with pytest.raises(DataError):
        verify(bundle, str(tmp_path / "gone"))
    assert all(check.ok for check in verify(make_bundle(tmp_path / "u", calibrated=False), source))


def test_a_uint8_bundle_is_compared(tmp_path: Path, source: str) -> None:
    checks = verify(make_bundle(tmp_path / "u8", dtype="uint8"), source)
    assert all(check.ok for check in checks) and "300 images" in checks[-1].detail
