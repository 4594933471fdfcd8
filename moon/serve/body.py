"""From a request's headers and bytes to the images in it.

Three forms are read: a raw ``image/*`` body, ``multipart/form-data`` with files named
``image``, and JSON ``{"instances": [{"b64": "..."}]}``. Whatever else a client declares is
refused before a byte of the body is read. Nothing is ever unpickled, fetched from a URL or
written to disk.
"""

from __future__ import annotations

import binascii
import json
from base64 import b64decode
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import numpy as np
import numpy.typing as npt
from starlette.datastructures import Headers

from moon.errors import ImageError
from moon.serve.multipart import read_multipart, read_options
from moon.serve.problem import Problem

__all__ = ["Encoded", "Form", "form_of", "read_form", "refuse_pickle"]

JSON_SHAPE = 'a JSON object {"instances": [{"b64": "..."}]}'
ACCEPTED = f"image/*, multipart/form-data with files named image, or {JSON_SHAPE}"


@dataclass(frozen=True)
class Form:
    """Which of the three forms a body has.

    Attributes:
        kind: the form.
        boundary: what separates the parts of a multipart body, else b"".
    """

    kind: Literal["raw", "multipart", "json"]
    boundary: bytes = b""


@dataclass(frozen=True)
class Encoded:
    """One image as it came.

    Attributes:
        name: file name, index in the request, or None for a raw body.
        data: bytes of an image file, or uint8 [H, W, C] pixels; the reason when even those
            could not be had.
    """

    name: str | int | None
    data: bytes | npt.NDArray[np.uint8] | ImageError


def form_of(headers: Headers) -> Form:
    """Which form the headers declare.

    Raises:
        Problem: 415 for any other content type or a compressed body, 400 for a multipart
            body without a usable boundary.
    """
    declared = headers.getlist("content-type")
    if len(declared) != 1:
        raise _unsupported("exactly one Content-Type header is needed")
    # Before anything else: no later rule may let a spelling of it through.
    refuse_pickle(headers)
    kind, options = read_options(declared[0])
    if kind == "application/json":
        return Form("json")
    if kind.startswith("image/") and len(kind) > len("image/"):
        return Form("raw")
    if kind != "multipart/form-data":
        raise _unsupported(f"the content type {kind[:100]!r} is not read")
    boundary = options.get(b"boundary", b"")
    # RFC 2046 section 5.1.1.
    if not 1 <= len(boundary) <= 70:
        raise Problem(400, "malformed", "A multipart body needs a boundary of 1 to 70 characters.")
    return Form("multipart", boundary)


def refuse_pickle(headers: Headers) -> None:
    """Refuse what is never read, whatever the route.

    Raises:
        Problem: 415 for pickled data by any spelling, and for a compressed body.
    """
    if any("pickle" in declared.lower() for declared in headers.getlist("content-type")):
        raise _unsupported("pickled data are never read")
    encodings = headers.getlist("content-encoding")
    if any(encoding.strip().lower() != "identity" for encoding in encodings):
        raise _unsupported("compressed bodies are not read")


def read_form(form: Form, body: bytes, most: int) -> list[Encoded]:
    """The images in a body, at least one.

    Args:
        form: what `form_of` found.
        body: all of it.
        most: most images in one request.

    Raises:
        Problem: 400 when the body cannot be parsed, 422 when it has another shape.
    """
    if form.kind == "raw":
        return [Encoded(None, body)]
    parts = _parts(form, body) if form.kind == "multipart" else _instances(body)
    images: list[Encoded] = []
    for image in parts:
        if len(images) == most:
            raise Problem(422, "too-many-images", f"A request may hold at most {most} images.")
        images.append(image)
    if not images:
        _misshapen("no image in the body")
    return images


def _parts(form: Form, body: bytes) -> Iterator[Encoded]:
    for index, part in enumerate(read_multipart(body, form.boundary)):
        if "pickle" in part.content_type.lower():
            raise _unsupported("pickled data are never read")
        if part.field != "image":
            _misshapen(f"unexpected form field {part.field[:100]!r}")
        yield Encoded(part.filename or index, part.data)


def _instances(body: bytes) -> Iterator[Encoded]:
    try:
        content = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    # A number of too many digits is a ValueError, deep nesting a RecursionError.
    except (ValueError, RecursionError) as error:
        raise Problem(400, "malformed", f"The body is not valid JSON: {_brief(error)}.") from error
    if not isinstance(content, dict) or set(content) != {"instances"}:
        _misshapen("the body is not an object with the one member instances")
    instances = content["instances"]
    if not isinstance(instances, list):
        _misshapen("instances is not an array")
    for index, instance in enumerate(instances):
        yield Encoded(index, _instance(index, instance))


def _instance(index: int, instance: Any) -> bytes | ImageError:
    if not isinstance(instance, dict) or set(instance) != {"b64"}:
        _misshapen(f"instances[{index}] is not an object with the one member b64")
    text = instance["b64"]
    if not isinstance(text, str):
        _misshapen(f"instances[{index}].b64 is not a string")
    try:
        # Encoders such as base64(1) and MIME wrap lines.
        return b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        return ImageError(f"instances[{index}] is not valid base64: {error}")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _brief(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]


def _misshapen(cause: str) -> NoReturn:
    raise Problem(422, "wrong-shape", f"Expected {ACCEPTED}; {cause}. URLs are never fetched.")


def _unsupported(cause: str) -> Problem:
    # RFC 9110 section 15.5.16 lets a 415 say what would be read.
    headers = {"Accept": "image/*, multipart/form-data, application/json"}
    return Problem(415, "unsupported-type", f"Send {ACCEPTED}; {cause}.", headers=headers)
