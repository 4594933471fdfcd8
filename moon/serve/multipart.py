"""Multipart bodies: from bytes and a boundary to named parts, all in memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import PurePosixPath

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from moon.serve.problem import Problem

__all__ = ["Part", "read_multipart", "read_options"]

MOST_PARTS = 256
LONGEST_NAME = 255


@dataclass(frozen=True)
class Part:
    """One part of a multipart body.

    Attributes:
        field: name of the form field, "" when it has none.
        filename: last component of the file's name, without control characters; "" for none.
        content_type: as declared, or "".
        data: its bytes.
    """

    field: str
    filename: str
    content_type: str
    data: bytes


def read_multipart(body: bytes, boundary: bytes) -> list[Part]:
    """The parts of a body.

    Raises:
        Problem: 400 when the body does not follow the boundary or ends early, 422 when it
            has too many parts.
    """
    reader = _Reader()
    parser = MultipartParser(
        boundary,
        {
            "on_part_begin": reader.begin,
            "on_header_field": reader.header_name,
            "on_header_value": reader.header_value,
            "on_header_end": reader.header_end,
            "on_part_data": reader.data,
            "on_part_end": reader.end,
            "on_end": reader.finish,
        },
    )
    try:
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise _malformed("it does not follow its boundary") from error
    if not reader.finished:
        raise _malformed("it ends before its closing boundary")
    return reader.parts


def read_options(header: str) -> tuple[str, dict[bytes, bytes]]:
    """A header's value in lower case, and its parameters; odd ones give an odd value."""
    try:
        kind, options = parse_options_header(header)
    except ValueError:
        return "", {}
    return kind.decode("latin-1").strip(), options


@dataclass
class _Reader:
    parts: list[Part] = field(default_factory=list)
    finished: bool = False
    _headers: dict[str, str] = field(default_factory=dict)
    _name: bytearray = field(default_factory=bytearray)
    _value: bytearray = field(default_factory=bytearray)
    _data: bytearray = field(default_factory=bytearray)

    def begin(self) -> None:
        if len(self.parts) == MOST_PARTS:
            raise Problem(422, "wrong-shape", f"The body has more than {MOST_PARTS} parts.")
        self._headers, self._data = {}, bytearray()

    def header_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def header_end(self) -> None:
        self._headers[self._name.decode("latin-1").lower()] = self._value.decode("latin-1")
        self._name, self._value = bytearray(), bytearray()

    def data(self, data: bytes, start: int, end: int) -> None:
        self._data += data[start:end]

    def end(self) -> None:
        _, options = read_options(self._headers.get("content-disposition", ""))
        self.parts.append(
            Part(
                field=_text(options.get(b"name", b"")),
                filename=_plain_name(_text(options.get(b"filename", b""))),
                content_type=self._headers.get("content-type", ""),
                data=bytes(self._data),
            )
        )

    def finish(self) -> None:
        self.finished = True


def _text(raw: bytes) -> str:
    # Browsers send UTF-8 whatever the standards say.
    return raw.decode("utf-8", "replace")


def _plain_name(name: str) -> str:
    # Only echoed in the answer, never opened; still no path and nothing a terminal obeys.
    last = PurePosixPath(name.replace("\\", "/")).name
    shown = "".join(c for c in last if c.isprintable())[:LONGEST_NAME]
    return "" if shown in {".", ".."} else shown


def _malformed(cause: str) -> Problem:
    return Problem(400, "malformed", f"The multipart body is malformed: {cause}.")
