"""moon inspect --bytes."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from moon.export.pack import pack
from tests.cli.conftest import Moon
from tests.export.test_pack import network


def test_bytes_of_a_bundle(moon: Moon, exported: Path) -> None:
    found = moon("inspect", exported, "--bytes", "--json").json
    facts = moon("inspect", exported, "--json").json
    assert found["kind"] == "bytes" and found["file_bytes"] == facts["model_bytes"]
    parts = found["layer_bytes"] + found["rest_bytes"] + found["score_bytes"]
    assert parts == found["file_bytes"]
    assert found["dense_bytes"] == pytest.approx(facts["dense_bytes"], rel=0.1)
    assert {one["name"]: one["nonzeros"] for one in found["layers"]} == {
        one["name"]: one["nonzeros"] for one in facts["layers"]
    }
    assert {"deltas", "bitmask"} & {one["form"] for one in found["layers"]}
    text = moon("inspect", exported, "--bytes").out
    assert "biases, operators, names" in text and "bitmask" in text


def test_weights_in_a_file_beside_the_model_count(moon: Moon, tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside.onnx", tmp_path / "deep" / "outside.onnx"
    outside.parent.mkdir()
    onnx.save(network(), inside)
    onnx.save(network(), outside, save_as_external_data=True, location="w.bin", size_threshold=0)
    one, other = (moon("inspect", path, "--bytes", "--json").json for path in (inside, outside))
    assert one["dense_bytes"] == other["dense_bytes"]
    assert [x["file_bytes"] for x in one["layers"]] == [x["file_bytes"] for x in other["layers"]]
    assert moon("inspect", outside, "--gpu", "--json").json["layers"]
    plain = moon("inspect", outside)
    assert plain.code == 2 and "--bytes, --gpu or --engine" in plain.error
    (outside.parent / "w.bin").unlink()
    refused = moon("inspect", outside, "--bytes")
    assert refused.code == 1 and "lie in another file" in refused.error
    assert "Put it beside outside.onnx" in refused.error


def test_layers_in_the_order_asked_for(moon: Moon, tmp_path: Path) -> None:
    path = tmp_path / "[m].onnx"
    path.write_bytes(pack(network(), values="fp16").SerializeToString())

    def order(*words: str) -> list[str]:
        found = moon("inspect", path, "--bytes", "--json", *words).json["layers"]
        return [one["name"] for one in found]

    assert order() == ["stem", "gaps", "mask", "none", "fc"]
    assert order("--sort", "file")[0] == "mask"
    assert order("--sort", "dense")[:2] == ["mask", "none"]
    assert order("--sort", "density")[0] == "stem" and order("--sort", "density")[-1] == "none"
    assert order("--sort", "name") == ["fc", "gaps", "mask", "none", "stem"]
    assert "[m].onnx" in moon("inspect", path, "--bytes").out


def test_misuse(moon: Moon, exported: Path) -> None:
    found = moon("inspect", exported, "--bytes", "--sort", "size")
    assert found.code == 2 and "--sort 'size' is none of graph, file" in found.error
    both = moon("inspect", exported, "--gpu", "--bytes")
    assert both.code == 2 and "--gpu and --bytes are separate views" in both.error
