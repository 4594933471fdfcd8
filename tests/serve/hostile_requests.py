"""Requests that are wrong, or worse, as the bytes that a client sends: for tests and fuzzing.

Each must be refused with a 4xx and a detail, whatever it says.
"""

from __future__ import annotations

import base64
import json
import pickle
import struct
import zlib
from typing import Any

__all__ = ["HOSTILE", "bomb", "post", "request"]

Headers = dict[str, str]
IMAGE = {"Content-Type": "image/png"}
JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "multipart/form-data; boundary=b"}
INFER = "/v2/models/tiny/infer"
PIXEL = base64.b64encode(b"P5 1 1 255\n\x80").decode()


def request(method: str, target: str, headers: Headers, body: bytes = b"") -> bytes:
    """The bytes of a request that says how long its body is."""
    given = {"Host": "x", "Connection": "close", **headers}
    if not {name.lower() for name in given} & {"content-length", "transfer-encoding"}:
        given["Content-Length"] = str(len(body))
    lines = "".join(f"{name}: {value}\r\n" for name, value in given.items())
    return f"{method} {target} HTTP/1.1\r\n{lines}\r\n".encode("latin-1") + body


def post(headers: Headers, body: bytes, target: str = "/predict") -> bytes:
    """The bytes of a POST."""
    return request("POST", target, headers, body)


def bomb(width: int, height: int) -> bytes:
    """A small PNG of a huge black image."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    pack = zlib.compressobj(9)
    row = bytes(1 + width // 8)
    data = b"".join(pack.compress(row) for _ in range(height)) + pack.flush()
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _liar(width: int, height: int) -> bytes:
    """A PNG that says it is huge and holds nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IEND", b"")


def _json(content: Any) -> bytes:
    return json.dumps(content).encode()


def _part(headers: str, data: bytes = b"x") -> bytes:
    return b"--b\r\n" + headers.encode("latin-1") + b"\r\n\r\n" + data + b"\r\n--b--\r\n"


def _named(extra: str) -> bytes:
    return _part(f"Content-Disposition: form-data; {extra}")


def _infer(*inputs: Any, **more: Any) -> bytes:
    return post(JSON, _json({"inputs": list(inputs), **more}), INFER)


def _image(**changed: Any) -> dict[str, Any]:
    found = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [PIXEL], **changed}
    return {key: value for key, value in found.items() if value is not None}


class Gone:
    """Ends the process that unpickles it."""

    def __reduce__(self) -> tuple[Any, tuple[int]]:
        import os

        return os._exit, (1,)


PICKLE = pickle.dumps(Gone())
_GIF = b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0) + bytes(6) + b";"
_TIFF = b"II*\0" + struct.pack("<IH", 8, 65535) + b"\xff" * 200
_BMP = b"BM" + bytes(12) + struct.pack("<IiiHHIIiiII", 40, 2**31 - 1, -(2**31), 1, 24, *[0] * 6)
_WEBP = b"RIFF" + struct.pack("<I", 2**32 - 1) + b"WEBPVP8X" + struct.pack("<I", 10) + b"\xff" * 10

