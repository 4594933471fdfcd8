from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moon.bundle import Bundle
from moon.data.items import Source
from moon.data.load import data_sha256
from moon.data.source import open_source
from moon.errors import CalibrationError, DataError, UsageError
from moon.evaluation.metrics import auroc
from moon.runtime import choose, ood_sets
from moon.runtime.backend import open_backend
from moon.runtime.choose import choose_score, parts, smallest
from tests.bundles import images, make_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "tiny", calibrated=False)


def arrays(path: Path, pixels: np.ndarray, labels: np.ndarray | None = None) -> str:
    more = {} if labels is None else {"val_labels": labels}
    np.savez(path, val_images=pixels, **more)
    return f"{path}#val"


@pytest.fixture
def known(tmp_path: Path) -> str:
    return arrays(tmp_path / "known.npz", images(300, seed=11))


class Scores:
    """A backend whose scores are what a test says, as a function of each image's mean."""

    name = "onnxruntime"
    outputs = ()

    def __init__(self, given: dict[str, Callable[[np.ndarray], np.ndarray]]) -> None:
        self._given = given

    def run(self, batch: np.ndarray, threshold: float | None = None) -> dict[str, Any]:
        mean_N = (batch.reshape(len(batch), -1).mean(axis=1) * 0.25 + 0.5) * 255
        return {
            "label": (mean_N.astype(int) % 3).astype(np.int64),
            "logits": np.zeros((len(batch), 4), np.float32),
            **{f"score_{name}": f(mean_N).astype(np.float32) for name, f in self._given.items()},
        }

    def info(self) -> dict[str, Any]:
        return {}


def told(monkeypatch: pytest.MonkeyPatch, **given: Callable[[np.ndarray], np.ndarray]) -> None:
    every = {name: given.get(name, lambda m: 0 * m) for name in ("msp", "ebo", "mls", "unknown")}
    monkeypatch.setattr(choose, "open_backend", lambda *_, **__: Scores(every))


def levels(path: Path, low: int, high: int, n: int = 200) -> str:
    """Flat images of grey levels between two."""
    rng = np.random.default_rng(low)
    pixels = np.broadcast_to(rng.uniform(low, high, (n, 1, 1, 1)), (n, 8, 8, 1)).copy()
    # A stray pixel makes each image its own.
    pixels.reshape(n, -1)[np.arange(n), np.arange(n) % 64] += low % 7 + rng.uniform(0, 3, n)
    return arrays(path, pixels.astype(np.uint8))


def test_the_figures_are_those_of_the_metrics(bundle: Bundle, known: str, tmp_path: Path) -> None:
    ood = arrays(
        tmp_path / "ood.npz", np.random.default_rng(0).integers(0, 256, (90, 8, 8, 1), np.uint8)
    )
    choice = choose_score(bundle, known, ood=[ood])
    backend, pre = open_backend(bundle), bundle.preprocess
    one = backend.run(pre.normalise(images(300, seed=11)))
    other = backend.run(pre.normalise(np.load(tmp_path / "ood.npz")["val_images"]))
    expected = {n: auroc(one[f"score_{n}"], other[f"score_{n}"]) for n in bundle.manifest.scores}
    assert {c.score: c.auroc for c in choice.candidates} == pytest.approx(expected)
    assert {c.score: c.sets[ood] for c in choice.candidates} == pytest.approx(expected)
    figures = [c.auroc for c in choice.candidates]
    assert figures == sorted(figures, reverse=True)
    assert choice.n == 300 and choice.ood[0].group == "given" and choice.ood[0].n == 90
    assert choice.ood[0].data_sha256 == data_sha256(open_source(ood))
    assert choice.data_sha256 == choice.source_sha256 == data_sha256(open_source(known))
    assert choice == choose_score(bundle, known, ood=[open_source(ood)])


def test_made_images_weigh_near_and_far_alike(bundle: Bundle, known: str) -> None:
    choice = choose_score(bundle, known)
    assert {one.name for one in choice.ood} == {
        "noise",
        "blobs",
        "phase",
        "jigsaw",
        "mosaic",
        "blend",
    }
    for one in choice.candidates:
        groups = [
            np.mean([one.sets[s.name] for s in choice.ood if s.group == group and s.counted])
            for group in ("near", "far")
            if any(s.group == group and s.counted for s in choice.ood)
        ]
        assert one.auroc == pytest.approx(np.mean(groups))


