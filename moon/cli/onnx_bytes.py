"""The bytes of the ONNX model that a path names: a bundle's, or a file with what lies beside it."""

from __future__ import annotations

from pathlib import Path

from moon.errors import BackendError

__all__ = ["model_bytes"]


def model_bytes(path: Path) -> bytes:
    """The ONNX file of a bundle, checked, or the file itself with the data beside it.

    Raises:
        BundleError: the bundle is damaged.
        BackendError: the file cannot be read, or what belongs to it.
    """
    if path.is_dir():
        from moon.bundle import Bundle

        return Bundle.open(path).model_bytes()
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BackendError(f"could not read {path}: {error.strerror}") from error
    return _whole(path, data)


def _whole(path: Path, data: bytes) -> bytes:
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from onnx.external_data_helper import load_external_data_for_model, uses_external_data

    try:
        model = onnx.load_model_from_string(data)
    except DecodeError:
        return data  # for who reads it to say
    if not any(map(uses_external_data, model.graph.initializer)):
        return data
    try:
        load_external_data_for_model(model, str(path.parent))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise BackendError(
            f"weights of {path.name} lie in another file that could not be read: {error}",
            remedy=f"Put it beside {path.name}, as the exporter wrote it",
        ) from error
    for tensor in model.graph.initializer:
        tensor.ClearField("data_location")  # two bytes that no other model has
    whole: bytes = model.SerializeToString()
    return whole