_BODIES: dict[str, tuple[Headers, bytes]] = {
    # raw images
    "empty image": (IMAGE, b""),
    "text for an image": (IMAGE, b"text"),
    "svg": (IMAGE, b"<svg xmlns='x' onload='alert(1)'/>"),
    "only a signature": (IMAGE, b"\x89PNG\r\n\x1a\n"),
    "bomb": (IMAGE, bomb(10_000, 9_000)),
    "huge on paper": (IMAGE, _liar(2**31 - 1, 2**31 - 1)),
    "no pixels": (IMAGE, _liar(0, 0)),
    "gif bomb": ({"Content-Type": "image/gif"}, _GIF),
    "tiff loop": ({"Content-Type": "image/tiff"}, _TIFF),
    "bmp bomb": ({"Content-Type": "image/bmp"}, _BMP),
    "webp bomb": ({"Content-Type": "image/webp"}, _WEBP),
    "ppm without end": ({"Content-Type": "image/x-portable-anymap"}, b"P6 " + b"9" * 60_000),
    "half a jpeg": ({"Content-Type": "image/jpeg"}, b"\xff\xd8\xff\xe0" + bytes(500)),
    "zip": (IMAGE, b"PK\x03\x04" + bytes(100)),
    "pickle as an image": (IMAGE, PICKLE),
    # content types
    "no type": ({}, b"x"),
    "text": ({"Content-Type": "text/plain"}, b"x"),
    "octets": ({"Content-Type": "application/octet-stream"}, b"x"),
    "form": ({"Content-Type": "application/x-www-form-urlencoded"}, b"image=http://127.0.0.1/"),
    "pickle": ({"Content-Type": "application/vnd.bentoml+pickle"}, PICKLE),
    "PICKLE": ({"Content-Type": "APPLICATION/VND.BENTOML+PICKLE"}, PICKLE),
    "x-pickle": ({"Content-Type": "application/x-pickle; charset=utf-8"}, PICKLE),
    "image/pickle": ({"Content-Type": "image/pickle"}, PICKLE),
    "pickle in a parameter": ({"Content-Type": "application/json; a=pickle"}, PICKLE),
    "pickle container": ({**IMAGE, "Payload-Container": "NdarrayContainer"}, PICKLE),
    "gzip": ({**IMAGE, "Content-Encoding": "gzip"}, zlib.compress(b"x")),
    "type of bytes": ({"Content-Type": "\xff\xfe"}, b"x"),
    "long type": ({"Content-Type": "image" + "/" * 5000}, b""),
    # JSON
    "open brace": (JSON, b"{"),
    "not utf-8": (JSON, b"\xff\xfe"),
    "nan": (JSON, b'{"instances": [{"b64": NaN}]}'),
    "deep": (JSON, b"[" * 200_000),
    "deep objects": (JSON, b'{"a":' * 100_000),
    "long number": (JSON, b'{"instances": ' + b"9" * 100_000 + b"}"),
    "lone surrogate": (JSON, b'{"instances": [{"b64": "\\ud800"}]}'),
    "null": (JSON, b"null"),
    "no instances": (JSON, b"{}"),
    "empty instances": (JSON, _json({"instances": []})),
    "url": (JSON, _json({"instances": [{"url": "http://127.0.0.1/"}]})),
    "url as text": (JSON, _json({"instances": ["http://127.0.0.1/"]})),
    "url as base64": (JSON, _json({"instances": [{"b64": "http://127.0.0.1/"}]})),
    "path": (JSON, _json({"instances": [{"b64": "/etc/passwd"}]})),
    "data url": (JSON, _json({"instances": [{"b64": "data:image/png;base64,YQ=="}]})),
    "bad base64": (JSON, _json({"instances": [{"b64": "!!"}]})),
    "too many": (JSON, _json({"instances": [{"b64": ""}] * 65})),
    "extra member": (JSON, _json({"instances": [{"b64": PIXEL, "path": "/etc/passwd"}]})),
    # multipart
    "no boundary": ({"Content-Type": "multipart/form-data"}, b"x"),
    "empty boundary": ({"Content-Type": "multipart/form-data; boundary="}, b"x"),
    "long boundary": ({"Content-Type": f"multipart/form-data; boundary={'-' * 30000}"}, b"-" * 99),
    "boundary of dashes": (
        {"Content-Type": f"multipart/form-data; boundary={'-' * 70}"}, b"-" * 1_000_000,
    ),
    "boundary of breaks": ({"Content-Type": 'multipart/form-data; boundary="\t\t"'}, b"\r\n" * 999),
    "other boundary": (FORM, b"--other\r\n\r\nx\r\n--other--\r\n"),
    "nothing but breaks": (FORM, b"\r\n" * 500_000),
    "breaks at the end": (FORM, _named('name="image"') + b"\r\n" * 500_000),
    "never closed": (FORM, _named('name="image"')[:-8]),
    "no name": (FORM, _part("X: y")),
    "other name": (FORM, _named('name="url"; filename="http://127.0.0.1/"')),
    "traversal": (FORM, _named('name="image"; filename="../../../../etc/passwd"')),
    "null name": (FORM, _named('name="image\x00"')),
    "name of bytes": (FORM, _named('name="\xff\xfe"')),
    "long name": (FORM, _named(f'name="{"a" * 60_000}"')),
    "pickled part": (FORM, _part('Content-Disposition: form-data; name="image"\r\n'
                                 "Content-Type: application/vnd.bentoml+pickle", PICKLE)),
    "many headers": (FORM, b"--b\r\n" + b"X: y\r\n" * 50_000 + b"\r\n\r\n--b--\r\n"),
    "many parts": (FORM, b'--b\r\nContent-Disposition: form-data; name="image"\r\n\r\n\r\n' * 5000),
    "part in a part": (FORM, _part('Content-Disposition: form-data; name="image"\r\n'
                                   "Content-Type: multipart/mixed; boundary=b", b"--b--")),
}  # fmt: skip

