"""The network TensorRT is given answers as the bundle does, with the gate as inputs."""

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto

from moon.bundle import Bundle
from moon.calibrated import CALIBRATED, calibrated_values
from moon.errors import ExportError
from moon.export.graph import initializers, weight_names
from moon.export.session import Session
from moon.export.trt.network import check_size, halved, plain, with_targets
from tests.export.conftest import from_digits


def _feeds(bundle: Bundle) -> dict[str, np.ndarray]:
    pixels = bundle.golden()["pixels"]
    as_is = bundle.manifest.input.dtype == "uint8"
    batch = pixels if as_is else bundle.preprocess.normalise(pixels)
    return {"input": batch, **calibrated_values(bundle.model_bytes())}


def test_what_calibrating_sets_is_fed_and_nothing_else_changes(full: Bundle) -> None:
    network = plain(full.model_bytes())
    names = [value.name for value in network.graph.input]
    assert names[0] == "input" and sorted(names[1:]) == sorted(CALIBRATED)
    assert not set(names) & set(initializers(network))
    golden, found = full.golden(), Session(network).run(_feeds(full))
    for name in found:
        np.testing.assert_array_equal(found[name], golden[name], err_msg=name)


def test_another_gate_that_is_fed_decides(full: Bundle) -> None:
    session, feeds = Session(plain(full.model_bytes())), _feeds(full)
    scores = session.run(feeds)["score"]
    middle = np.asarray(np.median(scores), np.float32)
    one = session.run({**feeds, "threshold": middle})
    np.testing.assert_array_equal(one["accept"], scores >= middle)
    bars = np.linspace(scores.min(), scores.max(), len(full.classes)).astype(np.float32)
    by_class = session.run({**feeds, "threshold": np.array(np.nan, np.float32), "thresholds": bars})
    np.testing.assert_array_equal(by_class["accept"], scores >= bars[by_class["label"]])
    which = list(full.manifest.scores).index("msp")
    other = session.run({**feeds, "gate_score": np.array(which)})
    np.testing.assert_array_equal(other["score"], other["score_msp"])


def test_layers_are_halved_up_to_the_last_and_the_head_stays(full: Bundle) -> None:
    network = plain(full.model_bytes())
    half = halved(network)
    held = initializers(half)
    kinds = [held[name].data_type for name in weight_names(half)]
    assert kinds[-1] == TensorProto.FLOAT and set(kinds[:-1]) == {TensorProto.FLOAT16}
    assert all(t.data_type != TensorProto.FLOAT16 for n, t in held.items() if n.startswith("head/"))
    assert [v.name for v in half.graph.output] == [v.name for v in network.graph.output]
    found, golden = Session(half).run(_feeds(full)), full.golden()
    assert 0 < np.abs(found["logits"] - golden["logits"]).max() < 2e-2
    np.testing.assert_array_equal(found["label"], golden["label"])
    assert all(value.dtype != np.float16 for value in found.values())


def test_a_graph_that_takes_pixels(digits_onnx: Path, tmp_path: Path) -> None:
    bundle = from_digits(digits_onnx, tmp_path / "b", input_dtype="uint8")
    found = Session(halved(plain(bundle.model_bytes()))).run(_feeds(bundle))
    assert 0 < np.abs(found["logits"] - bundle.golden()["logits"]).max() < 2e-2


@pytest.mark.parametrize("targets", [(75,), (75, 86)])
def test_turing_gets_convolutions_for_fp32_products(full: Bundle, targets: tuple[int, ...]) -> None:
    network = plain(full.model_bytes())
    turned = with_targets(network, targets)
    assert not _products(turned) and _products(network)
    found, golden = Session(turned).run(_feeds(full)), full.golden()
    for name in found:
        if not name.startswith("p_"):  # which jump where a score passes another
            np.testing.assert_allclose(
                found[name], golden[name], rtol=1e-4, atol=1e-4, err_msg=name
            )


def _products(network: object) -> list[str]:
    nodes = network.graph.node  # type: ignore[attr-defined]
    held = initializers(network)  # type: ignore[arg-type]
    return [n.name for n in nodes if n.op_type in ("Gemm", "MatMul") and n.input[1] in held]


def test_other_gpus_keep_their_products(full: Bundle) -> None:
    network = plain(full.model_bytes())
    assert with_targets(network, (80, 86, 121)) is network


def test_a_graph_over_two_gigabytes_is_refused() -> None:
    check_size((1 << 31) - 1)
    with pytest.raises(ExportError, match=r"would have 2\.1 GB.*at most 2 GB"):
        check_size(1 << 31)
