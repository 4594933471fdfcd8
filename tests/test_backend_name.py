from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moon.backend_name import BackendName
from moon.errors import UsageError


def test_a_name_is_taken_apart() -> None:
    found = BackendName.parse(
        "onnxruntime:cuda,device_id=1,session.intra_op.allow_spinning=0,fallback=cpu"
    )
    assert (found.name, found.provider, found.key) == ("onnxruntime", "cuda", "onnxruntime:cuda")
    assert dict(found.options) == {"device_id": "1"}
    assert dict(found.entries) == {"session.intra_op.allow_spinning": "0"}
    assert found.falls_back and not found.plain
    assert str(found).endswith("fallback=cpu")


@pytest.mark.parametrize("text", ["onnxruntime", "onnxruntime:cpu", " onnxruntime "])
def test_the_cpu_provider_is_the_backend_itself(text: str) -> None:
    found = BackendName.parse(text)
    assert found.key == "onnxruntime" and found.plain


@pytest.mark.parametrize("name", ["sparse", "fake", "default", "tensorrt", "made_up"])
def test_other_backends_have_a_name_and_nothing_else(name: str) -> None:
    assert BackendName.parse(name).key == name
    for text in (f"{name}:cuda", f"{name},device_id=1"):
        with pytest.raises(UsageError, match=f"the backend {name} takes neither a provider nor"):
            BackendName.parse(text)


def test_a_comma_without_a_key_belongs_to_the_value() -> None:
    found = BackendName.parse("onnxruntime:openvino,device_type=HETERO:GPU,CPU,num_of_threads=2")
    assert dict(found.options) == {"device_type": "HETERO:GPU,CPU", "num_of_threads": "2"}
    shapes = "input:1x3x32x32"
    found = BackendName.parse(f"onnxruntime:tensorrt,trt_profile_min_shapes={shapes}")
    assert dict(found.options) == {"trt_profile_min_shapes": shapes}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names no backend"),
        (":cuda", "names no backend"),
        ("onnxruntime:", "names no backend"),
        ("onnxruntime:cuda,device_id", "'device_id' in .* is not KEY=VALUE"),
        ("onnxruntime:cuda,=1", "is not KEY=VALUE"),
        ("onnxruntime:cuda,device_id=1,device_id=2", "gives device_id twice"),
        ("onnxruntime:cuda,fallback=gpu", "fallback=gpu is not known.*fallback=cpu"),
        ("onnxruntime:cuda,sesion.x=1", "sesion.x is no entry of ONNX Runtime's session"),
    ],
)
def test_what_is_wrong_is_named(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        BackendName.parse(text)


@given(
    st.dictionaries(
        st.from_regex(r"[a-z_]{1,9}", fullmatch=True).filter(lambda key: key != "fallback"),
        st.from_regex(r"[A-Za-z0-9:./]{0,9}", fullmatch=True),
        max_size=4,
    )
)
def test_options_are_read_as_they_were_written(options: dict[str, str]) -> None:
    text = "onnxruntime:cuda" + "".join(f",{key}={value}" for key, value in options.items())
    assert dict(BackendName.parse(text).options) == options
