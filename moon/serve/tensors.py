"""Tensors of the Open Inference Protocol: as JSON, and as bytes after it.

With the binary extension a body is JSON followed by the data of those tensors that say
``binary_data_size``, in their order; a header tells where the JSON ends. BYTES elements are
preceded by their length, four bytes, little-endian. In JSON, BYTES are base64.

Source: the KServe V2 protocol, and Triton's extension "binary tensor data".
"""

from __future__ import annotations

import json
import math
import struct
from base64 import b64decode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moon.errors import ImageError
from moon.serve.problem import Problem

__all__ = ["Output", "Tensor", "bad_tensor", "read_request", "written"]

_MOST_DIMENSIONS = 4
_DTYPES: dict[str, npt.DTypeLike] = {"UINT8": "<u1", "BOOL": "?", "FP32": "<f4", "FP64": "<f8"}


@dataclass(frozen=True)
class Tensor:
    """An input as it came: ``data`` is the JSON's, or bytes."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: list[Any] | bytes

    def texts(self) -> list[bytes | ImageError]:
        """The elements of a BYTES tensor.

        Raises:
            Problem: 400, not as many as its shape says.
        """
        count = math.prod(self.shape)
        if isinstance(self.data, bytes):
            return _split(self.name, self.data, count)
        flat = _flat(self.data)
        if len(flat) != count or not all(isinstance(one, str) for one in flat):
            raise bad_tensor(f"{self.name} must hold {count} strings")
        return [_decoded(i, one) for i, one in enumerate(flat)]

    def bytes_of_shape(self) -> npt.NDArray[np.uint8]:
        """The elements of a UINT8 tensor, in its shape.

        Raises:
            Problem: 400, not as many as its shape says, or not from 0 to 255.
        """
        if isinstance(self.data, bytes):
            found = np.frombuffer(self.data, np.uint8)
        else:
            found = _small_integers(self.name, _flat(self.data))
        if found.size != math.prod(self.shape):
            shape = list(self.shape)
            raise bad_tensor(f"{self.name} holds {found.size} numbers, but its shape is {shape}")
        return found.reshape(self.shape)


@dataclass(frozen=True)
class Output:
    """An output: a list of texts for BYTES, else an array.

    Attributes:
        name: its name.
        datatype: BYTES, BOOL, FP32 or FP64.
        shape: its shape.
        values: flat.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: Sequence[Any]

    def as_bytes(self) -> bytes:
        """The values as the binary extension wants them; None is NaN, or an empty text."""
        if self.datatype == "BYTES":
            texts = [(one or "").encode() for one in self.values]
            return b"".join(struct.pack("<I", len(text)) + text for text in texts)
        return np.array(self.values, _DTYPES[self.datatype]).tobytes()

    def as_json(self) -> list[Any]:
        """The values as JSON has them: a number that there is not is null."""
        if self.datatype == "BYTES":
            return [one or "" for one in self.values]
        return list(self.values)


def read_request(body: bytes, header_length: str | None) -> tuple[dict[str, Any], list[Tensor]]:
    """The JSON of an inference request, and its inputs.

    Args:
        body: all of it.
        header_length: what the header Inference-Header-Content-Length says.

    Raises:
        Problem: 400.
    """
    end = len(body)
    if header_length is not None:
        if not header_length.isascii() or not header_length.isdecimal() or len(header_length) > 12:
            raise bad_tensor("Inference-Header-Content-Length is not a number")
        end = int(header_length)
        if end > len(body):
            raise bad_tensor("Inference-Header-Content-Length is more than the body")
    content = _object(body[:end])
    inputs = content.get("inputs")
    if not isinstance(inputs, list) or not inputs:
        raise bad_tensor("inputs must be an array with an input")
    tensors, at = [], end
    for plain in inputs:
        tensor, at = _tensor(plain, body, at)
        tensors.append(tensor)
    if at != len(body):
        raise bad_tensor(f"{len(body) - at} bytes follow the last input")
    return content, tensors