_INFERENCE: dict[str, bytes] = {
    "infer nothing": post(JSON, b"", INFER),
    "infer a list": post(JSON, b"[]", INFER),
    "infer no inputs": _infer(),
    "infer a text": _infer("image"),
    "infer two inputs": _infer(_image(), _image()),
    "infer no name": _infer(_image(name=None)),
    "infer another name": _infer(_image(name="input")),
    "infer another type": _infer(_image(datatype="FP32", data=[1.0])),
    "infer no shape": _infer(_image(shape=None)),
    "infer a negative shape": _infer(_image(shape=[-1])),
    "infer a huge shape": _infer(_image(shape=[2**40])),
    "infer no images": _infer(_image(shape=[0], data=[])),
    "infer many dimensions": _infer(_image(shape=[1] * 40)),
    "infer a shape of truth": _infer(_image(shape=[True])),
    "infer too many images": _infer(_image(shape=[65], data=[PIXEL] * 65)),
    "infer fewer than said": _infer(_image(shape=[2])),
    "infer a number": _infer(_image(data=[7])),
    "infer a url": _infer(_image(data=["http://127.0.0.1/"])),
    "infer no data": _infer(_image(data=None)),
    "infer bytes that are not there": _infer(
        _image(data=None, parameters={"binary_data_size": 10**9})
    ),
    "infer negative bytes": _infer(_image(data=None, parameters={"binary_data_size": -1})),
    "infer shared memory": _infer(
        _image(data=None, parameters={"shared_memory_region": "x", "shared_memory_byte_size": 9})
    ),
    "infer another size": _infer(
        {"name": "pixels", "datatype": "UINT8", "shape": [1, 9, 9, 3], "data": [0] * 243}
    ),
    "infer large pixels": _infer(
        {"name": "pixels", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": [256] * 3072}
    ),
    "infer deep pixels": _infer(
        {"name": "pixels", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": [[[[[[[0]]]]]]]}
    ),
    "infer an unknown output": _infer(_image(), outputs=[{"name": "logits"}]),
    "infer odd outputs": _infer(_image(), outputs="all"),
    "infer an odd id": _infer(_image(), id={"a": 1}),
    "infer a pickle": post({"Content-Type": "application/vnd.bentoml+pickle"}, PICKLE, INFER),
    "infer gzip": post({**JSON, "Content-Encoding": "gzip"}, zlib.compress(b"{}"), INFER),
    "infer a long head": post({"Inference-Header-Content-Length": "9" * 12}, b"{}", INFER),
    "infer an odd head": post({"Inference-Header-Content-Length": "-1"}, b"{}", INFER),
    "infer lying lengths": post(
        {"Inference-Header-Content-Length": "109"},
        b'{"inputs":[{"name":"image","datatype":"BYTES","shape":[1],'
        b'"parameters":{"binary_data_size":8}}],"outputs":[]}' + b"\xff\xff\xff\xff" + b"abcd",
        INFER,
    ),
    "infer another model": post(JSON, b"{}", "/v2/models/../../etc/passwd/infer"),
}

_HTTP: dict[str, bytes] = {
    "nonsense": b"nonsense\r\n\r\n",
    "http/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100) + b"\r\n\r\n",
    "negative length": post({**IMAGE, "Content-Length": "-1"}, b""),
    "absurd length": post({**IMAGE, "Content-Length": "9" * 18}, b""),
    "more absurd length": post({**IMAGE, "Content-Length": "9" * 5000}, b""),
    "length of words": post({**IMAGE, "Content-Length": "ten"}, b""),
    "two lengths": post({**IMAGE, "Content-Length": "1", "content-length": "2"}, b"xx"),
    "length and chunks": post(
        {**IMAGE, "Content-Length": "4", "Transfer-Encoding": "chunked"}, b"0\r\n\r\n"
    ),
    "bad chunks": post({**IMAGE, "Transfer-Encoding": "chunked"}, b"zz\r\nxx\r\n0\r\n\r\n"),
    "huge chunk": post({**IMAGE, "Transfer-Encoding": "chunked"}, b"f" * 30 + b"\r\nx"),
    "other coding": post({**IMAGE, "Transfer-Encoding": "gzip, chunked"}, b"0\r\n\r\n"),
    "two types": post({**IMAGE, "content-type": "application/vnd.bentoml+pickle"}, PICKLE),
    "long header": request("GET", "/nowhere", {"X": "a" * 100_000}),
    "many heads": request("GET", "/nowhere", {f"X-{i}": "a" for i in range(9000)}),
    "long target": request("GET", "/" + "a" * 100_000, {}),
    "header injection": request("GET", "/nowhere", {"X-Request-ID": "a\rSet-Cookie: b"}),
    "space in the name": request("GET", "/nowhere", {"X Y": "z"}),
    "no host": b"GET /nowhere HTTP/1.1\r\nConnection: close\r\n\r\n",
    "traversal target": request("GET", "/docs/../../../../etc/passwd", {}),
    "encoded traversal": request("GET", "/docs/..%2f..%2f..%2fetc%2fpasswd", {}),
    "null target": request("GET", "/docs/swagger-ui.css%00", {}),
    "other file": request("GET", "/docs/index.css", {}),
    "bentoml's page": request("GET", "/docs.json", {}),
    "absolute target": request("GET", "http://127.0.0.1:1/nowhere", {}),
    "connect": request("CONNECT", "127.0.0.1:22", {}),
    "trace": request("TRACE", "/", {}),
    "get of predict": request("GET", "/predict", {}),
    "preflight": request(
        "OPTIONS", "/predict",
        {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"},
    ),
    "odd method": request("BREW", "/predict", {}),
    "override": request("GET", "/predict", {"X-HTTP-Method-Override": "POST"}),
}  # fmt: skip

HOSTILE: dict[str, bytes] = {
    **{name: post(headers, body) for name, (headers, body) in _BODIES.items()},
    **_INFERENCE,
    **_HTTP,
}
