"""ONNX files that are damaged or deceptive, and what the engine may make of one.

Run as a program for as long as one likes: ``python -m tests.runtime.sparse.fuzzing SECONDS SEED``.
"""

from __future__ import annotations

import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from moon.errors import BackendError, MoonError, UsageError

from .fuzz_models import seeds
from .isolated import Array, DiedError, EscapedError, Isolated, RefusedError

MEMORY = 6 << 30
_NUMBERS = (
    -1, 0, 1, 2, 3, 4, 5, 7, 8, 16, 17, 32, 63, 100, 127, 128, 255, 1000, 1 << 16, 1 << 20, 1 << 24,
    1 << 28, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40, (1 << 63) - 1, -(1 << 31),
    -(1 << 63), -2, -3, -4, -16, -1000,
)  # fmt: skip
_REALS = (0.0, -0.0, 1.0, -1.0, 1e-41, 1e38, -1e38, 0.5, 6.0, float("inf"), float("nan"))
_TEXTS = (
    "", "x", "t0", "t1", "c0", "NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER", "Conv", "Relu", "Add",
    "Mul", "MaxPool", "AveragePool", "GlobalAveragePool", "Identity", "Sigmoid", "Flatten", "Gemm",
    "MatMul", "Concat", "ReduceMean", "Squeeze", "Reshape", "Clip", "Dropout", "HardSwish", "Tanh",
    "Softmax", "pads", "strides", "dilations", "kernel_shape", "group", "axis", "axes", "ceil_mode",
    "auto_pad", "alpha", "keepdims", "transB", "epsilon",
)  # fmt: skip
# Beyond these, sums depend on their order.
_LARGEST = 1e6


class Mutator:
    """Makes one broken file after the other."""

    def __init__(self, seed: int, models: Sequence[bytes]) -> None:
        self._draw, self._models = random.Random(seed), models

    def next(self) -> bytes:
        data = self._draw.choice(self._models)
        ways = [self._fields] * 16 + [self._bytes, self._cut, self._splice, self._lengths]
        for _ in range(self._draw.choice((1, 1, 1, 1, 2))):
            data = self._draw.choice(ways)(data)
        return data

    def _bytes(self, data: bytes) -> bytes:
        out = bytearray(data)
        for _ in range(self._draw.choice((1, 1, 2, 8))):
            if out:
                at = self._draw.randrange(len(out))
                out[at] = self._draw.choice((self._draw.randrange(256), out[at] ^ 1, 0xFF, 0x80, 0))
        return bytes(out)

    def _cut(self, data: bytes) -> bytes:
        start, end = sorted(self._draw.randrange(len(data) + 1) for _ in range(2))
        return self._draw.choice((data[:start], data[:start] + data[end:], data[start:]))

    def _splice(self, data: bytes) -> bytes:
        other = self._draw.choice(self._models)
        start, end = sorted(self._draw.randrange(len(other) + 1) for _ in range(2))
        at = self._draw.randrange(len(data) + 1)
        return data[:at] + other[start : min(end, start + 200)] + data[at:]

    def _lengths(self, data: bytes) -> bytes:
        """A number made longer: a length that lies, or a size that is huge."""
        at = self._draw.randrange(len(data) + 1)
        number = self._draw.choice(
            (b"\xff" * 9 + b"\x01", b"\xff\xff\xff\xff\x07", b"\x80\x80\x04")
        )
        return data[:at] + number + data[at + 1 :]

    def _fields(self, data: bytes) -> bytes:
        """A field changed and everything around it right."""
        model = onnx.ModelProto()
        try:
            model.ParseFromString(data)
        except Exception:  # damaged by what was done before
            return self._bytes(data)
        found: list[tuple[Message, FieldDescriptor]] = []
        _collect(model, found, 0)
        if not found:
            return data
        # Fields of few messages, such as attributes, are no less likely than weights.
        kinds = sorted({field.full_name for _, field in found})
        kind = self._draw.choice(kinds)
        message, field = self._draw.choice([one for one in found if one[1].full_name == kind])
        try:
            self._change(message, field)
        except (ValueError, TypeError):
            return data
        return model.SerializeToString()

    def _change(self, message: Any, field: Any) -> None:
        name = field.name
        if not field.is_repeated:
            if self._draw.random() < 0.1 or field.message_type is not None:
                message.ClearField(name)
            else:
                setattr(message, name, self._value(field, getattr(message, name)))
            return
        values = getattr(message, name)
        at = self._draw.randrange(len(values))
        way = self._draw.choice(("drop", "double", "swap", "change", "change"))
        if way == "drop":
            del values[at]
        elif field.message_type is not None:
            copied = [self._copy(one) for one in values]
            other = self._draw.randrange(len(values))
            if way == "double":
                copied.insert(other, self._copy(copied[at]))
            else:
                copied[at], copied[other] = copied[other], copied[at]
            del values[:]
            values.extend(copied)
        elif way == "double":
            values.append(values[at])
        else:
            values[at] = self._value(field, values[at])

    def _copy(self, message: Any) -> Any:
        other = type(message)()
        other.CopyFrom(message)
        return other

    def _value(self, field: Any, old: Any) -> Any:
        draw = self._draw
        if isinstance(old, float):
            return draw.choice(_REALS)
        if isinstance(old, int):
            if field.enum_type is not None:
                return draw.randrange(24)
            return draw.choice((draw.choice(_NUMBERS), old + 1, old - 1, 2 * old))
        if isinstance(old, str):
            return draw.choice((*_TEXTS, old + "x", old[:-1]))
        changed = draw.choice((old[:-1], old + b"\0", old + old, self._bytes(old), b""))
        return draw.choice((changed, draw.choice(_TEXTS).encode()))


