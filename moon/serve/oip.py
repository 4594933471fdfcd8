"""The Open Inference Protocol: routes under /v2, for clients that know nothing of moon.

One input is sent, ``image`` (BYTES [N], image files) or ``pixels`` (UINT8 [N, H, W, C], of the
model's shape). The outputs are those of `outputs_of`; an image that could not be read has an
``error`` and is not accepted. An abstention's label is empty, so that a client which looks at
nothing else cannot act on it. Errors are ``{"error": "..."}``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from moon import __version__
from moon.gate import Decision
from moon.serve.body import Encoded, refuse_pickle
from moon.serve.intake import Intake, Taken
from moon.serve.lifecycle import Lifecycle
from moon.serve.models import Model, Models
from moon.serve.schema import Item
from moon.serve.tensors import Output, Tensor, bad_tensor, read_request, written

__all__ = ["OpenInference"]

HEADER_LENGTH = "Inference-Header-Content-Length"
TOP = 5
_KINDS = {
    "decision": "BYTES", "label": "BYTES", "accept": "BOOL", "reason": "BYTES", "score": "FP32",
    "threshold": "FP32", "p_value": "FP64", "top_label": "BYTES", "top_p": "FP64", "error": "BYTES",
}  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """What a request wants beside decisions.

    Attributes:
        id: to be repeated, or None.
        binary: outputs wanted, in order, and whether as bytes.
    """

    id: str | None
    binary: Mapping[str, bool]


class OpenInference:
    """Answers under /v2.

    Args:
        models: looked up anew for each request.
        intake: takes requests in.
        lifecycle: of the worker.
    """

    def __init__(self, models: Models, intake: Intake, lifecycle: Lifecycle) -> None:
        self.models, self.intake, self.lifecycle = models, intake, lifecycle

    @property
    def routes(self) -> list[Route]:
        """To be put into a router."""
        one = "/v2/models/{model}"
        found = [
            Route("/v2", self.server),
            Route("/v2/health/live", self.live),
            Route("/v2/health/ready", self.ready),
        ]
        for path in (one, f"{one}/versions/{{version}}"):
            found += [
                Route(path, self.metadata),
                Route(f"{path}/ready", self.model_ready),
                Route(f"{path}/infer", self.infer, methods=["POST"]),
            ]
        return found

    async def server(self, request: Request) -> Response:
        """What this server is."""
        extensions = ["binary_tensor_data"]
        return JSONResponse({"name": "moon", "version": __version__, "extensions": extensions})

    async def live(self, request: Request) -> Response:
        """The process runs."""
        return JSONResponse({"live": True})

    async def ready(self, request: Request) -> Response:
        """Requests are welcome."""
        self.lifecycle.check(self.models.working)
        return JSONResponse({"ready": True})

    async def model_ready(self, request: Request) -> Response:
        """Requests to this model are welcome."""
        model = self._model(request)
        self.lifecycle.check(not model.engine.stuck)
        return JSONResponse({"name": model.name, "ready": True})

    async def metadata(self, request: Request) -> Response:
        """What the model takes and gives."""
        model = self._model(request)
        width = _width(model)
        shapes = {name: [-1, width] if name.startswith("top_") else [-1] for name in _KINDS}
        outputs = [
            {"name": name, "datatype": kind, "shape": shapes[name]} for name, kind in _KINDS.items()
        ]
        return JSONResponse(
            {
                "name": model.name,
                "versions": [model.version],
                "platform": "moon",
                "inputs": [{"name": "image", "datatype": "BYTES", "shape": [-1]}],
                "outputs": outputs,
            }
        )

    async def infer(self, request: Request) -> Response:
        """Decide the images of one request."""
        model = self._model(request)
        refuse_pickle(request.headers)
        parse = partial(_parse, model, request.headers.get(HEADER_LENGTH))
        taken = await self.intake.take(request, model.engine, parse)
        model.figures.decided(taken.decisions, unreadable=len(taken.items) - len(taken.decisions))
        return _answer(model, taken)

    def _model(self, request: Request) -> Model:
        found = request.path_params
        return self.models.get(found["model"], found.get("version"))


def _parse(model: Model, header_length: str | None, body: bytes) -> tuple[Asked, list[Encoded]]:
    content, tensors = read_request(body, header_length)
    if len(tensors) != 1:
        raise bad_tensor(f"one input is wanted, image or pixels, not {len(tensors)}")
    return _asked(content), _images(model, tensors[0])


def _asked(content: dict[str, Any]) -> Asked:
    given_id, parameters = content.get("id"), content.get("parameters", {})
    if given_id is not None and not isinstance(given_id, str):
        raise bad_tensor("id is not a string")
    if not isinstance(parameters, dict):
        raise bad_tensor("parameters is not an object")
    by_default = parameters.get("binary_data_output") is True
    wanted = content.get("outputs") or [{"name": name} for name in _KINDS]
    if not isinstance(wanted, list):
        raise bad_tensor("outputs is not an array")
    binary = {}
    for one in wanted:
        name = one.get("name") if isinstance(one, dict) else None
        if not isinstance(name, str) or name not in _KINDS:
            raise bad_tensor(f"each of outputs must name one of {', '.join(_KINDS)}")
        own = one.get("parameters", {})
        if not isinstance(own, dict):
            raise bad_tensor(f"the parameters of output {name} are not an object")
        binary[name] = own.get("binary_data", by_default) is True
    return Asked(given_id, binary)


def _images(model: Model, tensor: Tensor) -> list[Encoded]:
    most, shape = model.engine.limits.items, model.engine.shape
    if not 1 <= tensor.shape[0] <= most:
        raise bad_tensor(f"a request may hold 1 to {most} images, not {tensor.shape[0]}")
    if tensor.name == "image" and tensor.datatype == "BYTES":
        if tensor.shape[1:] not in ((), (1,)):
            raise bad_tensor(f"the shape of image must be [N], not {list(tensor.shape)}")
        return [Encoded(i, data) for i, data in enumerate(tensor.texts())]
    if tensor.name == "pixels" and tensor.datatype == "UINT8":
        if tensor.shape[1:] != shape:
            sides = ", ".join(map(str, shape))
            raise bad_tensor(f"the shape of pixels must be [N, {sides}], not {list(tensor.shape)}")
        return [Encoded(i, pixels) for i, pixels in enumerate(tensor.bytes_of_shape())]
    sides = ", ".join(map(str, shape))
    raise bad_tensor(
        f"the input must be image (BYTES [N]) or pixels (UINT8 [N, {sides}]), "
        f"not {tensor.name[:100]!r} ({tensor.datatype[:20]})"
    )


def _answer(model: Model, taken: Taken[Asked]) -> Response:
    found = _outputs(taken.items, taken.decisions, _width(model))
    content: dict[str, Any] = {"model_name": model.name, "model_version": model.version}
    if taken.asked.id is not None:
        content["id"] = taken.asked.id
    wanted = [found[name] for name in taken.asked.binary]
    body, head = written(content, wanted, taken.asked.binary)
    if head is None:
        return Response(body, media_type="application/json")
    headers = {HEADER_LENGTH: str(head)}
    return Response(body, media_type="application/octet-stream", headers=headers)


def _outputs(items: Sequence[Item], decisions: Sequence[Decision], width: int) -> dict[str, Output]:
    decided = iter(decisions)
    rows = [_row(item, None if item.pixels is None else next(decided), width) for item in items]
    found = {}
    for name, kind in _KINDS.items():
        values: list[Any] = [row[name] for row in rows]
        shape: tuple[int, ...] = (len(rows),)
        if name.startswith("top_"):
            values, shape = [one for row in values for one in row], (len(rows), width)
        found[name] = Output(name, kind, shape, values)
    return found


def _row(item: Item, decision: Decision | None, width: int) -> dict[str, Any]:
    """One image's value of every output."""
    if decision is None:
        nothing = dict.fromkeys(_KINDS)
        tops = {"top_label": [""] * width, "top_p": [None] * width}
        return {**nothing, **tops, "decision": "error", "accept": False, "error": str(item.error)}
    top: list[tuple[str, float | None]] = [*decision.top]
    top += [("", None)] * (width - len(top))
    return {
        "decision": "accept" if decision.accepted else "abstain",
        "label": decision.label,
        "accept": decision.accepted,
        "reason": decision.reason,
        "score": decision.score,
        "threshold": decision.threshold,
        "p_value": decision.p_value,
        "top_label": [label for label, _ in top],
        "top_p": [p for _, p in top],
        "error": "",
    }


def _width(model: Model) -> int:
    return min(TOP, len(model.engine.predictor.bundle.classes))
