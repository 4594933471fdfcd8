"""VOS: teaching the energy to fall on virtual outliers, drawn in feature space.

Shapes: N samples, K known classes, D features, Q remembered features a class, S outliers a class.
Source: Du, Wang, Cai, Li, "VOS: Learning What You Don't Know by Virtual Outlier Synthesis",
ICLR 2022: equations 1 to 5, with the settings of the authors' classification experiments.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from moon.errors import TrainingError, UsageError
from moon.trainer.models import head_name
from moon.trainer.sparsity.topology import generator, unwrap

__all__ = ["HeadInput", "VirtualOutliers"]

RIDGE = 1e-4
# Stands for an energy weight that is not positive: its class counts for nothing.
TINY = 1e-30


class VirtualOutliers(nn.Module):
    """The uncertainty loss of VOS, to be added to the loss of the logits.

    The last ``queue`` features of every class are remembered, and the features of class k are
    taken as normal around their mean mu_k, with one covariance for all,

        Sigma = mean over classes and queues of (h - mu_k)(h - mu_k)^T + 1e-4 I

    At each step ``sample_from`` points are drawn around each mean and the ``select`` least
    likely of them are the outliers v. With E(z) = log sum_k max(w_k, 0) exp(z_k) over the known
    classes and phi a logistic regression of E, both w and phi being learned, the loss is

        weight * mean of -log p(inlier | phi(E(z)))       over the N samples of the batch
                     and -log p(outlier | phi(E(head(v)))) over the K * S outliers

    v = mu_k + L e with Sigma = L L^T and e standard normal, and its likelihood falls with |e|
    alone. So only the lengths |e| of all points are drawn (their squares are chi-squared with D
    degrees of freedom), and a direction for the chosen ones: the same distribution as drawing
    ``sample_from`` vectors for each class, at a small part of the cost.

    The loss is 0 through ``warmup_epochs``, and after that until an epoch starts with all
    queues full; see ``active``. w and phi are parameters of this module: give them to the
    optimizer, not to the sparsifier. All draws follow from (seed, step, device). In one process
    only: ranks would remember features of their own.

    Args:
        known: K.
        features: D.
        unknown_index: which logit is the unknown, left out of the energy; None where every
            logit is of a known class.
        weight: beta.
        warmup_epochs: 40 of 100 in the authors' runs.
        queue: Q.
        sample_from: points drawn for each class.
        select: S, how many of them are kept.
        seed: of the draws and the first parameters.

    Raises:
        UsageError: a value out of range.
    """

    def __init__(
        self,
        *,
        known: int,
        features: int,
        unknown_index: int | None = None,
        weight: float = 0.1,
        warmup_epochs: int = 40,
        queue: int = 1000,
        sample_from: int = 10000,
        select: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if min(known, features, queue, select) < 1 or not select <= sample_from:
            raise UsageError(
                f"known {known}, features {features}, queue {queue}, sample_from {sample_from} "
                f"or select {select} is out of range",
                remedy="All are at least 1, and select at most sample_from",
            )
        if weight < 0 or warmup_epochs < 0:
            raise UsageError(f"weight {weight} or warmup_epochs {warmup_epochs} is negative")
        self.known = known
        self.unknown_index = unknown_index
        self.weight = float(weight)
        self.warmup_epochs = warmup_epochs
        self.sample_from = sample_from
        self.select = select
        self.seed = seed
        self.active = False
        draw = generator(seed, 0, "vos/parameters")
        self.energy_weight_K = nn.Parameter(torch.rand(known, generator=draw))
        self.phi = nn.Linear(1, 2)
        with torch.no_grad():
            for parameter in self.phi.parameters():
                parameter.copy_(2 * torch.rand(parameter.shape, generator=draw) - 1)
        self.queue_KQD: Tensor
        self.next_K: Tensor
        self.filled_K: Tensor
        self.register_buffer("queue_KQD", torch.zeros(known, queue, features))
        self.register_buffer("next_K", torch.zeros(known, dtype=torch.int64))
        self.register_buffer("filled_K", torch.zeros(known, dtype=torch.int64))

    @property
    def full(self) -> bool:
        """Whether every class has as many features as it can; waits for the device."""
        return bool((self.filled_K == self.queue_KQD.shape[1]).all())

    @property
    def branch(self) -> bool:
        """Which of its Python paths a call takes; a captured CUDA graph serves one of them."""
        return self.active

    def start_epoch(self, epoch: int) -> None:
        """Decide whether an epoch, counted from 1, has outliers.

        Raises:
            UsageError: a negative epoch.
        """
        if epoch < 0:
            raise UsageError(f"epochs count from 1, not {epoch}")
        self.active = epoch > self.warmup_epochs and self.full

    @torch.no_grad()
    def draw(self, step: int) -> Tensor:
        """The standard normal vectors [K, S, D] behind the outliers of ``step``.

        They lie as far out as the S farthest of ``sample_from``, in no particular direction.
        """
        _, _, features = self.queue_KQD.shape
        device = self.queue_KQD.device
        numbers = generator(self.seed, step, "vos", device)
        halves = torch.full((self.known, self.sample_from), features / 2, device=device)
        # Twice a gamma of shape D / 2 is chi-squared with D degrees of freedom.
        squares_KF = 2 * torch._standard_gamma(halves, generator=numbers)
        length_KS = squares_KF.topk(self.select, dim=1).values.sqrt()
        shape = (self.known, self.select, features)
        direction_KSD = F.normalize(torch.randn(shape, generator=numbers, device=device), dim=2)
        return length_KS[:, :, None] * direction_KSD

    def forward(
        self,
        features_ND: Tensor,
        logits_NK: Tensor,
        target_N: Tensor,
        head: Callable[[Tensor], Tensor],
        draw_KSD: Tensor | None = None,
    ) -> Tensor:
        """Remember a batch's features and return its uncertainty loss, 0-d.

        Nothing here waits for the device. In evaluation mode nothing is remembered.

        Args:
            features_ND: [N, D], what ``head`` made the logits from.
            logits_NK: [N, K], or [N, K + 1] with ``unknown_index``.
            target_N: int64 [N], indices of logits, never that of the unknown.
            head: from features to logits, without side effects (``HeadInput.head``).
            draw_KSD: ``draw(step)``; needed while ``active``.

        Raises:
            UsageError: wrong shapes.
            TrainingError: ``active`` and no draw.
        """
        self._check(features_ND, logits_NK, target_N)
        if self.training:
            self._remember(features_ND.detach().float(), self._classes(target_N))
        if not self.active:
            return logits_NK.new_zeros((), dtype=torch.float32)
        if draw_KSD is None:
            raise TrainingError("virtual outliers need the random numbers of draw(step)")
        with torch.autocast(features_ND.device.type, enabled=False):
            outliers_OD = self.outliers(draw_KSD).flatten(0, 1)
        outlier_logits_OK = head(outliers_OD)
        with torch.autocast(features_ND.device.type, enabled=False):
            energy_M = torch.cat([self.energy(logits_NK), self.energy(outlier_logits_OK)])
            inlier_M = torch.ones_like(energy_M, dtype=torch.int64)
            inlier_M[len(target_N) :] = 0
            answers_M2: Tensor = self.phi(energy_M[:, None])
            return self.weight * F.cross_entropy(answers_M2, inlier_M)

    def energy(self, logits_NK: Tensor) -> Tensor:
        """E [N] in float32: log sum_k max(w_k, 0) exp(z_k) over the known classes."""
        logits_NK = logits_NK.float()
        if self.unknown_index is not None:
            unknown = self.unknown_index % logits_NK.shape[1]
            logits_NK = torch.cat([logits_NK[:, :unknown], logits_NK[:, unknown + 1 :]], dim=1)
        return torch.logsumexp(logits_NK + self.energy_weight_K.clamp(min=TINY).log(), dim=1)

    @torch.no_grad()
    def outliers(self, draw_KSD: Tensor) -> Tensor:
        """The points [K, S, D] at mu_k + L e for e in ``draw_KSD``."""
        mean_KD = self.queue_KQD.mean(dim=1)
        centred_MD = (self.queue_KQD - mean_KD[:, None]).flatten(0, 1)
        covariance_DD = (centred_MD.T @ centred_MD / len(centred_MD)).double()
        covariance_DD.diagonal().add_(RIDGE)
        # The check of a plain cholesky would wait for the device.
        root_DD, _ = torch.linalg.cholesky_ex(covariance_DD)
        points_KSD: Tensor = mean_KD[:, None] + draw_KSD @ root_DD.T.to(draw_KSD.dtype)
        return points_KSD

    @torch.no_grad()
    def _remember(self, features_ND: Tensor, class_N: Tensor) -> None:
        """Overwrite each class's oldest features; among equals the later sample is the newer."""
        known, queue, features = self.queue_KQD.shape
        flat = self.queue_KQD.view(known * queue, features)
        classes_K = torch.arange(known, device=class_N.device)
        # No more than a queue holds at once, so that no place is written twice.
        for part_ND, part_N in zip(
            torch.split(features_ND, queue), torch.split(class_N, queue), strict=True
        ):
            of_class_NK = (part_N[:, None] == classes_K).long()
            before_N = (of_class_NK.cumsum(0) - 1).gather(1, part_N[:, None])[:, 0]
            place_N = (self.next_K[part_N] + before_N) % queue
            flat.index_copy_(0, part_N * queue + place_N, part_ND)
            counts_K = of_class_NK.sum(0)
            self.next_K.copy_((self.next_K + counts_K) % queue)
            self.filled_K.copy_((self.filled_K + counts_K).clamp(max=queue))

    def _classes(self, target_N: Tensor) -> Tensor:
        """From indices of logits to indices of classes, which do not count the unknown."""
        if self.unknown_index is None:
            return target_N
        return target_N - (target_N > self.unknown_index % (self.known + 1)).long()

    def _check(self, features_ND: Tensor, logits_NK: Tensor, target_N: Tensor) -> None:
        outputs = self.known + (self.unknown_index is not None)
        expected = (len(target_N), self.queue_KQD.shape[2]), (len(target_N), outputs)
        if (tuple(features_ND.shape), tuple(logits_NK.shape)) != expected:
            raise UsageError(
                f"virtual outliers take features {list(expected[0])} and logits "
                f"{list(expected[1])} with these targets, not {list(features_ND.shape)} and "
                f"{list(logits_NK.shape)}"
            )

    def extra_repr(self) -> str:
        return f"weight={self.weight:g}, select={self.select} of {self.sample_from}"


