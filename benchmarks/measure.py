"""What a checkpoint makes of known and unknown images: the figures of `moon eval`, by torch.

The bundle is left out, so that a GPU can do it in seconds; accuracy, ECE and the metrics of
every score are computed by the same functions from logits in float32.

Shape suffixes: N images, B images of a batch, L logits.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping

import numpy as np
import torch
from PIL import Image

from moon.data.labels import known_labels
from moon.data.load import stream
from moon.data.source import Source, open_source
from moon.errors import DataError
from moon.evaluation.measure import id_figures, score_figures
from moon.evaluation.observe import Observed, sample
from moon.scores import SCORES, known_logits, msp, score_function
from moon.trainer.checkpoint import Checkpoint

BATCH = 256
Say = Callable[[str], None]


def measure(
    checkpoint: Checkpoint,
    known: str,
    groups: Mapping[str, Mapping[str, str]],
    *,
    device: str = "cpu",
    limit: int | None = None,
    jpeg: int | None = None,
    say: Say = lambda text: None,
) -> dict[str, object]:
    """Figures of one checkpoint, rates in [0, 1].

    Args:
        known: SOURCE of in-distribution test images.
        groups: SOURCEs of unknown images by name, under `near` and `far`.
        limit: at most so many images a set, always the same ones.
        jpeg: re-encode every image at this quality (4:2:0), at the model's size, so that no set
            can be told from another by how it was compressed.
        say: told of each set.
    """
    # TensorFloat-32 would round the logits to ten bits.
    torch.backends.cudnn.allow_tf32 = False
    seer = _Seer(checkpoint, torch.device(device), limit, jpeg)
    source = open_source(known)
    chosen = sample(source, limit)
    say(f"evaluating on {len(chosen):,} known images")
    labels = known_labels(source, chosen, checkpoint.classes)
    answers = seer.look(source)
    seen: dict[str, dict[str, Observed]] = {"near": {}, "far": {}}
    for group, members in groups.items():
        for name, spec in members.items():
            say(f"evaluating on {name}")
            seen[group][name] = seer.look(open_source(spec))
    return {
        "id": id_figures(answers, labels),
        "scores": {name: score_figures(name, answers, seen, labels, 0) for name in seer.scores},
        "model": {**checkpoint.metrics, "versions": dict(checkpoint.versions)},
    }


class _Seer:
    """A model and how it is shown images."""

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, limit: int | None, jpeg: int | None
    ) -> None:
        self.model = checkpoint.model().to(device).to(memory_format=torch.channels_last)
        self.device, self.limit, self.jpeg = device, limit, jpeg
        self.preprocess, self.unknown = checkpoint.preprocess, checkpoint.unknown_index
        self.scores = [n for n in SCORES if n != "unknown" or self.unknown is not None]

    def look(self, source: Source) -> Observed:
        if len(source) == 0:
            raise DataError(f"{source.spec} holds no images")
        batches = stream(source, self.preprocess, BATCH, indices=sample(source, self.limit))
        logits_NL = np.concatenate([self._logits(pixels) for _, pixels in batches])
        values = {name: score_function(name)(logits_NL, self.unknown) for name in self.scores}
        return Observed(
            {name: np.where(np.isfinite(v), v, -np.inf) for name, v in values.items()},
            {},
            np.ones(len(logits_NL), bool),
            known_logits(logits_NL, self.unknown).argmax(1),
            np.clip(np.nan_to_num(msp(logits_NL, self.unknown), nan=0.0), 0.0, 1.0),
        )

    def _logits(self, pixels_BHWC: np.ndarray) -> np.ndarray:
        if self.jpeg is not None:
            pixels_BHWC = np.stack([reencoded(pixels, self.jpeg) for pixels in pixels_BHWC])
        images = torch.from_numpy(self.preprocess.normalise(pixels_BHWC)).to(self.device)
        with torch.inference_mode():
            return self.model(images).double().cpu().numpy()


def reencoded(pixels_HWC: np.ndarray, quality: int) -> np.ndarray:
    """The pixels after JPEG of that quality with halved chroma, and back."""
    grey = pixels_HWC.shape[-1] == 1
    file = io.BytesIO()
    image = Image.fromarray(pixels_HWC[..., 0] if grey else pixels_HWC)
    image.save(file, "JPEG", quality=quality, **({} if grey else {"subsampling": 2}))
    file.seek(0)
    return np.asarray(Image.open(file)).reshape(pixels_HWC.shape)
