"""calibrate with the score auto: one part of the images chooses, the other calibrates."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moon.bundle import Bundle
from moon.data.fingerprint import TrainingSketch, pixel_fingerprint
from moon.data.items import Source
from moon.data.load import data_sha256
from moon.data.source import open_source
from moon.data.training_file import FittedSketch
from moon.errors import CalibrationError, UsageError
from moon.runtime.backend import open_backend
from moon.runtime.calibrate import calibrate
from moon.runtime.choose import choose_score, parts
from moon.runtime.trained import refuse_trained
from tests.bundles import images, make_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "tiny", calibrated=False)


@pytest.fixture
def known(tmp_path: Path) -> str:
    np.savez(tmp_path / "known.npz", val_images=images(400, seed=11), val_labels=np.arange(400) % 3)
    return f"{tmp_path / 'known.npz'}#val"


@pytest.fixture
def dark(tmp_path: Path) -> str:
    np.savez(tmp_path / "dark.npz", x_images=images(100, seed=5) // 8)
    return f"{tmp_path / 'dark.npz'}#x"


def test_the_choosing_images_do_not_calibrate(bundle: Bundle, known: str) -> None:
    source = open_source(known)
    choosing, calibrating = parts(np.arange(400))
    made = calibrate(bundle, known, score="auto")
    gate = made.gate()
    assert gate is not None and gate.choice is not None
    assert gate.choice.n == 80 and gate.n == 320
    assert gate.choice.data_sha256 == data_sha256(source, choosing)
    assert gate.choice.source_sha256 == data_sha256(source)
    assert gate.data_sha256 == data_sha256(source, calibrating)
    # As if the score had been named, and the other images given.
    blank = make_bundle(bundle.path.parent / "other", calibrated=False)
    named = calibrate(blank, source.select(calibrating), score=gate.score).gate()
    assert named is not None and named == replace(gate, choice=None)
    # As choose_score chooses, given those alone.
    blank = make_bundle(bundle.path.parent / "third", calibrated=False)
    alone = choose_score(blank, source.select(choosing))
    assert replace(gate.choice, source_sha256="") == replace(alone, source_sha256="")
    assert Bundle.open(bundle.path).gate() == gate


def test_the_choice_is_kept_in_the_bundle_and_named_sets_with_it(
    bundle: Bundle, known: str, dark: str
) -> None:
    made = calibrate(bundle, known, score="auto", ood=[dark])
    gate = made.gate()
    assert gate is not None and gate.choice is not None
    assert Bundle.open(bundle.path).gates["default"].choice == gate.choice
    (one,) = gate.choice.ood
    assert (one.name, one.group, one.n) == (dark, "given", 100)
    assert data_sha256(open_source(dark)) in gate.choice.used_sha256
    outputs = open_backend(made).run(made.preprocess.normalise(images(5)))
    assert np.array_equal(outputs["score"], outputs[f"score_{gate.score}"])


def test_a_later_calibration_by_the_same_score_remembers_the_choice(
    bundle: Bundle, known: str, tmp_path: Path
) -> None:
    first = calibrate(bundle, known, score="auto")
    chosen = first.gate()
    assert chosen is not None
    np.savez(tmp_path / "new.npz", v_images=images(100, seed=77))
    again = calibrate(first, f"{tmp_path / 'new.npz'}#v").gate()
    assert again is not None and again.choice == chosen.choice
    said: list[str] = []
    calibrate(bundle.path, known, warn=said.append)
    assert len(said) == 1 and "chosen by some of these very images" in said[0]
    other = next(name for name in first.manifest.scores if name != chosen.score)
    gate = calibrate(bundle.path, known, score=other).gate()
    assert gate is not None and gate.choice is None


@pytest.mark.parametrize(
    ("arguments", "smallest"),
    [
        ({}, 49),  # 30 to choose by, 19 to calibrate by
        ({"method": "pac"}, 89),
        ({"reject": 0.01}, 129),
        ({"method": "risk", "risk": 0.1}, 87),
    ],
)
def test_too_few_are_refused_by_the_smallest_number_that_would_do(
    bundle: Bundle, known: str, arguments: dict[str, object], smallest: int
) -> None:
    with pytest.raises(CalibrationError) as raised:
        calibrate(bundle, known, score="auto", limit=40, **arguments)  # type: ignore[arg-type]
    found = re.search(r"Use at least (\d+) held-out images", str(raised.value))
    assert found is not None and int(found[1]) == smallest
    with pytest.raises(CalibrationError, match=f"at least {smallest}"):
        calibrate(bundle, known, score="auto", limit=smallest - 1, **arguments)  # type: ignore[arg-type]
    if "risk" not in arguments:
        gate = calibrate(bundle, known, score="auto", limit=smallest, **arguments).gate()  # type: ignore[arg-type]
        assert gate is not None and gate.k == 1


def test_the_split_knows_nothing_of_labels(bundle: Bundle) -> None:
    """A split by class would leave rare classes more often in one part than in the other."""
    items = list(images(100, seed=1))
    gates = []
    for labels in (None, np.arange(100) % 3, np.minimum(np.arange(100), 2)):
        source = Source(spec="x", items=items, labels=labels)
        gates.append(calibrate(bundle.path, source, score="auto").gate())
    assert all(gate is not None and gate.n == 70 for gate in gates)
    assert len({gate.scores for gate in gates if gate is not None}) == 1


def test_out_of_distribution_images_among_the_calibrating_ones_are_found(
    bundle: Bundle, known: str
) -> None:
    _, calibrating = parts(np.arange(400))
    shared = Source(
        spec="mixed",
        items=[*(images(60, seed=5) // 8), *images(400, seed=11)[calibrating[:3]]],
    )
    with pytest.raises(CalibrationError, match=r"3 of the 63 images looked at .* set mixed"):
        calibrate(bundle, known, score="auto", ood=[shared])
    assert Bundle.open(bundle.path).gate() is None


def test_wrong_use_is_refused_before_anything_is_read(bundle: Bundle, known: str) -> None:
    with pytest.raises(UsageError, match=r"only for choosing a score.*Add --score auto"):
        calibrate(bundle, known, ood=["no/such"])
    with pytest.raises(UsageError, match="none to choose"):
        calibrate(bundle, "no/such", score="auto", backend="fake")


def test_gates_of_other_backends_that_are_lost_are_named(bundle: Bundle, known: str) -> None:
    said: list[str] = []
    calibrate(bundle.path, known, warn=said.append)
    calibrate(bundle.path, known, backend="fake", warn=said.append)
    calibrate(bundle.path, known, reject=0.1, warn=said.append)  # the same score: it stays
    assert not said and set(Bundle.open(bundle.path).gates) == {"default", "fake"}
    made = calibrate(bundle.path, known, score="msp", warn=said.append)
    assert set(made.gates) == {"default"}
    assert said == [
        "the gate of fake alone was by another score than msp and is gone: "
        "calibrate again with --backend where it is needed"
    ]
    with pytest.warns(UserWarning, match="the gate of fake alone"):
        calibrate(made, known, score="msp", backend="fake")
        calibrate(bundle.path, known, score="mls")


def sketched(bundle: Bundle, pixels: np.ndarray, of: int | None = None) -> Bundle:
    prints = np.sort(np.array([pixel_fingerprint(one) for one in pixels], np.uint64))
    return replace(bundle, training=TrainingSketch(images=of or len(prints), fingerprints=prints))


def test_training_images_cannot_choose_either(bundle: Bundle, known: str) -> None:
    """Those trained on are all in the part that chooses, a fifth."""
    choosing, _ = parts(np.arange(400))
    trained = sketched(bundle, images(400, seed=11)[choosing])
    with pytest.raises(CalibrationError, match=r"80 of the 80 choosing .* so no choice"):
        calibrate(trained, known, score="auto")
    with pytest.raises(CalibrationError, match=r"80 of the 400 choosing .* so no choice"):
        choose_score(trained, known)
    stray = sketched(bundle, images(400, seed=11)[choosing[:1]])
    with pytest.warns(UserWarning, match="1 of the 400 choosing images"):
        choose_score(stray, known)
    said: list[str] = []
    calibrate(stray, known, score="auto", warn=said.append)
    assert len(said) == 1 and said[0].startswith("1 of the 80 choosing images")


def fitted(bundle: Bundle, pixels: np.ndarray, *scores: str, of: int | None = None) -> Bundle:
    known = sketched(bundle, pixels, of).training
    assert known is not None
    return replace(bundle, fitted=(FittedSketch(scores, known),))


def test_a_score_is_not_calibrated_by_images_it_was_fitted_to(bundle: Bundle, known: str) -> None:
    pixels = images(400, seed=11)
    half = fitted(bundle, pixels[:200], "mls")
    with pytest.raises(CalibrationError, match=r"mls was fitted to 200 of the 400 .* no promise"):
        calibrate(half, known, score="mls")
    sampled = fitted(bundle, np.concatenate([pixels[::100], images(16, seed=9)]), "mls", of=2000)
    with pytest.raises(CalibrationError, match=r"fitted to 4 .*an estimated 400 in all"):
        calibrate(sampled, known, score="mls")
    said: list[str] = []
    stray = calibrate(fitted(bundle, pixels[:4], "mls"), known, score="mls", warn=said.append)
    assert len(said) == 1 and "fitted to 4 of the 400" in said[0]
    assert Bundle.open(stray.path).fitted == stray.fitted != ()
    clean: list[str] = []
    for score, others in (("msp", pixels[:200]), ("mls", images(200, seed=9))):
        again = fitted(Bundle.open(bundle.path), others, "mls")
        calibrate(again, known, score=score, warn=clean.append)
    assert not clean, "another score, or other images"


def test_a_score_fitted_to_the_choosing_images_is_no_candidate(bundle: Bundle, known: str) -> None:
    best = calibrate(bundle, known, score="auto").gate()
    assert best is not None and best.choice is not None
    blank = make_bundle(bundle.path.parent / "other", calibrated=False)
    gate = calibrate(fitted(blank, images(400, seed=11), best.score), known, score="auto").gate()
    assert gate is not None and gate.choice is not None
    assert gate.choice.excluded == {best.score: "fitted to 80 of these 80 images"}
    assert gate.score != best.score
    assert f"Left out: {best.score}, fitted to 80" in gate.choice.reason


def test_training_images_cannot_calibrate(bundle: Bundle, known: str) -> None:
    trained = sketched(bundle, images(400, seed=11)[:200])
    with pytest.raises(CalibrationError, match=r"200 of the 400 .* were trained on, so no promise"):
        calibrate(trained, known)
    assert Bundle.open(bundle.path).gate() is None


def test_a_sample_of_them_is_enough_to_tell(bundle: Bundle, known: str) -> None:
    # 20 of 2,000 training images are known, and 4 of those are given: some 400 of 400.
    pixels = np.concatenate([images(400, seed=11)[::100], images(16, seed=99)])
    with pytest.raises(CalibrationError, match="an estimated 400 in all"):
        calibrate(sketched(bundle, pixels, of=2000), known)


def test_stray_duplicates_only_warn(bundle: Bundle, known: str) -> None:
    said: list[str] = []
    pixels = np.concatenate([images(400, seed=11)[:4], images(196, seed=99)])
    gate = calibrate(sketched(bundle, pixels), known, warn=said.append).gate()
    assert gate is not None and gate.n == 400
    assert len(said) == 1 and said[0].startswith("4 of the 400 calibration images")
    clean: list[str] = []
    calibrate(sketched(Bundle.open(bundle.path), images(200, seed=99)), known, warn=clean.append)
    assert not clean


def test_duplicates_up_to_a_share_are_hardly_ever_refused(bundle: Bundle) -> None:
    """1% of the images are duplicates; the sample holds half of what was trained on."""
    rng = np.random.default_rng(0)
    trained = np.arange(2000, dtype=np.uint64)
    refused = 0
    for _ in range(300):
        sample = np.sort(rng.choice(trained, 1000, replace=False))
        seen = np.concatenate([rng.choice(trained, 10, replace=False), 10_000 + trained[:990]])
        known = replace(bundle, training=TrainingSketch(images=2000, fingerprints=sample))
        try:
            refuse_trained(known, "x", seen, lambda _: None)
        except CalibrationError:
            refused += 1
    assert refused <= 3
