"""Reports made from drawn logits, for tests of figures and page that need no model."""

from __future__ import annotations

from typing import Any

import numpy as np

from moon.class_calibration import calibrate_per_class
from moon.evaluation.classes import class_figures
from moon.evaluation.corruptions import CORRUPTIONS, STRENGTHS, constant
from moon.evaluation.examples import KINDS, thumbnail
from moon.evaluation.findings import findings
from moon.evaluation.measure import gate_figures, id_figures, plot_figures, score_figures
from moon.evaluation.metrics import Ints
from moon.evaluation.observe import Observed
from moon.evaluation.report import BundleReport, Report
from moon.gate import Gate
from moon.gate_calibration import Promise, calibrate_conformal
from moon.scores import SCORES, msp

CLASSES = 10


def drawn(
    n: int, strength: float, gate: Gate | None, *, seed: int, unknown: bool = True
) -> tuple[Observed, Ints]:
    """N images whose right class stands out by ``strength``, and their labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(CLASSES, size=n)
    logits = rng.normal(0, 1.6, (n, CLASSES + unknown))
    looks = np.where(rng.random(n) < 0.08, rng.integers(CLASSES, size=n), labels)
    logits[np.arange(n), looks] += rng.normal(strength, 2.2, n) - 0.45 * strength * (
        looks != labels
    )
    index = CLASSES if unknown else None
    if unknown:
        logits[:, CLASSES] -= 2 + 0.35 * strength
    names = [name for name in SCORES if unknown or name != "unknown"]
    scores = {name: SCORES[name](logits, index) for name in names}
    predicted = np.argmax(logits[:, :CLASSES], axis=1)
    accepted = np.zeros(n, bool) if gate is None else gate.accepts(scores[gate.score], predicted)
    return Observed(scores, {}, accepted, predicted, msp(logits, index)), labels


def report(**options: Any) -> dict[str, Any]:
    """The JSON of ``drawn_report``."""
    return drawn_report(**options).to_json()


def drawn_report(
    *,
    calibrated: bool = True,
    labelled: bool = True,
    names: tuple[str, ...] = ("cifar10-resnet18-rigl95-moon",),
    near: tuple[str, ...] = ("tinyimagenet", "cifar100"),
    far: tuple[str, ...] = ("mnist", "svhn", "dtd"),
    n: int = 4000,
    warnings: tuple[str, ...] = (),
    classes: tuple[str, ...] = tuple(map(str, range(CLASSES))),
    missing: tuple[str, ...] = (),
    per_class: bool = False,
    jpeg: int | None = None,
) -> Report:
    """A report on one bundle a name, each a little weaker than the one before."""
    bundles = []
    for i, name in enumerate(names):
        strength = 11.0 - 1.2 * i
        gate = None
        if calibrated:
            held_out, _ = drawn(5000, strength, None, seed=100 + i)
            values = held_out.scores["ebo"]
            gate = calibrate_conformal(values, 0.05, score="ebo")
            if per_class:
                promise = Promise.of(0.05)
                gate = calibrate_per_class(
                    values, held_out.predicted, classes, promise, score="ebo"
                )
        known, labels = drawn(n, strength, gate, seed=i)
        groups = {
            group: {
                member: drawn(n // 2, base - 1.2 * j, gate, seed=10 * i + j + 5)[0]
                for j, member in enumerate(members)
            }
            for group, members, base in (("near", near, 5.0), ("far", far, 2.5))
        }
        answers = labels if labelled else None
        scored = {s: score_figures(s, known, groups, answers, 50) for s in known.scores}
        found = gate_figures(gate, known, groups, answers)
        lines = {gate.score: gate.threshold} if gate and not per_class else {}
        plots = plot_figures(known, groups, answers, lines)
        if gate:
            plots["examples"] = _examples(near + far, labelled)
        worse = _corrupted(gate is not None, labelled)
        bundles.append(
            BundleReport(
                model=_model(name, i),
                backend={"name": "onnxruntime", "version": "1.32.0", "provider": "CPU"},
                id=id_figures(known, answers),
                scores=scored,
                gate=found,
                plots=plots,
                warnings=warnings,
                findings=tuple(findings(found, scored, worse, jpeg)),
                corruptions=worse,
                classes=tuple(
                    class_figures(classes, known, groups, answers, gated=gate is not None)
                ),
                checks={"overlaps": [], "training_unchecked": None, "nonfinite": {}},
            )
        )
    return Report(
        created="2026-11-22T22:40:00+00:00",
        moon="0.1.0",
        sets={
            "id": {"ID": {"source": "cifar10.npz#test", "n": n, "of": 10_000}},
            "near": {m: {"source": f"{m}.npz#test", "n": n // 2, "of": n // 2} for m in near},
            "far": {m: {"source": f"{m}.npz#test", "n": n // 2, "of": n // 2} for m in far},
        },
        bundles=tuple(bundles),
        benchmark={"name": "cifar10", "missing": list(missing)} if missing else None,
        jpeg=jpeg,
    )


def _corrupted(gated: bool, labelled: bool) -> dict[str, Any]:
    """Figures that fall with strength, each kind at its own pace."""

    def one(fall: float) -> dict[str, Any]:
        accuracy, abstain = 0.95 * (1 - fall), 0.05 + 0.8 * fall
        return {
            "accuracy": accuracy if labelled else None,
            "abstain": abstain if gated else None,
            "abstain_ci95": [abstain - 0.02, abstain + 0.02] if gated else None,
            "accuracy_accepted": accuracy if gated and labelled else None,
            "wrong_accepted": 0.1 * fall if gated and labelled else None,
        }

    kinds = {
        kind: [
            {"strength": s, "amount": constant(kind, s, 32), **one(s / 5 / (1 + pace))}
            for s in STRENGTHS
        ]
        for pace, kind in enumerate(CORRUPTIONS)
    }
    return {"n": 250, "of": 4000, "clean": one(0.0), "kinds": kinds}


def _examples(unknown: tuple[str, ...], labelled: bool) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    found: dict[str, Any] = {kind: [] for kind in KINDS}
    for i in range(8):
        kind = KINDS[i % 3 if labelled else 0]
        known = kind != KINDS[0]
        if not known and not unknown:
            continue
        found[kind].append(
            {
                "set": "ID" if known else unknown[0],
                "group": "id" if known else "near",
                "source": f"a long folder/of images/{i:06}.png",
                "score": None if i == 0 else float(12 - i),
                "predicted": "a-class-of-a-rather-long-name" if i == 3 else "4",
                "label": "4" if kind == KINDS[2] else None if i == 0 else "9",
                "png": thumbnail(rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)),
            }
        )
    return found


def _model(name: str, i: int) -> dict[str, Any]:
    return {
        "name": name, "path": f"bundles/{name}", "version": f"sha256:{i}c0ffee5ba5eba11" + 48 * "0",
        "classes": CLASSES, "unknown_class": True, "sparsity": 0.95, "pattern": "unstructured",
        "nonzeros": 558_720 + i, "weights": 11_173_962, "flops": 143_000_000 - i * 10_000_000,
        "flops_dense": 1_113_000_000, "bytes": 1_912_345 + i,
    }  # fmt: skip