def _collect(message: Any, found: list[tuple[Message, FieldDescriptor]], depth: int) -> None:
    for field, value in message.ListFields():
        found.append((message, field))
        if field.message_type is None or depth > 12:
            continue
        for one in value if field.is_repeated else [value]:
            _collect(one, found, depth + 1)


class Judge:
    """What became of files, counted; an AssertionError for what must not be."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()
        self._engine = Isolated(MEMORY, seconds=60)
        self._reference = Isolated(MEMORY, seconds=60)

    def close(self) -> None:
        self._engine.close()
        self._reference.close()

    def check(self, data: bytes) -> None:
        try:
            found = self._engine.engine(data)
        except (BackendError, UsageError):
            self.seen["refused"] += 1
            return
        except DiedError:
            # Unless it is ONNX Runtime, which gets a part of the file.
            try:
                self._reference.reference(data)
            except DiedError:
                self.seen["onnxruntime died"] += 1
                return
            except RefusedError:
                pass
            raise
        self.seen["ran" if found else "too large to run"] += 1
        try:
            wanted = self._reference.reference(data) if found else []
        except (RefusedError, DiedError):
            self.seen["ran alone"] += 1
            return
        if wanted:
            self._compare(found, wanted)

    def _compare(self, found: Sequence[Array], wanted: Sequence[Array]) -> None:
        assert [one.shape for one in found] == [one.shape for one in wanted]
        assert [one.dtype for one in found] == [one.dtype for one in wanted]
        for one, other in zip(found, wanted, strict=True):
            if other.dtype.kind != "f":
                assert np.array_equal(one, other)
                continue
            if not np.isfinite(other).all() or np.abs(other).max(initial=0) > _LARGEST:
                self.seen["not finite or huge"] += 1
                continue
            assert np.isfinite(one).all()
            worst = np.abs(one - other).max(initial=0) / max(1, np.abs(other).max(initial=0))
            assert worst < 1e-3, worst
        self.seen["agreed"] += 1


def main(seconds: float, seed: int) -> int:
    """Broken files for so long; prints those that must not be, in hexadecimal."""
    mutator, judge, failed = Mutator(seed, seeds()), Judge(), 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        data = mutator.next()
        judge.seen["files"] += 1
        if judge.seen["files"] % 10_000 == 0:
            print(dict(judge.seen), flush=True)
        try:
            judge.check(data)
        except (AssertionError, MoonError) as error:
            failed += 1
            kind = "escaped" if isinstance(error, EscapedError) else type(error).__name__
            print(kind, str(error)[-1500:], data.hex(), sep="\n", flush=True)
    print(dict(judge.seen), "failed", failed)
    judge.close()
    return failed


if __name__ == "__main__":
    sys.exit(bool(main(float(sys.argv[1]), int(sys.argv[2]))))
