from __future__ import annotations

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from moon.errors import ImageError
from moon.serve.body import Encoded, Form, form_of, read_form
from moon.serve.problem import Problem

RAW, JSON = Form("raw"), Form("json")
MOST = 4


def headers(*types: str, **others: str) -> Headers:
    pairs = [(b"content-type", kind.encode("latin-1")) for kind in types]
    pairs += [(name.replace("_", "-").encode(), value.encode()) for name, value in others.items()]
    return Headers(raw=pairs)


def refusal(*types: str, **others: str) -> int:
    with pytest.raises(Problem) as caught:
        form_of(headers(*types, **others))
    return caught.value.status


def instances(*texts: str) -> bytes:
    return json.dumps({"instances": [{"b64": text} for text in texts]}).encode()


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        ("image/jpeg", RAW),
        ("IMAGE/PNG; q=1", RAW),
        ("image/x-anything", RAW),
        ("application/json", JSON),
        ("Application/JSON; charset=utf-8", JSON),
        ("multipart/form-data; boundary=abc", Form("multipart", b"abc")),
        ('multipart/form-data; boundary="a b"', Form("multipart", b"a b")),
    ],
)
def test_the_three_forms(declared: str, expected: Form) -> None:
    assert form_of(headers(declared)) == expected


@pytest.mark.parametrize(
    "declared",
    [
        "",
        "image/",
        "image",
        "text/plain",
        "application/octet-stream",
        "application/x-www-form-urlencoded",
        "multipart/mixed; boundary=abc",
        "application/vnd.bentoml+pickle",
        "APPLICATION/VND.BENTOML+PICKLE",
        " application/vnd.bentoml+Pickle ; charset=utf-8",
        "application/x-python-pickle",
        "image/x-pickle",
        "application/json; profile=pickle",
        "multipart/form-data; boundary=pickle",
        "image/png, application/vnd.bentoml+pickle",
    ],
)
def test_other_types_are_refused(declared: str) -> None:
    assert refusal(declared) == 415


def test_one_type_is_needed() -> None:
    assert refusal() == 415
    assert refusal("image/png", "application/vnd.bentoml+pickle") == 415
    assert refusal("image/png", "image/png") == 415


def test_compressed_bodies_are_refused() -> None:
    assert refusal("image/png", content_encoding="gzip") == 415
    assert form_of(headers("image/png", content_encoding="identity")) == RAW


@pytest.mark.parametrize("boundary", ["", "; boundary=", f"; boundary={'x' * 71}", "; boundary"])
def test_boundary_is_needed(boundary: str) -> None:
    assert refusal(f"multipart/form-data{boundary}") == 400


def test_raw_body_is_one_image() -> None:
    assert read_form(RAW, b"bytes", MOST) == [Encoded(None, b"bytes")]


def test_instances() -> None:
    text = base64.b64encode(b"one two three").decode()
    wrapped = f"{text[:8]}\r\n{text[8:]}\n"
    assert read_form(JSON, instances(text, wrapped), MOST) == [
        Encoded(0, b"one two three"),
        Encoded(1, b"one two three"),
    ]


@pytest.mark.parametrize("text", ["*", "YQ", "YQ==YQ==", "é", "data:image/png;base64,YQ=="])
def test_bad_base64_fails_alone(text: str) -> None:
    good, bad = read_form(JSON, instances("YQ==", text), MOST)
    assert good.data == b"a"
    assert isinstance(bad.data, ImageError)
    assert "instances[1] is not valid base64" in str(bad.data)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"NaN",
        b'{"instances": [NaN]}',
        b'{"instances": [{"b64": Infinity}]}',
        b"\xff\xfe",
        "{}".encode("utf-16"),
        b"[" * 100_000,
        b'{"instances": ' + b"1" * 5000 + b"}",
    ],
    ids=range(9),
)
def test_broken_json_is_400(body: bytes) -> None:
    with pytest.raises(Problem) as caught:
        read_form(JSON, body, MOST)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "body",
    [
        b"1",
        b"[]",
        b"{}",
        b'{"instances": {}}',
        b'{"instances": []}',
        b'{"instances": ["YQ=="]}',
        b'{"instances": [{}]}',
        b'{"instances": [{"b64": 1}]}',
        b'{"instances": [{"b64": null}]}',
        b'{"instances": [{"url": "http://169.254.169.254/"}]}',
        b'{"instances": [{"b64": "YQ==", "url": "http://example.org"}]}',
        b'{"instances": [{"b64": "YQ=="}], "parameters": {}}',
    ],
)
def test_other_json_is_422(body: bytes) -> None:
    with pytest.raises(Problem) as caught:
        read_form(JSON, body, MOST)
    assert caught.value.status == 422
    assert "URLs are never fetched" in caught.value.detail


def test_number_of_images_is_limited() -> None:
    assert len(read_form(JSON, instances(*["YQ=="] * MOST), MOST)) == MOST
    with pytest.raises(Problem, match="at most 4 images") as caught:
        read_form(JSON, instances(*["YQ=="] * (MOST + 1)), MOST)
    assert caught.value.status == 422


@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    for form in (JSON, Form("multipart", b"b")):
        try:
            assert read_form(form, body, MOST)
        except Problem as problem:
            assert problem.status in {400, 415, 422}


json_values = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["instances", "b64", "url"]), inner, max_size=3)
    ),
)


@given(json_values)
def test_any_json_is_read_or_refused(content: object) -> None:
    try:
        assert read_form(JSON, json.dumps(content).encode(), MOST)
    except Problem as problem:
        assert problem.status in {400, 422}


@given(st.text(alphabet=st.characters(max_codepoint=255), max_size=60))
def test_any_content_type_is_read_or_refused(declared: str) -> None:
    for prefix in ("", "multipart/form-data;", "image/"):
        try:
            form_of(headers(prefix + declared))
        except Problem as problem:
            assert problem.status in {400, 415}
