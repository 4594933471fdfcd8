"""Asks a server through Triton's own client: python triton_client.py HOST:PORT MODEL SIDE"""

from __future__ import annotations

import json
import sys

import numpy as np
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException


def main(address: str, model: str, side: int) -> None:
    client = triton.InferenceServerClient(address)
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(model)
    assert not client.is_model_ready("another")
    assert client.get_server_metadata()["name"] == "moon"
    (version,) = client.get_model_metadata(model)["versions"]
    assert client.is_model_ready(model, version)
    pixels = np.random.default_rng(0).integers(0, 256, (5, side, side, 3), np.uint8)
    sent = {}
    for binary in (True, False):
        tensor = triton.InferInput("pixels", list(pixels.shape), "UINT8")
        tensor.set_data_from_numpy(pixels, binary_data=binary)
        sent[binary] = client.infer(model, [tensor], model_version=version, request_id="mine")
        assert sent[binary].get_response()["id"] == "mine"
    files = [b"P6 %d %d 255\n" % (side, side) + one.tobytes() for one in pixels]
    tensor = triton.InferInput("image", [6], "BYTES")
    tensor.set_data_from_numpy(np.array([*files, b"no image"], object))
    wanted = [
        triton.InferRequestedOutput("score", binary_data=False),
        triton.InferRequestedOutput("label"),
        triton.InferRequestedOutput("accept"),
        triton.InferRequestedOutput("error"),
    ]
    of_files = client.infer(model, [tensor], outputs=wanted)
    for name in ("score", "label", "accept"):
        first = sent[True].as_numpy(name)
        assert (first == sent[False].as_numpy(name)).all()
        assert (first == of_files.as_numpy(name)[:5]).all()
    assert b"not an image" in of_files.as_numpy("error")[5]
    assert not of_files.as_numpy("accept")[5]
    for wrong in (model, "another"):
        zero = triton.InferInput("x", [1], "FP32")
        zero.set_data_from_numpy(np.zeros(1, np.float32))
        try:
            client.infer(wrong, [zero])
        except InferenceServerException as error:
            assert error.message()
        else:
            raise AssertionError("it was answered")
    decided = [sent[True].as_numpy(name).tolist() for name in ("accept", "score")]
    print(json.dumps(decided))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
