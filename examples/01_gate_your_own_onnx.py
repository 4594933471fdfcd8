"""Give a classifier you already have, as an ONNX file, a gate: a score, a threshold, a promise.

Here the classifier is a logistic regression on scikit-learn's digits 0 to 7, written as ONNX by
hand; yours comes from any framework. It needs [N, C, H, W] float32 in and logits out.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from sklearn.linear_model import LogisticRegression

import moon
from moon.data import Preprocess, load_pixels, open_source
from moon.export import from_onnx

KNOWN = "sklearn:digits#{split}{{label in 0..7}}"
look = Preprocess(crop=(8, 8), mean=(0.5,), std=(0.5,))

train = open_source(KNOWN.format(split="train"))
pixels = load_pixels(train, look)
flat = look.normalise(pixels).reshape(len(train), -1)
fitted = LogisticRegression(max_iter=2000).fit(flat[:700], train.labels[:700])

graph = helper.make_graph(
    [
        helper.make_node("Flatten", ["x"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w", "b"], ["logits"], transB=1),
    ],
    "digits",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 1, 8, 8])],
    [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 8])],
    [
        numpy_helper.from_array(fitted.coef_.astype(np.float32), "w"),
        numpy_helper.from_array(fitted.intercept_.astype(np.float32), "b"),
    ],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)

with TemporaryDirectory() as folder:
    onnx.save(model, Path(folder) / "mine.onnx")
    bundle = from_onnx(
        Path(folder) / "mine.onnx",
        Path(folder) / "mine.moon",
        classes=[str(digit) for digit in range(8)],
        mean=(0.5,),
        std=(0.5,),
        # Held-out images of the known classes, not among those the model was fitted on.
        data=KNOWN.format(split="train") + "[700:]",
        reject=0.05,
    )
    predictor = moon.Predictor.open(bundle)
    for name, spec in {
        "a known 3": "sklearn:digits#test{label==3}",
        "an unknown 9": "sklearn:digits#test{label==9}",
    }.items():
        decision = predictor.predict([open_source(spec).item(0)])[0]
        verdict = decision.label if decision.accepted else f"abstains ({decision.reason})"
        print(f"{name}: {verdict}, score {decision.score:.2f} against {decision.threshold:.2f}")
