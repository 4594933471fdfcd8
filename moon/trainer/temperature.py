"""Temperature scaling: one number that makes a classifier's confidence match its accuracy.

Shapes: N samples, K known classes, K + 1 logits where one stands for the unknown.
Source: Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks", ICML 2017.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from moon.errors import CalibrationError, UsageError
from moon.evaluation.reliability import ece
from moon.scores.temperature import rising_root
from moon.trainer.sparsity.topology import unwrap

__all__ = ["Temperature", "check_head", "fit_temperature", "fold_temperature_"]


@dataclass(frozen=True, kw_only=True)
class Temperature:
    """A fitted temperature and what it did on the held-out images.

    Attributes:
        temperature: T; the calibrated probabilities are softmax(logits / T).
        nll_before, nll_after: mean negative log-likelihood at 1 and at T, in nats.
        ece_before, ece_after: expected calibration error in 15 bins, in [0, 1].
        samples: how many images it was fitted to.
    """

    temperature: float
    nll_before: float
    nll_after: float
    ece_before: float
    ece_after: float
    samples: int


def fit_temperature(
    logits_NK: Tensor,
    labels_N: Tensor,
    *,
    unknown_index: int | None = None,
    over_unknown: bool = False,
) -> Temperature:
    """The temperature T > 0 that minimises the negative log-likelihood of held-out images.

    In s = 1 / T the likelihood mean(logsumexp(s z) - s z_y) is convex; its derivative
    mean(E_p[z] - z_y) is brought to zero by Newton steps kept within a bracket, in float64.

    Args:
        logits_NK: [N, K], or [N, K + 1] with ``unknown_index``, of images not trained on.
        labels_N: int64 [N], indices of logits.
        unknown_index: which logit is the unknown; None where there is none.
        over_unknown: take the softmax over all K + 1 logits, not over the K known ones.

    Raises:
        UsageError: wrong shapes, dtypes or labels.
        CalibrationError: there is no best temperature, because every image is answered
            rightly or the logits do not favour the right classes at all.
    """
    logits_NK, labels_N = _checked(logits_NK, labels_N, unknown_index)
    if unknown_index is not None and not over_unknown:
        unknown = unknown_index % logits_NK.shape[1]
        logits_NK = torch.cat([logits_NK[:, :unknown], logits_NK[:, unknown + 1 :]], dim=1)
        labels_N = labels_N - (labels_N > unknown).long()
    # Only differences matter: the largest logit becomes 0.
    logits_NK = logits_NK - logits_NK.amax(dim=1, keepdim=True)
    scale = _best_scale(logits_NK, labels_N)
    before, after = _quality(logits_NK, labels_N), _quality(scale * logits_NK, labels_N)
    return Temperature(
        temperature=1 / scale,
        nll_before=before[0],
        nll_after=after[0],
        ece_before=before[1],
        ece_after=after[1],
        samples=len(labels_N),
    )


@torch.no_grad()
def fold_temperature_(model: nn.Module, temperature: float) -> None:
    """Divide the weight and bias of the model's last layer by ``temperature``, in place.

    The model's own softmax is then the calibrated one, and its answers and zeros are what they
    were. Scores that read the logits' size, such as the energy, change.

    Args:
        model: its last Conv or Linear layer, in the order of its modules, makes the logits.

    Raises:
        UsageError: that layer is not a plain Linear, the temperature is out of range, or a
            weight would become zero or infinite; nothing has been changed then.
    """
    if not 0 < temperature < math.inf:
        raise UsageError(f"the temperature is {temperature}", remedy="Give a number above 0")
    head = _head(unwrap(model))
    tensors = [head.weight] if head.bias is None else [head.weight, head.bias]
    scaled = [tensor / temperature for tensor in tensors]
    for old, new in zip(tensors, scaled, strict=True):
        if not torch.equal(old != 0, new != 0) or not torch.equal(old.isfinite(), new.isfinite()):
            raise UsageError(
                f"the temperature {temperature:g} is too extreme for the weights' precision",
                remedy="Fit it to the logits of this model",
            )
    for old, new in zip(tensors, scaled, strict=True):
        old.copy_(new)


def check_head(model: nn.Module) -> None:
    """Whether a temperature can be folded into the model, to know before it is trained.

    Raises:
        UsageError: its last Conv or Linear layer is not a plain Linear.
    """
    _head(unwrap(model))


def _head(model: nn.Module) -> nn.Linear:
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, (_ConvNd, nn.Linear))]
    name, head = layers[-1] if layers else ("", model)
    if not isinstance(head, nn.Linear):
        last = f"a {type(head).__name__}, {name}" if layers else "neither Conv nor Linear"
        raise UsageError(
            f"a temperature is folded into a Linear layer, and the model's last one is {last}",
            remedy="Divide the logits by the temperature where they are used",
        )
    if not isinstance(head._parameters.get("weight"), nn.Parameter):
        raise UsageError(
            f"the weight of {name} is computed from other parameters (a parametrization)",
            remedy="Remove the parametrization before folding a temperature in",
        )
    return head


def _checked(
    logits_NK: Tensor, labels_N: Tensor, unknown_index: int | None
) -> tuple[Tensor, Tensor]:
    shapes = f"{list(logits_NK.shape)} and {list(labels_N.shape)}"
    if logits_NK.ndim != 2 or labels_N.shape != logits_NK.shape[:1] or not len(labels_N):
        raise UsageError(f"a temperature is fitted to logits [N, K] and labels [N], not {shapes}")
    if labels_N.dtype.is_floating_point or labels_N.dtype is torch.bool:
        raise UsageError(f"labels are class indices of type int64, not {labels_N.dtype}")
    outputs = logits_NK.shape[1]
    if unknown_index is not None and not -outputs <= unknown_index < outputs:
        raise UsageError(f"unknown_index {unknown_index} is outside the {outputs} logits")
    logits_NK, labels_N = logits_NK.detach().cpu().double(), labels_N.detach().cpu().long()
    wrong = (labels_N < 0) | (labels_N >= outputs)
    if unknown_index is not None:
        wrong |= labels_N == unknown_index % outputs
    if bool(wrong.any()):
        raise UsageError(
            f"label {int(labels_N[wrong][0])} is not one of the known classes",
            remedy="Leave out images of other classes",
        )
    if not bool(logits_NK.isfinite().all()):
        raise UsageError("some logits are NaN or infinite", remedy="Check the model")
    return logits_NK, labels_N


def _best_scale(logits_NK: Tensor, labels_N: Tensor) -> float:
    """s > 0 with a zero derivative; the logits' row maxima are 0."""
    right_N = logits_NK.gather(1, labels_N[:, None])[:, 0]
    if not bool((right_N < 0).any()):
        raise CalibrationError(
            f"all {len(right_N)} held-out images are answered rightly, so that no confidence is "
            "too high",
            remedy="Give more held-out images, among them some the model gets wrong",
        )
    if float((logits_NK.mean(dim=1) - right_N).mean()) >= 0:
        raise CalibrationError(
            "the logits do not favour the right classes, so that no temperature helps",
            remedy="Check the labels' order, or train the model further",
        )

    def slope(scale: float) -> tuple[float, float]:
        p_NK = torch.softmax(scale * logits_NK, dim=1)
        mean_N = (p_NK * logits_NK).sum(1)
        spread_N = (p_NK * (logits_NK - mean_N[:, None]).square()).sum(1)
        return float((mean_N - right_N).mean()), float(spread_N.mean())

    return rising_root(slope)


def _quality(logits_NK: Tensor, labels_N: Tensor) -> tuple[float, float]:
    """Mean negative log-likelihood, and expected calibration error."""
    confidence_N, answer_N = torch.softmax(logits_NK, dim=1).max(dim=1)
    nll = float(F.cross_entropy(logits_NK, labels_N))
    return nll, ece(confidence_N.clamp(max=1.0).numpy(), (answer_N == labels_N).numpy())
