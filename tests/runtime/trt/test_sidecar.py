"""Records of engines: there and back, and hostile files."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moon.errors import BundleError
from moon.runtime.trt.sidecar import EngineRecord, is_record, record_name
from tests.runtime.trt.records import make_record


def test_there_and_back() -> None:
    record = make_record()
    assert EngineRecord.from_bytes(record.to_bytes()) == record
    opened = make_record(layers=("a", "b"), checked="opened", gpu="RTX", compression="zstd")
    assert EngineRecord.from_bytes(opened.to_bytes()) == opened


@given(
    st.lists(st.integers(10, 200), min_size=1, max_size=4, unique=True),
    st.sampled_from(["tensorrt", "tensorrt_rtx"]),
    st.sampled_from(["fp16", "fp32"]),
)
def test_names_of_engine_and_record_belong_together(
    targets: list[int], package: str, precision: str
) -> None:
    record = make_record(targets=tuple(targets), package=package, precision=precision)
    name = record_name(record.file)
    assert is_record(name) and record_name(f"{record.file}.zst") == name
    assert EngineRecord.from_bytes(record.to_bytes()) == record


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("schema_version", 2, "another schema than 1"),
        ("file", "../x.engine", "file cannot be"),
        ("file", "engines/tensorrt-a/../../x.engine", "file cannot be"),
        ("file", "engines/sparse-x.engine", "file cannot be"),
        ("sha256", "zz", "sha256 cannot be"),
        ("package", "openvino", "package must be one of tensorrt_rtx, tensorrt, not 'openvino'"),
        ("compression", "gzip", "compression must be one of null, zstd"),
        ("precision", "int4", "precision must be one of"),
        ("checked", "run", "checked must be one of"),
        ("targets", [], "targets must be GPUs"),
        ("targets", ["86"], "targets must be GPUs"),
        ("profile", {"min": 4, "opt": 2, "max": 8}, "must rise"),
        ("profile", {"min": 0, "opt": 2, "max": 8}, "must rise"),
        ("bytes", "many", "bytes"),
        ("build_s", float("1e999"), "JSON|build_s"),
        ("layers", [1], "layers must be a list of names or null"),
        ("inputs", {"input": {"dtype": "float32"}}, "shape"),
        ("parity", {"images": "x"}, "images"),
        ("surprise", 1, "unknown field surprise"),
    ],
)
def test_hostile_records_are_refused(key: str, value: Any, text: str) -> None:
    plain = make_record().to_json()
    plain[key] = value
    with pytest.raises(BundleError, match=text):
        EngineRecord.from_bytes(json.dumps(plain).encode())


@pytest.mark.parametrize("key", sorted(make_record().to_json()))
def test_a_missing_field_is_named(key: str) -> None:
    plain = make_record().to_json()
    del plain[key]
    with pytest.raises(BundleError, match=key):
        EngineRecord.from_bytes(json.dumps(plain).encode())


@pytest.mark.parametrize("data", [b"", b"\xff\xfe", b"[]", b"[" * 100_000, b" " * (1 << 25)])
def test_what_is_no_record(data: bytes) -> None:
    with pytest.raises(BundleError):
        EngineRecord.from_bytes(data)


def test_other_files_of_engines_are_no_records() -> None:
    names = ("engines/sparse-x.json", "engines/tensorrt.json", "engines/tensorrt-a/b.json")
    assert not any(map(is_record, names))