class HeadInput:
    """Keeps what a model's last linear layer was last called with: the penultimate features.

    Args:
        model: any classifier whose logits come from its last Linear layer.

    Attributes:
        layer: that layer.

    Raises:
        UsageError: the model's logits do not come from a Linear layer.
    """

    def __init__(self, model: nn.Module) -> None:
        model = unwrap(model)
        layer = model.get_submodule(head_name(model))
        if not isinstance(layer, nn.Linear):
            raise UsageError(
                f"features are read before a Linear layer, and the model ends in "
                f"{type(layer).__name__}",
                remedy="Use a model with a Linear head",
            )
        self.layer = layer
        self._features: Tensor | None = None
        self._hook = layer.register_forward_pre_hook(self._keep)

    @property
    def features(self) -> Tensor:
        """[N, D] of the last forward pass, part of its autograd graph.

        Raises:
            TrainingError: there was none.
        """
        if self._features is None:
            raise TrainingError("the model has not been run yet")
        return self._features

    def head(self, features_ND: Tensor) -> Tensor:
        """The layer's logits of other features; ``features`` stay."""
        logits: Tensor = self.layer.forward(features_ND)
        return logits

    def remove(self) -> None:
        """Let go of the model."""
        self._hook.remove()
        self._features = None

    def _keep(self, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._features = args[0]
