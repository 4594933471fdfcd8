"""Zstandard, bounded: what a file claims never decides how much memory is taken.

For files whose bytes are mostly zeros or metadata, such as TensorRT engines, which hold dense
weights. A bundle's own files are small already (docs/formats.md has the figures).
"""

from __future__ import annotations

from typing import Any

from moon.errors import BundleError, MissingExtraError

__all__ = ["compress", "decompress"]

_CHUNK = 1 << 20
# A frame may ask for a window of up to 3.75 TB; level 19 on data of any size asks for 8 MiB.
_LARGEST_WINDOW = 1 << 27


def compress(data: bytes, *, level: int = 19) -> bytes:
    """One frame, with its size and checksum.

    Args:
        data: of any size.
        level: 1 (fast) to 19; decompression is as fast after any.

    Raises:
        MissingExtraError: zstandard is not installed.
    """
    zstandard = _package("compressing a file")
    compressor = zstandard.ZstdCompressor(level=level, write_checksum=True)
    compressed: bytes = compressor.compress(data)
    return compressed


def decompress(data: bytes, *, size: int, name: str) -> bytes:
    """The bytes again; no more than ``size`` are ever made, however much the frame would give.

    Memory grows with what really comes out, and not with ``size`` or the frame's own claim.

    Args:
        data: one frame.
        size: of the result, as recorded elsewhere.
        name: of the file, for errors.

    Raises:
        BundleError: damaged, not zstd, of another size, or it asks for a window over 128 MiB.
        MissingExtraError: zstandard is not installed.
    """
    zstandard = _package(f"decompressing {name}")
    remedy = "Make the file again"
    plain = bytearray()
    try:
        limited = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
        with limited.stream_reader(data, read_across_frames=False) as reader:
            while len(plain) <= size and (chunk := reader.read(min(_CHUNK, size + 1 - len(plain)))):
                plain += chunk
    except zstandard.ZstdError as error:
        raise BundleError(f"{name} cannot be decompressed: {error}", remedy=remedy) from error
    except MemoryError as error:
        raise BundleError(f"{name} does not fit in memory, decompressed", remedy="") from error
    if len(plain) != size:
        more = "more" if len(plain) > size else f"{len(plain):,}"
        raise BundleError(
            f"{name} decompresses to {more} bytes, not the {size:,} recorded", remedy=remedy
        )
    return bytes(plain)


def _package(purpose: str) -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise MissingExtraError("zstandard", "trt", purpose) from error
    return zstandard
