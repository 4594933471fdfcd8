from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moon.errors import BundleError, MissingExtraError
from moon.zstd import compress, decompress

zstandard = pytest.importorskip("zstandard")


@settings(deadline=None, max_examples=30)
@given(st.binary(max_size=3000), st.integers(0, 400), st.integers(1, 19))
def test_what_is_compressed_comes_back(part: bytes, times: int, level: int) -> None:
    data = part * times
    packed = compress(data, level=level)
    assert decompress(packed, size=len(data), name="e") == data


def test_zeros_cost_nothing() -> None:
    data = bytes(4_000_000)
    packed = compress(data)
    assert len(packed) < 1000
    assert decompress(packed, size=len(data), name="e") == data


@pytest.mark.parametrize(
    ("size", "said"), [(999, "to more bytes, not the 999"), (1001, "to 1,000 bytes, not the 1,001")]
)
def test_another_size_than_recorded_is_refused(size: int, said: str) -> None:
    with pytest.raises(BundleError, match=f"engine.zst decompresses {said} recorded"):
        decompress(compress(bytes(1000)), size=size, name="engine.zst")


def test_every_flipped_byte_is_noticed_or_harmless() -> None:
    data = bytes(range(256)) * 4
    packed = compress(data)
    for i in range(len(packed)):
        hurt = bytearray(packed)
        hurt[i] ^= 0x55
        try:
            assert decompress(bytes(hurt), size=len(data), name="e") == data
        except BundleError as error:
            assert str(error).startswith("e ")


@pytest.mark.parametrize("data", [b"", b"no zstd at all", compress(b"x" * 5000)[:-6]])
def test_what_is_damaged_is_refused(data: bytes) -> None:
    with pytest.raises(BundleError, match=r"^e (cannot be decompressed|decompresses to)"):
        decompress(data, size=5000, name="e")


def test_a_bomb_takes_no_memory() -> None:
    """268 MB of zeros in 8 KB, in a process that may not have 200 MB more."""
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 28))
    assert len(bomb) < 50_000
    code = (
        "import resource, sys, zstandard\n"
        "from moon.errors import BundleError\n"
        "from moon.zstd import decompress\n"
        "data = sys.stdin.buffer.read()\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 200_000_000,) * 2)\n"
        "for size in (1000, 50_000_000, 1 << 50):\n"
        "    try:\n"
        "        decompress(data, size=size, name='bomb')\n"
        "    except BundleError as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], input=bomb, capture_output=True, check=True)
    lines = done.stdout.decode().splitlines()
    assert lines[0].startswith("bomb decompresses to more bytes, not the 1,000 recorded")
    assert lines[1].startswith("bomb decompresses to more bytes, not the 50,000,000 recorded")
    assert lines[2].startswith("bomb does not fit in memory")


def test_a_window_larger_than_anything_needs_is_refused() -> None:
    options = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    # The size unknown, so that the window is not narrowed to the data.
    writer = zstandard.ZstdCompressor(compression_params=options).compressobj()
    packed = writer.compress(bytes(5000)) + writer.flush()
    with pytest.raises(BundleError, match="e cannot be decompressed"):
        decompress(packed, size=5000, name="e")


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(MissingExtraError, match=r"decompressing e needs .*zstandard.*\[trt\]"):
        decompress(b"", size=0, name="e")
