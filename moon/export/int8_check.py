"""What int8 changes in a model's answers, measured on held-out images, and how much it may."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moon.data.items import Labels, Source
from moon.data.labels import known_labels
from moon.data.load import load_pixels
from moon.data.preprocess import Preprocess
from moon.errors import ParityError
from moon.export.build import Built, Options
from moon.export.checks import compare
from moon.export.samples import outputs
from moon.gate_calibration import calibrate_conformal

__all__ = ["MOST", "Int8Answers"]

# A change of one image in a hundred is then 20 images.
MOST = 2000


@dataclass(frozen=True)
class Int8Answers:
    """What the int8 graph, and the fp32 one it was made from, give for many images.

    Attributes:
        narrow, wide: outputs by name, of the int8 and of the fp32 graph.
        labels: true labels, [N] with -1 where there is none, or None.
    """

    narrow: Mapping[str, NDArray[Any]]
    wide: Mapping[str, NDArray[Any]]
    labels: Labels | None

    @classmethod
    def of(
        cls,
        built: Built,
        options: Options,
        source: Source,
        preprocess: Preprocess,
        classes: Sequence[str],
    ) -> Int8Answers:
        """Run both graphs on up to 2,000 images, spread evenly over ``source``.

        Raises:
            DataError, ImageError: an image cannot be read or is of no known class.
        """
        count = min(MOST, len(source))
        rows = np.arange(count) * len(source) // count
        labels = known_labels(source, rows, classes)
        pixels = load_pixels(source, preprocess, rows)
        narrow, wide = (
            outputs(model, options, preprocess, pixels) for model in (built.model, built.wide)
        )
        return cls(narrow, wide, labels)

    def check(self, reject: float, max_change: float) -> dict[str, Any]:
        """The figures, for the record.

        Args:
            reject: share of in-distribution images that a gate may reject. Each graph's decisions
                are by a threshold of its own, calibrated for this share on these images.
            max_change: largest share of images whose label or decision may be another.

        Returns:
            ``images``, ``max_abs``, ``top1_agreement``, ``gate_agreement`` and ``accuracy``, by
            precision or null without labels.

        Raises:
            ParityError: more images change than may.
            CalibrationError: too few images for ``reject``.
        """
        parity = compare(self.wide["logits"], self.narrow["logits"])
        same = self.wide["label"] == self.narrow["label"]
        decided = [
            scores >= calibrate_conformal(scores, reject).threshold
            for scores in (self.wide["score"], self.narrow["score"])
        ]
        report = {
            "images": parity.images,
            "max_abs": parity.max_abs,
            "top1_agreement": float(same.mean()),
            "gate_agreement": float((decided[0] == decided[1]).mean()),
            "accuracy": self._accuracy(),
        }
        self._require(report, max_change)
        return report

    def _accuracy(self) -> dict[str, float] | None:
        if self.labels is None:
            return None
        known = self.labels >= 0
        return {
            name: float((answers["label"] == self.labels)[known].mean())
            for name, answers in (("fp32", self.wide), ("int8", self.narrow))
        }

    @staticmethod
    def _require(report: Mapping[str, Any], max_change: float) -> None:
        accuracy = report["accuracy"]
        loss = f"; accuracy {accuracy['fp32']:.2%} to {accuracy['int8']:.2%}" if accuracy else ""
        for what, share in (("label", "top1_agreement"), ("decision", "gate_agreement")):
            changed = 1 - report[share]
            # Shares are of whole images; half of one is no image.
            if changed * report["images"] > max_change * report["images"] + 0.5:
                raise ParityError(
                    f"int8 gives another {what} for {changed:.2%} of {report['images']:,} "
                    f"images, more than {max_change:.2%}{loss}",
                    remedy="Export with --precision fp16, or allow it with --max-change "
                    f"{_rounded_up(changed)}",
                )


def _rounded_up(share: float) -> str:
    return f"{np.ceil(share * 100) / 100:g}"
