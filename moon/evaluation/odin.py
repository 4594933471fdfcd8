"""ODIN: confidence after a step towards the answer. Needs gradients, and so PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moon.errors import MissingExtraError, UsageError
from moon.scores.training import known_columns, rows

if TYPE_CHECKING:
    from torch import Tensor, nn  # noqa: TID251 - annotations alone

__all__ = ["odin"]

Floats = NDArray[np.float64]


def odin(
    model: nn.Module,
    x: Tensor,
    *,
    unknown_index: int | None = None,
    temperature: float = 1000.0,
    eps: float = 0.0014,
    std: Sequence[float] | None = None,
    batch_size: int = 64,
) -> Floats:
    """max over the known c of softmax(f(x') / T)_c at x' = x - eps sign(-grad log p_y(x)).

    Liang, Li and Srikant, "Enhancing The Reliability of Out-of-distribution Image Detection in
    Neural Networks", ICLR 2018. y is the known class with the largest logit, p the softmax of
    f(x) / T over all logits, the unknown one included as in msp. Two passes forward and one
    backward an input; an exported graph has no gradients, so there is no approximation of it
    elsewhere. The softmax is taken in float64: at T = 1000 all that matters is in its last digits.

    Args:
        model: in eval mode; x [N, C, H, W] or any [N, ...] -> logits [N, L]. Its parameters
            collect no gradients.
        x: inputs as the model takes them (normalised), on the model's device. Not changed.
        unknown_index: logit of the unknown class, or None.
        temperature: T; the paper's 1000.
        eps: the step; the paper's 0.0014.
        std: standard deviation of each channel that normalised x: the step is divided by it, so
            that eps counts on pixels in [0, 1], as in the authors' code. None: eps counts on x.
        batch_size: inputs a pass.

    Returns:
        [N] float64, higher more in-distribution; NaN where the model's answer is.

    Raises:
        UsageError: the model is in training mode or not differentiable, or an argument is wrong.
        MissingExtraError: PyTorch is not installed.
    """
    try:
        import torch  # noqa: TID251 - input gradients are torch's
    except ImportError as error:
        raise MissingExtraError("torch", "train", "the score odin") from error
    _check(temperature, eps, batch_size)
    _check_model(model, x)
    found = np.empty(len(x))
    # Works where the caller has switched gradients off, or in inference mode.
    with torch.inference_mode(False), torch.enable_grad():
        step = torch.tensor(eps, dtype=x.dtype, device=x.device) / _per_channel(x, std)
        for here in rows(len(x), batch_size):
            part = x[here].clone().detach().requires_grad_()
            log_p = _log_p(model, part, temperature, unknown_index)
            answer = log_p.argmax(dim=1, keepdim=True)
            try:
                (gradient,) = torch.autograd.grad(log_p.gather(1, answer).sum(), part)
            except RuntimeError as error:
                raise UsageError(
                    f"the model's answer has no gradient by its input ({error})",
                    remedy="Give a model that is differentiable from input to logits",
                ) from error
            with torch.no_grad():
                moved = _log_p(model, part + step * gradient.sign(), temperature, unknown_index)
            found[here] = moved.amax(dim=1).exp().cpu().numpy()
    return found


def _log_p(model: nn.Module, x: Tensor, temperature: float, unknown_index: int | None) -> Tensor:
    """Known classes' columns of the log-softmax of logits / T over all logits, float64 [N, K]."""
    logits: Tensor = model(x)
    if logits.ndim != 2 or len(logits) != len(x):
        raise UsageError(f"the model must answer [N, L], not {list(logits.shape)}")
    known = known_columns(logits.shape[1], unknown_index).tolist()
    return (logits.double() / temperature).log_softmax(dim=1)[:, known]


def _check_model(model: nn.Module, x: Tensor) -> None:
    import torch  # noqa: TID251 - see odin

    if not isinstance(model, torch.nn.Module):
        raise UsageError(
            f"odin needs a PyTorch model, whose input gradients it takes, not a "
            f"{type(model).__name__}"
        )
    if any(module.training for module in model.modules()):
        raise UsageError("odin needs the model in eval mode", remedy="Call model.eval() first")
    if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.ndim < 2:
        raise UsageError("odin needs a floating-point tensor of inputs [N, C, ...]")


def _check(temperature: float, eps: float, batch_size: int) -> None:
    if not 0 < temperature < np.inf:
        raise UsageError(f"the temperature must be a positive number, not {temperature}")
    if not 0 <= eps < np.inf:
        raise UsageError(f"eps must be 0 or a positive number, not {eps}")
    if batch_size < 1:
        raise UsageError(f"the batch size must be at least 1, not {batch_size}")


def _per_channel(x: Tensor, std: Sequence[float] | None) -> Tensor:
    """``std`` shaped to divide x, or ones."""
    import torch  # noqa: TID251 - see odin

    if std is None:
        return torch.ones((), dtype=x.dtype, device=x.device)
    if len(std) != x.shape[1] or not all(0 < value < np.inf for value in std):
        raise UsageError(f"std must be {x.shape[1]} positive numbers, one a channel")
    return torch.tensor(std, dtype=x.dtype, device=x.device).reshape(1, -1, *[1] * (x.ndim - 2))
