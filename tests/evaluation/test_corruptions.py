"""Corruptions: the published constants, the published formulas, and the same result always."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from moon.errors import UsageError
from moon.evaluation.corruptions import CORRUPTIONS, STRENGTHS, constant, corrupt, reencoded
from tests.bundles import images


@pytest.fixture(scope="module", params=[(28, 1), (32, 3)])
def pixels(request):
    size, channels = request.param
    return images(12, size, channels, seed=3)


@pytest.mark.parametrize(
    ("kind", "at_32", "at_224"),
    [
        ("noise", (0.04, 0.10), (0.08, 0.38)),
        ("blur", (0.4, 1.0), (1.0, 6.0)),
        ("jpeg", (80, 40), (25, 7)),
        ("brightness", (0.05, 0.3), (0.1, 0.5)),
        ("contrast", (0.75, 0.15), (0.4, 0.05)),
    ],
)
def test_the_constants_are_the_published_ones_and_lie_between_them_between(kind, at_32, at_224):
    for side, table in ((8, at_32), (32, at_32), (224, at_224), (448, at_224)):
        found = constant(kind, 1, side), constant(kind, 5, side)
        assert found == pytest.approx(table)
    for strength in STRENGTHS:
        ends = sorted((constant(kind, strength, 32), constant(kind, strength, 224)))
        assert ends[0] < constant(kind, strength, 84) < ends[1]


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_it_is_the_same_again_in_any_batch_and_grows_with_strength(kind, pixels):
    before = pixels.copy()
    far = []
    for strength in STRENGTHS:
        worse = corrupt(pixels, kind, strength)
        assert worse.shape == pixels.shape
        assert worse.dtype == np.uint8
        cut = [corrupt(pixels[a:b], kind, strength, first=a) for a, b in ((0, 5), (5, 6), (6, 12))]
        assert np.array_equal(np.concatenate(cut), worse)
        far.append(np.abs(worse.astype(float) - pixels).mean())
    assert (pixels == before).all()
    assert far == sorted(far)
    assert far[0] > 0


def test_noise_has_the_stated_spread_and_differs_between_images():
    grey = np.full((40, 32, 32, 1), 128, np.uint8)
    noisy = corrupt(grey, "noise", 5).astype(float) - 128
    assert noisy.std() == pytest.approx(255 * 0.10, rel=0.02)
    assert abs(noisy.mean()) < 0.5
    assert not np.array_equal(noisy[0], noisy[1])


@pytest.mark.parametrize("strength", STRENGTHS)
def test_blur_is_scipys_gaussian(pixels, strength):
    sigma = constant("blur", strength, pixels.shape[1])
    expected = gaussian_filter(
        pixels.astype(float), sigma=(0, sigma, sigma, 0), mode="nearest", radius=(
            0, int(np.ceil(4 * sigma)), int(np.ceil(4 * sigma)), 0),
    )  # fmt: skip
    found = corrupt(pixels, "blur", strength).astype(float)
    assert np.abs(found - expected).max() <= 0.51


def test_brightness_adds_to_the_value_and_keeps_the_hue():
    colours = np.array([[[200, 100, 50], [0, 0, 0], [255, 10, 0]]], np.uint8)[None]
    bright = corrupt(colours, "brightness", 5)[0, 0]  # 0.3 of 255 is 76.5
    assert bright[0].tolist() == [255, 128, 64]
    assert bright[1].tolist() == [76, 76, 76]
    assert bright[2].tolist() == [255, 10, 0]
    grey = np.array([[[[10], [250]]]], np.uint8)
    assert corrupt(grey, "brightness", 1).ravel().tolist() == [23, 255]  # 0.05 of 255 is 12.75


def test_contrast_draws_to_the_mean():
    halves = np.array([[[[0], [200]]]], np.uint8)
    assert corrupt(halves, "contrast", 2).ravel().tolist() == [50, 150]


def test_jpeg_halves_the_colour_and_keeps_the_shape(pixels):
    again = corrupt(pixels, "jpeg", 5)
    assert np.array_equal(again[3], reencoded(pixels[3], 40))
    assert np.abs(again.astype(float) - pixels).mean() < 60
    red = np.zeros((16, 16, 3), np.uint8)
    red[:, 8:9, 0] = 255  # one column of red: at half resolution it bleeds into its neighbour
    assert reencoded(red, 100)[8, 9, 0] > 20


@pytest.mark.parametrize(("kind", "strength"), [("snow", 1), ("noise", 0), ("noise", 6)])
def test_misuse_is_named(pixels, kind, strength):
    with pytest.raises(UsageError, match="there is no corruption"):
        corrupt(pixels, kind, strength)
