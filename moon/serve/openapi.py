"""The OpenAPI document: every route that clients may rely on, with every answer it may give."""

from __future__ import annotations

from typing import Any

from moon import __version__
from moon.serve.limits import Limits
from moon.serve.models import Model
from moon.serve.openapi_schemas import schemas

__all__ = ["openapi"]

Plain = dict[str, Any]
_RETRY = {"Retry-After": {"schema": {"type": "string"}, "description": "Seconds to wait."}}
# One grey pixel.
_PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR42mNoAAAAggCB2kUIOwAAAABJRU5ErkJggg=="
)
_INFERENCE: Plain = {
    "inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": [_PNG]}],
    "outputs": [{"name": "label"}, {"name": "score"}],
}
_PROBLEMS = {
    400: "The request or its images cannot be read, or the client left.",
    401: "A valid bearer token is needed.",
    404: "There is no such model or version.",
    408: "The body took too long to arrive.",
    413: "The body is too large.",
    415: "The content type is not read; pickled and compressed data never are.",
    422: "The body has another shape.",
    503: "Too many requests are in hand, or the server is starting or stopping.",
    504: "No answer was found in time.",
}


def openapi(limits: Limits, model: Model, *, secured: bool) -> Plain:
    """The document.

    Args:
        limits: whose figures it tells.
        model: the example.
        secured: whether a token is needed.
    """
    paths = {
        "/": _get("What this is", _json("Index"), secured, "about"),
        "/predict": {"post": _predict(limits, secured)},
        "/predict/{model}": {
            "post": _predict(limits, secured, named=True),
            "parameters": [_parameter("model", "The model's name.", model.name)],
        },
        "/livez": _get("Does the process run?", _text(), False, "health"),
        "/healthz": _get("The same as /livez", _text(), False, "health"),
        "/readyz": _get("Are requests welcome?", _text(), False, "health", 503),
        "/metrics": _get("Counters for Prometheus", _text(), secured, "about"),
        "/ui": _get("A page to try an image", _html(), False, "about"),
        **_inference(model, secured),
    }
    document: Plain = {
        "openapi": "3.1.0",
        "info": {
            "title": "moon",
            "version": __version__,
            "description": "An image classifier that abstains from what it does not know.",
        },
        "paths": paths,
        "components": {"schemas": schemas(limits)},
    }
    if secured:
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    return document


def _predict(limits: Limits, secured: bool, named: bool = False) -> Plain:
    image = {"schema": {"type": "string", "format": "binary"}}
    images = {
        "type": "object",
        "properties": {
            "image": {
                "type": "array",
                "items": {"type": "string", "format": "binary"},
                "minItems": 1,
                "maxItems": limits.items,
            }
        },
        "required": ["image"],
        "additionalProperties": False,
    }
    body = {
        "required": True,
        "content": {
            "image/*": image,
            "multipart/form-data": {
                "schema": images,
                "encoding": {"image": {"contentType": "image/*"}},
            },
            "application/json": {
                "schema": _ref("Instances"),
                "example": {"instances": [{"b64": _PNG}]},
            },
        },
    }
    return {
        "operationId": "predict_by_model" if named else "predict",
        "tags": ["prediction"],
        "summary": "A label for each image, or an abstention",
        "description": "Abstaining is an answer, with the label null. An image that cannot be read "
        "has an error in its place, as long as another could be read. URLs are never fetched.",
        "parameters": [
            {
                "name": "X-Request-ID",
                "in": "header",
                "required": False,
                "description": "Repeated as the answer's id, if it is 1 to 64 of A-Z a-z 0-9 . _ -",
                "schema": {"type": "string"},
            }
        ],
        "requestBody": body,
        "responses": _responses(
            _json("Predictions"),
            secured,
            *(400, 408, 413, 415, 422, 503, 504),
            *([404] if named else []),
            oip=False,
        ),
        **_security(secured),
    }


def _inference(served: Model, secured: bool) -> Plain:
    tag = "Open Inference Protocol"
    server = _get("What this server is", _json("Server"), secured, tag, oip=True)
    live = _get("Does the process run?", _json("Live"), False, tag, oip=True)
    ready = _get("Are requests welcome?", _json("Ready"), False, tag, 503, oip=True)
    paths: Plain = {"/v2": server, "/v2/health/live": live, "/v2/health/ready": ready}
    model = _parameter("model", "The model's name.", served.name)
    version = _parameter("version", "Its version, sha256:...", served.version)
    for one, parameters in (
        ("/v2/models/{model}", [model]),
        ("/v2/models/{model}/versions/{version}", [model, version]),
    ):
        described = _get("Its inputs and outputs", _json("Metadata"), secured, tag, 404, oip=True)
        is_ready = _get(
            "Are requests to it welcome?", _json("ModelReady"), secured, tag, 404, 503, oip=True
        )
        for path, item in (
            (one, described),
            (f"{one}/ready", is_ready),
            (f"{one}/infer", {"post": _infer(secured)}),
        ):
            paths[path] = {**item, "parameters": parameters}
    return paths


def _infer(secured: bool) -> Plain:
    header = {
        "name": "Inference-Header-Content-Length",
        "in": "header",
        "required": False,
        "description": "Length of the JSON, where the data of tensors follow it.",
        "schema": {"type": "string", "pattern": "^[0-9]{1,12}$"},
    }
    answer = {
        "application/json": {"schema": _ref("Inferred")},
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
    }
    return {
        "tags": ["Open Inference Protocol"],
        "summary": "Decide images",
        "description": "The input is image (BYTES [N], files) or pixels (UINT8 [N, H, W, C]).",
        "parameters": [header],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": _ref("Inference"), "example": _INFERENCE}},
        },
        "responses": _responses(answer, secured, 400, 404, 408, 413, 415, 503, 504, oip=True),
        **_security(secured),
    }


def _get(
    summary: str, content: Plain, secured: bool, tag: str, *problems: int, oip: bool = False
) -> Plain:
    return {
        "get": {
            "tags": [tag],
            "summary": summary,
            "responses": _responses(content, secured, *problems, oip=oip),
            **_security(secured),
        }
    }


def _responses(content: Plain, secured: bool, *problems: int, oip: bool) -> Plain:
    found: Plain = {"200": {"description": "Answered.", "content": content}}
    for status in sorted({*problems, *([401] if secured else [])}):
        kind, name = ("application/json", "Error") if oip else ("application/problem+json", None)
        schema = _ref(name or "Problem")
        found[str(status)] = {
            "description": _PROBLEMS[status],
            "content": {kind: {"schema": schema}},
            **({"headers": _RETRY} if status == 503 else {}),
        }
    return found


def _parameter(name: str, description: str, example: str) -> Plain:
    schema = {"type": "string", "minLength": 1}
    return {
        "name": name,
        "in": "path",
        "required": True,
        "description": description,
        "schema": schema,
        "example": example,
    }


def _security(secured: bool) -> Plain:
    return {"security": [{"token": []}]} if secured else {}


def _json(name: str) -> Plain:
    return {"application/json": {"schema": _ref(name)}}


def _text() -> Plain:
    return {"text/plain": {"schema": {"type": "string"}}}


def _html() -> Plain:
    return {"text/html": {"schema": {"type": "string"}}}


def _ref(name: str) -> Plain:
    return {"$ref": f"#/components/schemas/{name}"}