def written(
    content: dict[str, Any], outputs: Sequence[Output], binary: Mapping[str, bool]
) -> tuple[bytes, int | None]:
    """A response's body, and the length of the JSON in it; None when it is JSON alone.

    Args:
        content: of the JSON, without the outputs.
        outputs: in order.
        binary: which of them, by name, follow the JSON as bytes.
    """
    described, data = [], []
    for output in outputs:
        plain: dict[str, Any] = {
            "name": output.name,
            "datatype": output.datatype,
            "shape": list(output.shape),
        }
        if binary[output.name]:
            data.append(output.as_bytes())
            plain["parameters"] = {"binary_data_size": len(data[-1])}
        else:
            plain["data"] = output.as_json()
        described.append(plain)
    text = json.dumps({**content, "outputs": described}, allow_nan=False, ensure_ascii=False)
    head = text.encode()
    return (b"".join([head, *data]), len(head)) if data else (head, None)


def bad_tensor(cause: str) -> Problem:
    """A request that does not follow the protocol."""
    return Problem(400, "malformed", f"{cause[:1].upper()}{cause[1:]}.")


def _object(text: bytes) -> dict[str, Any]:
    try:
        content = json.loads(text.decode("utf-8"), parse_constant=_no_constant)
    # A number of too many digits is a ValueError, deep nesting a RecursionError.
    except (ValueError, RecursionError) as error:
        cause = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise bad_tensor(f"the request is not valid JSON: {cause[:200]}") from error
    if not isinstance(content, dict):
        raise bad_tensor("the request is not a JSON object")
    return content


def _tensor(plain: Any, body: bytes, at: int) -> tuple[Tensor, int]:
    """One input, and where in the body the data of the next begin."""
    if not isinstance(plain, dict):
        raise bad_tensor("an input is not an object")
    name, datatype, shape = (plain.get(key) for key in ("name", "datatype", "shape"))
    if not isinstance(name, str) or not isinstance(datatype, str):
        raise bad_tensor("an input needs the strings name and datatype")
    called = f"input {name[:100]!r}"
    sides = _sides(called, shape)
    parameters = plain.get("parameters", {})
    if not isinstance(parameters, dict):
        raise bad_tensor(f"the parameters of {called} are not an object")
    size, data = parameters.get("binary_data_size"), plain.get("data")
    if (size is None) == (data is None):
        raise bad_tensor(f"{called} needs either data or the parameter binary_data_size")
    if size is None:
        if not isinstance(data, list):
            raise bad_tensor(f"the data of {called} are not an array")
        return Tensor(name, datatype, sides, data), at
    if type(size) is not int or not 0 <= size <= len(body) - at:
        raise bad_tensor(f"the binary_data_size of {called} is not what follows the JSON")
    return Tensor(name, datatype, sides, body[at : at + size]), at + size


def _sides(called: str, shape: Any) -> tuple[int, ...]:
    if (
        not isinstance(shape, list)
        or not 1 <= len(shape) <= _MOST_DIMENSIONS
        or not all(type(side) is int and 0 <= side < 2**31 for side in shape)
    ):
        raise bad_tensor(f"the shape of {called} is not up to {_MOST_DIMENSIONS} whole numbers")
    return tuple(shape)


def _split(name: str, data: bytes, count: int) -> list[bytes | ImageError]:
    found: list[bytes | ImageError] = []
    at = 0
    while at < len(data) and len(found) < count:
        if at + 4 > len(data):
            break
        (length,) = struct.unpack_from("<I", data, at)
        at += 4 + length
        found.append(data[at - length : at])
    if at != len(data) or len(found) != count:
        raise bad_tensor(f"the bytes of {name} are not {count} elements with their lengths")
    return found


def _flat(data: list[Any]) -> list[Any]:
    """A list's elements, however they are nested up to the dimensions allowed."""
    for _ in range(_MOST_DIMENSIONS - 1):
        if not any(isinstance(one, list) for one in data):
            break
        data = [inner for one in data for inner in (one if isinstance(one, list) else [one])]
    return data


def _small_integers(name: str, flat: list[Any]) -> npt.NDArray[np.uint8]:
    if not all(type(one) is int and 0 <= one <= 255 for one in flat):
        raise bad_tensor(f"{name} must hold whole numbers from 0 to 255")
    return np.array(flat, np.uint8)


def _decoded(index: int, text: str) -> bytes | ImageError:
    try:
        return b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        return ImageError(f"image {index} is not valid base64: {error}")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")
