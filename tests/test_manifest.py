from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moon.errors import BundleError
from moon.manifest import FileEntry, Manifest, content_version, self_hash
from tests.bundles import manifest_fields

FILES = {
    "model.onnx": FileEntry(sha256="a" * 64, size=10),
    "golden.npz": FileEntry(sha256="b" * 64, size=20),
}


def fields(**changes: Any) -> dict[str, Any]:
    plain = manifest_fields(("cat", "dog"), 8, 1, True, "float32")
    plain["sparsity"] = {
        "global": 0.5,
        "layers": {"w": {"shape": [2, 2], "nonzeros": 2, "density": 0.5, "flops": 8}},
        "pattern": "unstructured",
    }
    return {**plain, **changes}


def resealed(plain: dict[str, Any]) -> dict[str, Any]:
    """The hashes put right again, as somebody who means harm would."""
    plain["version"] = content_version(plain)
    plain["sha256"] = self_hash(plain)
    return plain


NAMES = st.text(min_size=1, max_size=12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
LAYERS = st.builds(
    lambda shape, share, flops: {
        "shape": shape,
        "nonzeros": int(share * shape[0] * shape[1]),
        "density": share,
        **({} if flops is None else {"flops": flops}),
    },
    st.lists(st.integers(1, 9), min_size=2, max_size=2),
    st.floats(0, 1),
    st.none() | st.integers(0, 10**12),
)


@given(
    name=st.text(max_size=20),
    classes=st.lists(NAMES, min_size=1, max_size=6, unique=True),
    unknown=st.booleans(),
    size=st.tuples(st.integers(1, 512), st.integers(1, 512)),
    dtype=st.sampled_from(["float32", "uint8"]),
    mean=st.floats(-1, 2),
    layers=st.dictionaries(NAMES, LAYERS, max_size=4),
    provenance=st.dictionaries(st.text(max_size=5), JSON, max_size=4),
)
def test_a_manifest_survives_json(
    name: str,
    classes: list[str],
    unknown: bool,
    size: tuple[int, int],
    dtype: str,
    mean: float,
    layers: dict[str, Any],
    provenance: dict[str, Any],
) -> None:
    plain = manifest_fields(classes, 8, 1, unknown, dtype)
    plain["name"], plain["provenance"] = name, provenance
    plain["input"]["size"] = plain["preprocess"]["crop"] = list(size)
    plain["preprocess"]["mean"] = [mean]
    plain["sparsity"] = {"global": 0.25, "layers": layers, "pattern": "unstructured"}
    made = Manifest.seal(plain, FILES)
    text = json.dumps(made.to_json(), indent=2, allow_nan=False)
    assert Manifest.from_json(json.loads(text)) == made
    assert made.logits == len(classes) + unknown


def test_the_version_ignores_the_gate_and_engines_and_nothing_else() -> None:
    made = Manifest.seal(fields(), FILES)
    gate = {"gate.json": FileEntry(sha256="c" * 64, size=1)}
    engine = {"engines/x.plan": FileEntry(sha256="d" * 64, size=1)}
    assert made.version.startswith("sha256:")
    more = Manifest.seal(fields(), {**FILES, **gate, **engine})
    assert more.version == made.version and more.sha256 != made.sha256
    other = {**FILES, "model.onnx": FileEntry(sha256="e" * 64, size=10)}
    assert Manifest.seal(fields(), other).version != made.version
    assert Manifest.seal(fields(name="other"), FILES).version != made.version
    assert Manifest.seal(fields(classes=["dog", "cat"]), FILES).version != made.version


@pytest.mark.parametrize("path", ["name", "classes", "unknown_index", "files", "scores"])
def test_any_edit_is_noticed(path: str) -> None:
    plain = Manifest.seal(fields(), FILES).to_json()
    plain[path] = {"name": "x", "classes": ["dog", "cat"], "unknown_index": 0, "files": {},
                   "scores": ["ebo"]}[path]  # fmt: skip
    with pytest.raises(BundleError, match=r"contents do not match its sha256"):
        Manifest.from_json(plain)


@pytest.mark.parametrize("schema", [0, 2, "1", None, True])
def test_an_unknown_schema_is_refused_before_anything_else(schema: object) -> None:
    plain = Manifest.seal(fields(), FILES).to_json()
    plain["schema_version"] = schema
    with pytest.raises(BundleError, match=r"schema_version .* this moon reads 1"):
        Manifest.from_json(resealed(plain))


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (["name"], 3, "name in the manifest must be text, not 3"),
        (["classes"], [], "one or more different names"),
        (["classes"], ["a", "a"], "one or more different names"),
        (["classes"], "ab", "must be a list"),
        (["classes"], [1, 2], "a list of texts"),
        (["unknown_index"], 3, "unknown_index 3 is outside the 3 logits"),
        (["unknown_index"], -1, "outside the 3 logits"),
        (["unknown_index"], 1.0, "must be a whole number, not 1.0"),
        (["unknown_index"], True, "must be a whole number"),
        (["input"], None, "input must be a JSON object"),
        (["input", "dtype"], "float64", "float32 NCHW or uint8 NHWC, not float64"),
        (["input", "layout"], "NHWC", "float32 NCHW or uint8 NHWC"),
        (["input", "size"], [8], "height and width"),
        (["input", "size"], [8, 9], "differs from preprocess.crop"),
        (["input", "extra"], 1, "input has an unknown field extra"),
        (["preprocess", "mean"], [0.5, 0.5], "preprocess: "),
        (["preprocess", "std"], [0], "preprocess: std must be above 0"),
        (["scores"], [], "scores must be some of"),
        (["scores"], ["ebo", "ebo"], "each once"),
        (["scores"], ["magic"], "scores must be some of msp, ebo, mls, unknown"),
        (["outputs"], ["label"], "outputs lacks accept, logits, score"),
        (["sparsity", "global"], 1.5, "between 0 and 1"),
        (["sparsity", "layers", "w", "nonzeros"], 5, "5 nonzeros in"),
        (["sparsity", "layers", "w", "density"], "x", "must be a number"),
        (["sparsity", "pattern"], None, "must be text"),
        (["provenance"], [], "must be an object"),
        (["files", "model.onnx", "sha256"], "abc", "must hold a SHA-256"),
        (["files", "model.onnx", "bytes"], -1, "must hold a SHA-256 and a size"),
        (["extra"], 1, "unknown field extra"),
    ],
)
def test_a_wrong_field_is_named_even_when_the_hashes_fit(
    where: list[str], value: object, message: str
) -> None:
    plain = copy.deepcopy(Manifest.seal(fields(), FILES).to_json())
    inner = plain
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    with pytest.raises(BundleError, match=message):
        Manifest.from_json(resealed(plain))


