"""The shapes of what is sent and answered, as the OpenAPI document has them."""

from __future__ import annotations

from typing import Any

from moon.gate import REASONS
from moon.serve.limits import Limits

__all__ = ["schemas"]

Plain = dict[str, Any]
_TEXT: Plain = {"type": "string"}
_NUMBER: Plain = {"type": "number"}
_MAYBE_TEXT: Plain = {"type": ["string", "null"]}
_MAYBE_NUMBER: Plain = {"type": ["number", "null"]}
_SHARE: Plain = {"type": "number", "minimum": 0, "maximum": 1}


def schemas(limits: Limits) -> Plain:
    """Each by its name."""
    return {**_prediction(limits), **_protocol(), "Index": {"type": "object"}, "Problem": _PROBLEM}


_PROBLEM: Plain = {
    "type": "object",
    "description": "RFC 9457",
    "properties": {
        "type": {"type": "string", "pattern": "^urn:moon:problem:"},
        "title": _TEXT,
        "status": {"type": "integer"},
        "detail": {"type": "string", "minLength": 1},
        "request_id": _TEXT,
        "errors": {"type": "array", "items": {"$ref": "#/components/schemas/Unreadable"}},
    },
    "required": ["type", "title", "status", "detail", "request_id"],
}


def _prediction(limits: Limits) -> Plain:
    score = _object(
        name=_TEXT,
        value=_MAYBE_NUMBER,
        threshold=_NUMBER,
        direction={"const": "higher_is_in_distribution"},
    )
    name = {"type": ["string", "integer", "null"], "description": "File name, or index."}
    decision = _object(
        input=name,
        decision={"enum": ["accept", "abstain"]},
        label={**_MAYBE_TEXT, "description": "null on abstention."},
        reason={"enum": [None, *REASONS]},
        top={"type": "array", "items": _object(label=_TEXT, p=_SHARE)},
        score=score,
        p_value={"type": ["number", "null"], "minimum": 0, "maximum": 1},
    )
    either = [_link("Decision"), _link("Unreadable")]
    return {
        "Instances": _object(
            instances={
                "type": "array",
                "minItems": 1,
                "maxItems": limits.items,
                "items": _object(b64={"type": "string", "contentEncoding": "base64"}),
            }
        ),
        "Decision": decision,
        "Unreadable": _object(input=name, error=_TEXT),
        "Predictions": _object(
            id=_TEXT,
            model=_object(name=_TEXT, version=_TEXT),
            predictions={"type": "array", "minItems": 1, "items": {"oneOf": either}},
        ),
    }


def _protocol() -> Plain:
    described = _object(name=_TEXT, datatype=_TEXT, shape=_integers(-1))
    tensors: Plain = {"type": "array", "items": described}
    return {
        "Error": _object(error={"type": "string", "minLength": 1}),
        "Server": _object(name=_TEXT, version=_TEXT, extensions={"type": "array", "items": _TEXT}),
        "Live": _object(live={"const": True}),
        "Ready": _object(ready={"const": True}),
        "ModelReady": _object(name=_TEXT, ready={"const": True}),
        "Metadata": _object(
            name=_TEXT,
            versions={"type": "array", "items": _TEXT},
            platform=_TEXT,
            inputs=tensors,
            outputs=tensors,
        ),
        "Inference": _inference(),
        "Inferred": _open(
            {"model_name": _TEXT, "model_version": _TEXT, "outputs": {"type": "array"}},
            {"id": _TEXT},
        ),
    }


def _inference() -> Plain:
    parameters: Plain = {"type": "object"}
    image = _open(
        {
            "name": {"const": "image"},
            "datatype": {"const": "BYTES"},
            "shape": {**_integers(1), "minItems": 1, "maxItems": 2},
        },
        {
            "parameters": parameters,
            "data": {"type": "array", "items": {"type": "string", "contentEncoding": "base64"}},
        },
    )
    pixels = _open(
        {
            "name": {"const": "pixels"},
            "datatype": {"const": "UINT8"},
            "shape": {**_integers(1), "minItems": 4, "maxItems": 4},
        },
        {"parameters": parameters, "data": {"type": "array"}},
    )
    wanted = _open({"name": _TEXT}, {"parameters": parameters})
    return _open(
        {
            "inputs": {
                "type": "array",
                "minItems": 1,
                "maxItems": 1,
                "items": {"oneOf": [image, pixels]},
            }
        },
        {
            "id": _TEXT,
            "parameters": parameters,
            "outputs": {"type": "array", "items": wanted},
        },
    )


def _integers(least: int) -> Plain:
    return {"type": "array", "items": {"type": "integer", "minimum": least}}


def _object(**properties: Plain) -> Plain:
    """An object with these members and no others."""
    return {**_open(properties, {}), "additionalProperties": False}


def _open(required: Plain, optional: Plain) -> Plain:
    """An object with these members, some required, and maybe others."""
    return {
        "type": "object",
        "properties": {**required, **optional},
        "required": list(required),
    }


def _link(name: str) -> Plain:
    return {"$ref": f"#/components/schemas/{name}"}
