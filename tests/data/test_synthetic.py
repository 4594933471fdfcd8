from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moon.data.synthetic import FAR, KINDS, NEAR, make_ood
from moon.errors import DataError, UsageError


def photos(n: int = 40, height: int = 16, width: int = 16, channels: int = 1) -> np.ndarray:
    """Random smooth images with a bright spot, unlike each other."""
    rng = np.random.default_rng(5)
    y, x = np.mgrid[:height, :width]
    at = rng.uniform(0, 1, (n, 2)) * (height, width)
    spread = rng.uniform(0.1, 0.4, n) * max(height, width)
    squared = (y - at[:, 0, None, None]) ** 2 + (x - at[:, 1, None, None]) ** 2
    spot = np.exp(-squared / (2 * spread[:, None, None] ** 2))
    colours = rng.uniform(60, 255, (n, 1, 1, channels))
    return (spot[..., None] * colours).astype(np.uint8)


LABELS = np.arange(40) % 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (32, 32, 3), (17, 5, 3), (224, 30, 3)])
def test_every_kind_makes_images_of_any_shape(kind: str, shape: tuple[int, int, int]) -> None:
    pixels = photos(8, *shape)
    made = make_ood(kind, pixels, LABELS[:8])
    assert made.pixels.dtype == np.uint8 and made.pixels.shape[1:] == shape
    assert len(made.pixels) == len(made.rows) >= 4
    assert (np.diff(made.rows) > 0).all()
    assert np.array_equal(pixels, photos(8, *shape))  # what was given stays as it was


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides(kind: str) -> None:
    one, same, other = (make_ood(kind, photos(), LABELS, seed=s).pixels for s in (3, 3, 4))
    assert np.array_equal(one, same)
    assert one.shape != other.shape or not np.array_equal(one, other)


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 24),
    width=st.integers(1, 24),
    channels=st.sampled_from([1, 3]),
    kind=st.sampled_from(KINDS),
    n=st.integers(1, 6),
)
def test_no_shape_breaks_a_kind(height: int, width: int, channels: int, kind: str, n: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (n, height, width, channels), np.uint8)
    made = make_ood(kind, pixels, np.arange(n) % 2)
    assert made.pixels.shape[1:] == pixels.shape[1:] and made.pixels.dtype == np.uint8


def test_a_jigsaw_keeps_every_pixel_and_leaves_no_piece_in_place() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    (made,) = make_ood("jigsaw", pixels, [0]).pixels
    assert np.array_equal(np.sort(made.ravel()), np.arange(256))
    pieces = made.reshape(4, 4, 4, 4).swapaxes(1, 2)
    before = pixels[0].reshape(4, 4, 4, 4).swapaxes(1, 2)
    assert not any(np.array_equal(pieces[i, j], before[i, j]) for i in range(4) for j in range(4))


def test_phase_keeps_mean_and_spectrum_and_moves_everything() -> None:
    # Grey enough that nothing is clipped.
    rng = np.random.default_rng(1)
    pixels = np.clip(rng.normal(128, 12, (3, 32, 32, 3)), 0, 255).astype(np.uint8)
    made = make_ood("phase", pixels, [0, 0, 0])
    for one, other in zip(pixels, made.pixels, strict=True):
        before = np.abs(np.fft.fft2(one.astype(float), axes=(0, 1)))
        after = np.abs(np.fft.fft2(other.astype(float), axes=(0, 1)))
        assert after == pytest.approx(before, abs=60)  # rounding to whole levels: 1024 x 0.3
        assert np.corrcoef(before.ravel()[3:], after.ravel()[3:])[0, 1] > 0.99
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.2


@pytest.mark.parametrize("kind", ["mosaic", "blend"])
def test_only_images_predicted_differently_are_mixed(kind: str) -> None:
    # Each class has one grey level, so what is mixed can be read off.
    labels = np.repeat([0, 1, 2], [30, 5, 1])
    levels = np.array([40, 100, 220], np.uint8)
    pixels = np.broadcast_to(levels[labels, None, None, None], (36, 16, 16, 1)).copy()
    made = make_ood(kind, pixels, labels)
    assert made.rows.tolist() == list(range(36))
    found = set()
    for row, image in zip(made.rows, made.pixels, strict=True):
        if kind == "blend":
            (level,) = np.unique(image)
            partner = int(np.argmin(np.abs((levels[labels[row]] + levels.astype(int)) / 2 - level)))
        else:
            values, counts = np.unique(image, return_counts=True)
            assert counts.tolist() == [128, 128]
            (partner,) = (i for i in range(3) if levels[i] in values and i != labels[row])
        found.add((int(labels[row]), partner))
    assert found <= {(a, b) for a in range(3) for b in range(3) if a != b}
    assert {(1, 0), (0, 1)} <= found


@pytest.mark.parametrize("kind", ["mosaic", "blend"])
def test_one_predicted_class_cannot_be_mixed(kind: str) -> None:
    assert not len(make_ood(kind, photos(), np.zeros(40, int)).pixels)


@pytest.mark.parametrize("kind", ["phase", *NEAR])
def test_what_a_kind_leaves_as_it_was_is_dropped(kind: str) -> None:
    flat = np.full((4, 16, 16, 3), 90, np.uint8)
    pixels = np.concatenate([flat, photos(4, channels=3)])
    labels = np.array([0, 1, 0, 1, 0, 1, 0, 1])
    alone = make_ood(kind, flat, labels[:4])
    assert not len(alone.rows)  # turned, taken apart or mixed with another, flat stays flat
    if kind in ("phase", "jigsaw"):
        assert make_ood(kind, pixels, labels).rows.tolist() == [4, 5, 6, 7]


def test_far_kinds_share_nothing_with_the_images() -> None:
    for kind in ("noise", "blobs"):
        light, dark = photos(), 255 - photos()
        assert np.array_equal(
            make_ood(kind, light, LABELS).pixels, make_ood(kind, dark, LABELS).pixels
        )
    assert set(FAR) | set(NEAR) == set(KINDS) and not set(FAR) & set(NEAR)


def test_blobs_are_smooth_and_span_the_range() -> None:
    made = make_ood("blobs", photos(20, 32, 32), LABELS[:20]).pixels.astype(int)
    assert (made.min((1, 2, 3)) == 0).all() and (made.max((1, 2, 3)) == 255).all()
    assert np.abs(np.diff(made, axis=1)).max() < 70


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(UsageError, match="no kind 'cats'"):
        make_ood("cats", photos(), LABELS)
    with pytest.raises(DataError, match="expected uint8 images"):
        make_ood("noise", photos().astype(np.float32), LABELS)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="expected uint8 images"):
        make_ood("noise", photos()[:0], LABELS[:0])
    with pytest.raises(DataError, match=r"40 images have predictions \[39\]"):
        make_ood("blend", photos(), LABELS[:39])