@pytest.mark.parametrize("field", ["name", "classes", "input", "files", "sha256", "sparsity"])
def test_a_missing_field_is_refused(field: str) -> None:
    plain = Manifest.seal(fields(), FILES).to_json()
    del plain[field]
    with pytest.raises(BundleError, match=r"manifest\.json"):
        Manifest.from_json(plain)


@pytest.mark.parametrize(
    "path",
    ["../x", "a/../../x", "/etc/passwd", "a//b", "./a", "a/", "", ".", "..", "a\\..\\b", "C:x",
     "a\0b", "manifest.json"],
)  # fmt: skip
def test_paths_that_leave_the_bundle_are_refused(path: str) -> None:
    with pytest.raises(BundleError, match="not a plain path inside the bundle"):
        Manifest.seal(fields(), {**FILES, path: FileEntry(sha256="c" * 64, size=1)})


@pytest.mark.parametrize("plain", [None, [], 3, "x", {}, {"schema_version": 1}])
def test_json_that_is_no_manifest_is_refused(plain: object) -> None:
    with pytest.raises(BundleError, match=r"manifest\.json"):
        Manifest.from_json(plain)


def test_nesting_without_end_is_refused() -> None:
    plain = Manifest.seal(fields(), FILES).to_json()
    for _ in range(100_000):
        plain["provenance"] = {"a": plain["provenance"]}
    with pytest.raises(BundleError, match=r"manifest\.json"):
        Manifest.from_json(plain)


def test_numbers_json_cannot_hold_are_refused() -> None:
    plain = Manifest.seal(fields(), FILES).to_json()
    plain["sparsity"]["global"] = float("nan")
    with pytest.raises(BundleError, match="cannot be hashed"):
        Manifest.from_json(plain)
