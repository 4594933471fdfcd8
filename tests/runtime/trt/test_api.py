"""The adapter over the real TensorRT-RTX; a machine without a GPU will do."""

import sys

import pytest

from moon.errors import BackendError, MissingExtraError
from moon.runtime.trt.api import Api, load, numbers
from moon.runtime.trt.package import PACKAGES, RTX_TARGETS, installed


@pytest.fixture(scope="module")
def api() -> Api:
    pytest.importorskip("tensorrt_rtx")
    return load("tensorrt_rtx")


def test_what_the_package_says_of_itself(api: Api) -> None:
    assert api.version == installed("tensorrt_rtx")
    assert set(api.targets) == RTX_TARGETS
    assert api.parser_version.isdigit()
    assert load("tensorrt_rtx") is api


def test_flags_that_a_version_does_not_have_are_none(api: Api) -> None:
    assert api.flag("SPARSE_WEIGHTS") is not None and api.flag("TF32") is not None
    assert api.flag("FP16") is None


def test_a_network_is_strongly_typed(api: Api) -> None:
    network = api.network(api.builder())
    assert network.get_flag(api.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def test_what_is_no_engine(api: Api) -> None:
    for data in (b"", b"x", b"x" * 4096):
        validity = api.check(data)
        assert not validity.ok and "no engine of TensorRT-RTX" in validity.why


def test_a_package_that_is_missing_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr("moon.runtime.trt.api._loaded", {})
    with pytest.raises(MissingExtraError, match=r"TensorRT needs the package tensorrt.*\[trt\]"):
        load("tensorrt")


class _Old:
    __version__ = "8.6.1"
    Builder = object


def test_a_package_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", _Old)  # type: ignore[arg-type]
    monkeypatch.setattr("moon.runtime.trt.api._loaded", {})
    with pytest.raises(BackendError, match=r"TensorRT 8\.6\.1 is too old, moon needs 10\.3"):
        load("tensorrt")


def test_versions_as_numbers() -> None:
    assert numbers("1.7.1.116") == (1, 7, 1, 116)
    assert numbers("10.3.0.post1") == (10, 3, 0) and numbers("") == ()
    assert all(package.oldest for package in PACKAGES.values())
