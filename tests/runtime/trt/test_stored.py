"""Engines in a bundle: stored, found, and what stands against those that do not serve."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moon.bundle import Bundle
from moon.errors import BundleError
from moon.gate_calibration import calibrate_conformal
from moon.rewrite import with_engine_file
from moon.runtime.trt.check import check_engines
from moon.runtime.trt.stored import Wanted, engine_bytes, facts, find, records, store
from tests.bundles import make_bundle
from tests.runtime.trt.records import ENGINE, make_record

RTX = Wanted(package="tensorrt_rtx", version="1.7.1.116", sm=86)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "b")


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_an_engine_comes_back_bit_for_bit(bundle: Bundle, compression: str | None) -> None:
    record = make_record(bundle, compression=compression)
    written = store(bundle, record, ENGINE)
    assert written.manifest.version == bundle.manifest.version
    found = find(Bundle.open(bundle.path), RTX)
    assert found.record == record and found.why == ""
    assert engine_bytes(written, record) == ENGINE
    stored = written.manifest.files[record.file].size
    assert (stored < len(ENGINE)) == (compression is not None)


def test_storing_again_replaces_the_other_form(bundle: Bundle) -> None:
    first = store(bundle, make_record(bundle), ENGINE)
    second = store(first, make_record(bundle, compression="zstd"), ENGINE)
    names = [name for name in second.manifest.files if name.startswith("engines/")]
    assert names == sorted(names) and len(names) == 2
    assert any(name.endswith(".engine.zst") for name in names)


def test_another_gate_keeps_the_engine_fit(bundle: Bundle) -> None:
    written = store(bundle, make_record(bundle), ENGINE)
    gate = written.gate()
    assert gate is not None
    scores = np.linspace(-1, 1, 200, dtype=np.float32)
    moved = written.with_gate(calibrate_conformal(scores, 0.1, score=gate.score))
    assert moved.gate() != gate
    assert find(moved, RTX).record is not None
    assert facts(moved)[0]["stale"] is False


def test_an_engine_of_another_model_is_stale(bundle: Bundle, tmp_path: Path) -> None:
    other = make_bundle(tmp_path / "c", seed=1)
    with pytest.raises(BundleError, match="holds another model than the one the engine"):
        store(other, make_record(bundle), ENGINE)
    stale = make_record(bundle)
    with_engine_file(with_engine_file(other, stale.file, ENGINE), _name(stale), stale.to_bytes())
    opened = Bundle.open(other.path)
    found = find(opened, RTX)
    assert found.record is None and "built from another model" in found.why
    assert facts(opened)[0]["stale"] is True
    [(name, ok, detail)] = check_engines(opened)
    assert (name, ok) == (stale.file, False) and detail.startswith("stale")


def _name(record: Any) -> str:
    from moon.runtime.trt.sidecar import record_name

    return record_name(record.file)


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        ({"version": "1.8.0"}, "needs version 1.7.1.116, and 1.8.0 is installed"),
        ({"sm": 89}, "is for sm_86 and sm_120, and the GPU is sm_89"),
    ],
)
def test_what_does_not_fit_is_named(bundle: Bundle, wanted: dict[str, Any], text: str) -> None:
    written = store(bundle, make_record(bundle), ENGINE)
    given = {"package": "tensorrt_rtx", "version": "1.7.1.200", "sm": 86, **wanted}
    found = find(written, Wanted(**given))
    assert found.record is None and text in found.why
    assert find(written, Wanted(package="tensorrt", version="11.0", sm=86)).why == ""
    assert find(written, RTX, precision="fp32").record is None


def test_an_engine_of_another_gpu_of_the_kind_is_warned_of(bundle: Bundle) -> None:
    record = make_record(
        bundle, package="tensorrt", package_version="11.0.0", gpu="A", targets=(86,)
    )
    written = store(bundle, record, ENGINE)
    found = find(written, Wanted(package="tensorrt", version="11.0.0", sm=86, gpu="B"))
    assert found.record == record and found.warning.endswith("was built on A, and here is B")


def test_the_record_and_the_engine_must_agree(bundle: Bundle) -> None:
    record = make_record(bundle)
    cut = with_engine_file(
        with_engine_file(bundle, record.file, ENGINE[:-7]), _name(record), record.to_bytes()
    )
    with pytest.raises(BundleError, match=r"10,233 bytes, 10,240 recorded.*--trt"):
        engine_bytes(cut, record)
    [(_, ok, detail)] = check_engines(cut)
    assert not ok and "10,240 recorded" in detail


def test_a_compressed_engine_gives_no_more_than_recorded(bundle: Bundle) -> None:
    import zstandard

    record = make_record(bundle, compression="zstd")
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 26))
    grown = with_engine_file(
        with_engine_file(bundle, record.file, bomb), _name(record), record.to_bytes()
    )
    with pytest.raises(BundleError, match="more bytes, not the 10,240 recorded"):
        engine_bytes(grown, record)
    junk = with_engine_file(grown, record.file, b"no zstd at all")
    with pytest.raises(BundleError, match="cannot be decompressed"):
        engine_bytes(junk, record)


def test_a_record_without_its_engine_is_an_error(bundle: Bundle) -> None:
    record = make_record(bundle)
    alone = with_engine_file(bundle, _name(record), record.to_bytes())
    error = records(alone)[_name(record)]
    assert isinstance(error, BundleError) and "not beside it" in error.cause
    assert "not beside it" in find(alone, RTX).why
    assert "not beside it" in facts(alone)[0]["error"]
    assert check_engines(alone)[0][1] is False


def test_a_truncated_engine_stops_the_bundle(bundle: Bundle) -> None:
    record = make_record(bundle)
    store(bundle, record, ENGINE)
    (bundle.path / record.file).write_bytes(ENGINE[:100])
    with pytest.raises(BundleError, match=r"\.engine is damaged: it has 100 bytes"):
        Bundle.open(bundle.path)