def test_a_clear_winner_is_chosen_whatever_it_is(
    monkeypatch: pytest.MonkeyPatch, bundle: Bundle, tmp_path: Path
) -> None:
    told(monkeypatch, msp=lambda m: m, ebo=lambda m: np.sin(m), mls=lambda m: -m)
    dark, light = levels(tmp_path / "d.npz", 0, 60), levels(tmp_path / "l.npz", 100, 200)
    one = choose_score(bundle, light, ood=[dark])
    assert (one.score, one.candidates[0].auroc) == ("msp", 1.0)
    assert "msp has the highest AUROC on the out-of-distribution images given, 1.000" in one.reason
    assert choose_score(bundle, dark, ood=[light]).score == "mls"


def test_within_chance_the_present_score_stays_then_the_simplest_comes(
    monkeypatch: pytest.MonkeyPatch, bundle: Bundle, tmp_path: Path
) -> None:
    dark, light = levels(tmp_path / "d.npz", 0, 60), levels(tmp_path / "l.npz", 40, 200)
    # Nearly the same order of images, so nearly the same AUROC; msp is ahead by a hair.
    told(monkeypatch, msp=lambda m: m, ebo=lambda m: np.where(m > 199, 0, m), mls=lambda m: m)
    choice = choose_score(bundle, light, ood=[dark])
    assert choice.candidates[0].score == "msp" and choice.score == bundle.gate_score == "ebo"
    assert "but ebo may be as good" in choice.reason and "it is the present score" in choice.reason
    assert choose._complexity("msp") < choose._complexity("temperature") < choose._complexity("knn")


def test_scores_that_are_not_finite_are_left_out(
    monkeypatch: pytest.MonkeyPatch, bundle: Bundle, tmp_path: Path
) -> None:
    dark, light = levels(tmp_path / "d.npz", 0, 60), levels(tmp_path / "l.npz", 100, 200)
    told(
        monkeypatch,
        msp=lambda m: np.where(m < 30, np.nan, m),
        ebo=lambda m: np.where(m > 190, np.inf, m),
        mls=lambda m: m,
    )
    choice = choose_score(bundle, light, ood=[dark])
    assert choice.score == "mls" and set(choice.excluded) == {"msp", "ebo"}
    assert "in-distribution images are NaN or infinite" in choice.excluded["ebo"]
    assert "Left out: msp," in choice.reason
    told(monkeypatch, **{n: lambda m: m * np.nan for n in ("msp", "ebo", "mls", "unknown")})
    with pytest.raises(CalibrationError, match="no score that the bundle carries is finite"):
        choose_score(bundle, light, ood=[dark])


def test_one_score_alone_is_no_choice_but_is_chosen(
    monkeypatch: pytest.MonkeyPatch, bundle: Bundle, tmp_path: Path
) -> None:
    dark, light = levels(tmp_path / "d.npz", 0, 60), levels(tmp_path / "l.npz", 100, 200)
    bad = {n: (lambda m: m * np.nan) for n in ("ebo", "mls", "unknown")}
    told(monkeypatch, msp=lambda m: m, **bad)
    choice = choose_score(bundle, light, ood=[dark])
    assert choice.score == "msp" and "the only score to choose" in choice.reason


def test_sets_that_changed_places_are_noticed(
    monkeypatch: pytest.MonkeyPatch, bundle: Bundle, tmp_path: Path
) -> None:
    told(monkeypatch, **{n: lambda m: m for n in ("msp", "ebo", "mls", "unknown")})
    dark, light = levels(tmp_path / "d.npz", 0, 60), levels(tmp_path / "l.npz", 100, 200)
    with pytest.raises(CalibrationError, match=r"0\.000, where chance .*changed places"):
        choose_score(bundle, dark, ood=[light])


def test_no_better_than_chance_is_said(
    monkeypatch: pytest.MonkeyPatch, bundle: Bundle, tmp_path: Path
) -> None:
    told(monkeypatch)  # every score is 0
    dark, light = levels(tmp_path / "d.npz", 0, 60), levels(tmp_path / "l.npz", 100, 200)
    choice = choose_score(bundle, light, ood=[dark])
    assert choice.score == "ebo" and "not better than chance for certain" in choice.reason


def test_a_near_kind_that_nothing_tells_apart_does_not_count(
    monkeypatch: pytest.MonkeyPatch, bundle: Bundle, tmp_path: Path
) -> None:
    # The score sees only the mean, which a jigsaw keeps.
    rng = np.random.default_rng(3)
    pixels = (30 * rng.random((120, 8, 8, 1)) + rng.uniform(0, 20, (120, 1, 1, 1))).astype(np.uint8)
    told(monkeypatch, **{n: lambda m: -np.abs(m - 25) for n in ("msp", "ebo", "mls", "unknown")})
    choice = choose_score(bundle, arrays(tmp_path / "x.npz", pixels))
    counted = {one.name: one.counted for one in choice.ood}
    assert not counted["jigsaw"] and counted["noise"]
    assert "Not counted, as no score tells them from known images: jigsaw" in choice.reason
    far = [choice.candidates[0].sets[n] for n in ("noise", "blobs", "phase")]
    near = [
        choice.candidates[0].sets[n]
        for n in counted
        if n not in ("noise", "blobs", "phase") and counted[n]
    ]
    means = [np.mean(far)] + ([np.mean(near)] if near else [])
    assert choice.candidates[0].auroc == pytest.approx(np.mean(means))


