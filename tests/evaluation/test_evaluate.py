"""evaluate() on tiny real bundles: every figure checked against a computation of its own."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moon.data.items import Source
from moon.errors import DataError, ImageError, UsageError
from moon.evaluation.evaluate import evaluate
from moon.evaluation.metrics import auroc
from moon.evaluation.observe import sample
from moon.runtime.predictor import Predictor
from moon.scores import SCORES
from tests.bundles import CLASSES, images, make_bundle

N = 150


def arrays(seed, n=N, *, labels=True, names=CLASSES, shift=0):
    pixels = np.clip(images(n, seed=seed).astype(int) + shift, 0, 255).astype(np.uint8)
    given = np.random.default_rng(seed).integers(3, size=n) if labels else None
    return Source(
        spec=f"drawn{seed}",
        items=list(pixels),
        labels=given,
        class_names=names if labels else None,
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundles") / "tiny", reject=0.2)


def outputs_of(bundle, source):
    return Predictor.open(bundle).raw(np.stack([source.item(i) for i in range(len(source))]))


def test_every_figure_equals_its_own_computation(bundle):
    known, near, far = arrays(1), arrays(2, labels=False), arrays(3, labels=False, shift=90)
    plain = evaluate(
        bundle, id=known, near={"n": near}, far={"f": far}, batch_size=17, resamples=20
    ).to_json()
    out = {"id": outputs_of(bundle, known), "n": outputs_of(bundle, near),
           "f": outputs_of(bundle, far)}  # fmt: skip
    right = out["id"]["label"] == known.labels
    assert plain["id"]["n"] == N
    assert plain["id"]["accuracy"] == right.mean()
    assert set(plain["scores"]) == set(bundle.manifest.scores)
    for name in plain["scores"]:
        values = {k: SCORES[name](o["logits"], len(CLASSES)) for k, o in out.items()}
        for group, member in (("near", "n"), ("far", "f")):
            found = plain["scores"][name][group]
            assert found["auroc"] == found["sets"][member]["auroc"]
            assert found["auroc"] == pytest.approx(auroc(values["id"], values[member]), abs=1e-3)
            low, high = found["sets"][member]["auroc_ci95"]
            assert low <= found["auroc"] <= high
    gate, kept = plain["gate"], out["id"]["accept"]
    assert 0 < kept.mean() < 1
    assert gate["id"]["accept"] == kept.mean()
    assert gate["id"]["accuracy"] == right[kept].mean()
    assert gate["near"]["reject"] == (~out["n"]["accept"]).mean()
    assert gate["far"]["sets"]["f"]["reject"] == (~out["f"]["accept"]).mean()
    assert gate["threshold"] == bundle.gate().threshold
    layers = bundle.manifest.sparsity.layers.values()
    assert plain["model"]["nonzeros"] == sum(layer.nonzeros for layer in layers)
    assert plain["model"]["sparsity"] == bundle.manifest.sparsity.share
    assert plain["backend"]["name"] == "onnxruntime"


def test_the_batch_size_changes_nothing(bundle):
    known, far = arrays(1), arrays(3)
    reports = [
        evaluate(bundle, id=known, far={"f": far}, batch_size=size, resamples=0).to_json()
        for size in (1, 64)
    ]
    one, other = reports
    assert one["gate"] == other["gate"]
    assert one["id"]["accuracy"] == other["id"]["accuracy"]
    assert one["id"]["ece"] == pytest.approx(other["id"]["ece"], abs=1e-6)
    for name in one["scores"]:
        aurocs = [plain["scores"][name]["far"]["auroc"] for plain in reports]
        assert aurocs[0] == pytest.approx(aurocs[1], abs=1e-3)


def test_images_are_never_all_in_memory(bundle, monkeypatch):
    fetched, ahead = [0], [0]

    class Lazy:
        def __len__(self):
            return 600

        def __getitem__(self, index):
            fetched[0] += 1
            return images(1, seed=index)[0]

    plain_raw, run = Predictor.raw, [0]

    def counting(self, pixels):
        run[0] += len(pixels)
        assert len(pixels) <= 20
        ahead[0] = max(ahead[0], fetched[0] - run[0])
        return plain_raw(self, pixels)

    monkeypatch.setattr(Predictor, "raw", counting)
    source = Source(spec="lazy", items=Lazy())
    report = evaluate(bundle, id=source, batch_size=20, resamples=0, corruptions=0)
    assert report.bundles[0].id["n"] == 600
    assert run[0] == 600
    assert ahead[0] <= 3 * 20


def test_an_uncalibrated_bundle_is_measured_without_a_gate(tmp_path):
    bare = make_bundle(tmp_path / "bare", calibrated=False)
    plain = evaluate(bare, id=arrays(1), near={"n": arrays(2, labels=False)}).to_json()
    assert plain["gate"] is None
    assert plain["verdict"].startswith("Not calibrated")
    assert any("not calibrated" in said for said in plain["warnings"])
    assert plain["scores"]["ebo"]["near"]["auroc"] > 0


def test_several_bundles_side_by_side_and_written(bundle, tmp_path):
    other = make_bundle(tmp_path / "other", seed=5, unknown=False)
    ticks = []
    report = evaluate(
        [bundle, str(other.path)],
        id=arrays(1),
        far={"f": arrays(2, labels=False)},
        scores=["msp", "ebo"],
        out=tmp_path / "out",
        resamples=10,
        corruptions=0,
        progress=lambda done, total, what: ticks.append((done, total, what)),
    )
    plain = json.loads((tmp_path / "out" / "report.json").read_text())
    assert plain == json.loads(json.dumps(report.to_json()))
    assert set(plain["scores"]) == {"msp", "ebo"}
    assert plain["compared"][0]["model"]["path"] == str(other.path)
    assert "2 bundles side by side" in (tmp_path / "out" / "report.html").read_text()
    assert ticks[-1] == (4 * N, 4 * N, "evaluating f")
    assert [done for done, _, _ in ticks] == sorted(done for done, _, _ in ticks)


def test_without_labels_accuracy_is_unknown_not_wrong(bundle):
    plain = evaluate(bundle, id=arrays(1, labels=False), far={"f": arrays(2)}).to_json()
    assert plain["id"]["accuracy"] is None
    assert plain["id"]["ece"] is None
    assert plain["gate"]["id"]["accuracy"] is None
    assert any("no labels" in said for said in plain["warnings"])


def test_unlabelled_items_are_left_out_of_accuracy_only(bundle):
    known = arrays(1)
    known.labels[:100] = -1
    plain = evaluate(bundle, id=known).to_json()
    right = outputs_of(bundle, known)["label"][100:] == known.labels[100:]
    assert plain["id"]["n"] == N
    assert plain["id"]["labelled"] == 50
    assert plain["id"]["accuracy"] == right.mean()


def test_labels_are_matched_by_name(bundle):
    known = arrays(1)
    turned = Source(
        spec="turned", items=known.items, labels=2 - known.labels, class_names=CLASSES[::-1]
    )
    one, two = (evaluate(bundle, id=s, resamples=0).to_json()["id"] for s in (known, turned))
    assert one == two


def test_unknown_classes_in_the_known_set_are_refused(bundle):
    with pytest.raises(DataError, match=r"classes the bundle does not know \(fox\)"):
        evaluate(bundle, id=arrays(1, names=("cat", "dog", "fox")))


def test_known_classes_in_an_unknown_set_are_warned_of(bundle):
    far = arrays(2, names=("cat", "plane", "ship"))
    plain = evaluate(bundle, id=arrays(1), far={"f": far}, resamples=0).to_json()
    cats = int((far.labels == 0).sum())
    assert any(f"f: {cats} of {N} images" in said for said in plain["warnings"])


def test_a_limit_draws_from_all_of_a_set():
    source = Source(spec="s", items=list(range(1000)))
    drawn = sample(source, 100)
    assert len(set(drawn.tolist())) == 100
    assert drawn.max() > 900
    assert (np.diff(drawn) > 0).all()
    assert (sample(source, 100) == drawn).all()
    assert len(sample(source, 5000)) == len(sample(source, None)) == 1000


def test_the_limit_applies_to_every_set(bundle):
    plain = evaluate(bundle, id=arrays(1), far={"f": arrays(2)}, limit=30, resamples=0).to_json()
    assert plain["id"]["n"] == plain["gate"]["far"]["sets"]["f"]["n"] == 30
    assert plain["sets"]["far"]["f"] == {"source": "drawn2", "n": 30, "of": N}


def test_a_score_that_is_the_wrong_way_round_is_warned_of(bundle):
    pixels = images(400, seed=4)
    ranked = Predictor.open(bundle).raw(pixels)["score_ebo"].argsort()
    low, high = (Source(spec="s", items=list(pixels[r])) for r in (ranked[:200], ranked[200:]))
    said = evaluate(bundle, id=low, far={"f": high}, resamples=0).bundles[0].warnings
    assert any("ranks it above the known images (AUROC 0.0%)" in warning for warning in said)
    said = evaluate(bundle, id=high, far={"f": low}, resamples=0).bundles[0].warnings
    assert not any("ranks it above" in warning for warning in said)


def test_images_unlike_the_calibration_are_warned_of(bundle):
    levels = np.stack([np.full((8, 8, 1), level, np.uint8) for level in range(256)])
    accepted = Predictor.open(bundle).raw(levels)["accept"]
    assert accepted.any()
    assert not accepted.all()
    for level, warned in ((int(accepted.argmin()), True), (int(accepted.argmax()), False)):
        flat = Source(spec="flat", items=[levels[level]] * 200)
        plain = evaluate(bundle, id=flat, resamples=0).to_json()
        said = any("more than its calibration" in warning for warning in plain["warnings"])
        assert said is warned


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scores": ["nope"]}, "nope"),
        ({"scores": []}, None),
        ({"scores": ["ebo", "ebo"]}, "different names"),
        ({"limit": 0}, "at least 1"),
        ({"near": {"x": "a"}, "far": {"x": "b"}}, "both a near and a far set"),
    ],
)
def test_misuse_is_named(bundle, options, message):
    if message is None:  # an empty choice means the default, as on the command line
        assert evaluate(bundle, id=arrays(1), resamples=0, **options).bundles[0].scores
        return
    with pytest.raises(UsageError, match=message):
        evaluate(bundle, id=arrays(1), **options)


def test_the_score_unknown_needs_an_unknown_class(tmp_path):
    plain = make_bundle(tmp_path / "plain", unknown=False)
    with pytest.raises(UsageError, match="needs a model with an unknown class"):
        evaluate(plain, id=arrays(1), scores=["unknown"])


def test_no_bundle_no_images_and_a_bad_image(bundle, tmp_path):
    with pytest.raises(UsageError, match="no bundle"):
        evaluate([], id=arrays(1))
    with pytest.raises(DataError, match="no images"):
        evaluate(bundle, id=arrays(1).select([]))
    broken = Source(spec="broken", items=[np.zeros((8, 8, 1), np.uint8), np.zeros((9, 9, 1), "u1")])
    with pytest.raises(ImageError):
        evaluate(bundle, id=broken)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        evaluate(bundle, id=arrays(1), out=tmp_path / "file")
