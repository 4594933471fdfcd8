from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moon.serve.body import Encoded, Form, read_form
from moon.serve.multipart import MOST_PARTS, read_multipart
from moon.serve.problem import Problem

FORM = Form("multipart", b"b")


def part(data: bytes, name: str = "image", more: str = "") -> bytes:
    disposition = f'Content-Disposition: form-data; name="{name}"{more}'
    return b"--b\r\n" + disposition.encode() + b"\r\n\r\n" + data + b"\r\n"


def refusal(body: bytes) -> Problem:
    with pytest.raises(Problem) as caught:
        read_form(FORM, body, 8)
    return caught.value


def test_parts_in_order() -> None:
    body = part(b"one", more='; filename="a.png"') + part(b"\r\n--c\r\n") + b"--b--\r\n"
    assert read_form(FORM, body, 8) == [Encoded("a.png", b"one"), Encoded(1, b"\r\n--c\r\n")]


@pytest.mark.parametrize(
    ("filename", "shown"),
    [
        ("../../etc/passwd", "passwd"),
        ("/etc/shadow", "shadow"),
        ("..\\..\\boot.ini", "boot.ini"),
        ("C:\\images\\cat.png", "cat.png"),
        ("a\x1b[2Jb\x00.png", "a[2Jb.png"),
        ("näher.png", "näher.png"),
        ("x" * 1000, "x" * 255),
        ("..", 0),
        ("/", 0),
        ("", 0),
    ],
)
def test_names_are_made_harmless(filename: str, shown: str | int) -> None:
    body = part(b"data", more=f'; filename="{filename}"') + b"--b--\r\n"
    (image,) = read_form(FORM, body, 8)
    assert image.name == shown


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"anything",
        b"--x\r\n\r\n\r\n--x--",
        part(b"data"),
        part(b"data")[:-4],
        b"--b\r\nContent-Disposition\r\n\r\ndata\r\n--b--\r\n",
        b"--b\r\n" + b"X: y\r\n" * 5000 + b"\r\n\r\n--b--\r\n",
        b"--b\r\nX: " + b"y" * 100_000 + b"\r\n\r\n\r\n--b--\r\n",
    ],
    ids=["empty", "none", "other", "open", "cut", "header", "many headers", "long header"],
)
def test_malformed_is_400(body: bytes) -> None:
    assert refusal(body).status == 400


def test_no_parts_is_422() -> None:
    assert refusal(b"--b--\r\n").status in {400, 422}


def test_other_fields_are_422() -> None:
    problem = refusal(part(b"data", name="img") + b"--b--\r\n")
    assert problem.status == 422
    assert "unexpected form field 'img'" in problem.detail
    assert refusal(b"--b\r\n\r\ndata\r\n--b--\r\n").status == 422


def test_pickled_parts_are_415() -> None:
    declared = "\r\nContent-Type: application/vnd.bentoml+PICKLE"
    assert refusal(part(b"data", more=declared) + b"--b--\r\n").status == 415


def test_number_of_parts_is_limited() -> None:
    body = part(b"") * (MOST_PARTS + 1) + b"--b--\r\n"
    assert refusal(body).status == 422


@given(st.lists(st.binary(max_size=60).filter(lambda data: b"--b" not in data), max_size=4))
def test_data_come_back(datas: list[bytes]) -> None:
    body = b"".join(part(data) for data in datas) + b"--b--\r\n"
    if datas:
        assert [found.data for found in read_multipart(body, b"b")] == datas


@given(st.data())
def test_damaged_bodies_are_refused(data: st.DataObject) -> None:
    whole = part(b"\xff\xd8\xff data", more='; filename="a.jpg"') + part(b"two") + b"--b--\r\n"
    at = data.draw(st.integers(0, len(whole) - 1))
    damaged = whole[:at] + data.draw(st.binary(max_size=8)) + whole[at + 1 :]
    try:
        assert read_form(FORM, damaged, 8)
    except Problem as problem:
        assert problem.status in {400, 415, 422}