def test_kinds_that_cannot_be_made_are_named(
    monkeypatch: pytest.MonkeyPatch, bundle: Bundle, tmp_path: Path
) -> None:
    told(monkeypatch, ebo=lambda m: -np.abs(m - 24))
    # All are predicted as class 0, so there are no two to mix.
    pixels = np.full((60, 8, 8, 1), 24, np.uint8)
    pixels[np.arange(60), np.arange(60) % 8, np.arange(60) // 8] = 27
    choice = choose_score(bundle, arrays(tmp_path / "x.npz", pixels))
    assert {one.name for one in choice.ood} <= {"noise", "blobs", "phase", "jigsaw"}
    assert "Not made, as most such images would be as before" in choice.reason
    assert "mosaic, blend" in choice.reason


def test_more_than_enough_images_are_sampled(
    monkeypatch: pytest.MonkeyPatch, bundle: Bundle, tmp_path: Path
) -> None:
    monkeypatch.setattr(ood_sets, "MOST", 50)
    known = arrays(tmp_path / "a.npz", images(80, seed=1))
    ood = arrays(tmp_path / "b.npz", 255 - images(70, seed=2))
    choice = choose_score(bundle, known, ood=[ood])
    assert (choice.n, choice.ood[0].n) == (50, 50)
    assert choice.data_sha256 == data_sha256(open_source(known), ood_sets.sample(80))
    assert choice.ood[0].data_sha256 == data_sha256(open_source(ood))  # of the whole set


def test_wrong_sets_are_refused(bundle: Bundle, known: str, tmp_path: Path) -> None:
    shared = np.concatenate([images(300, seed=11)[:7], 255 - images(20, seed=3)])
    mixed = arrays(tmp_path / "mixed.npz", shared)
    with pytest.raises(CalibrationError, match=r"7 of the 27 images .* are among the in-dist"):
        choose_score(bundle, known, ood=[mixed])
    with pytest.raises(DataError, match="the out-of-distribution set nothing holds no images"):
        choose_score(bundle, known, ood=[Source(spec="nothing", items=[])])
    with pytest.raises(DataError, match=r"the out-of-distribution set .* leaves nothing"):
        choose_score(bundle, known, ood=[f"{mixed}[0:0]"])
    with pytest.raises(DataError, match=r"holds 9 images, too few .*at least 10"):
        choose_score(bundle, known, ood=[f"{mixed}[10:19]"])
    with pytest.raises(DataError, match="the out-of-distribution set no/such/set"):
        choose_score(bundle, known, ood=["no/such/set"])
    with pytest.raises(UsageError, match="is given twice"):
        choose_score(bundle, known, ood=[mixed, mixed])
    with pytest.raises(CalibrationError, match=r"29 images are too few .*at least 30"):
        choose_score(bundle, open_source(known).select(np.arange(29)))


@pytest.mark.parametrize("n", [30, 49, 50, 151, 233, 1000, 9_999, 10_001, 60_000])
def test_parts_are_disjoint_fixed_and_of_the_promised_sizes(n: int) -> None:
    rows = np.arange(n) * 3 + 1
    choosing, calibrating = parts(rows)
    assert len(choosing) == min(2000, max(30, round(n / 5)))
    assert np.array_equal(np.sort(np.concatenate([choosing, calibrating])), rows)
    assert all(
        np.array_equal(a, b) for a, b in zip(parts(rows), (choosing, calibrating), strict=True)
    )
    assert (np.diff(choosing) > 0).all() and (np.diff(calibrating) > 0).all()


@pytest.mark.parametrize("fewest", [9, 19, 59, 120, 121, 999, 9_999])
def test_the_smallest_set_that_leaves_enough(fewest: int) -> None:
    n = smallest(fewest)
    assert len(parts(np.arange(n))[1]) >= fewest > len(parts(np.arange(n - 1))[1])


def test_a_source_need_not_be_a_string(bundle: Bundle) -> None:
    source = Source(spec="mine", items=list(images(60, seed=5)))
    other = Source(spec="theirs", items=list(255 - images(60, seed=6)))
    assert choose_score(bundle, source, ood=[other]).ood[0].name == "theirs"
