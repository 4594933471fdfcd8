"""Keeps a model sparse while any training loop trains it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moon.trainer.sparsity import checks
from moon.trainer.sparsity.budget import share_out
from moon.trainer.sparsity.hooks import Hooks, attach, detach
from moon.trainer.sparsity.masked import MaskedLayer, gradients_finite, mask_gradients_
from moon.trainer.sparsity.rules import make_rule, rule_names
from moon.trainer.sparsity.saved import Course, restore, save
from moon.trainer.sparsity.schedule import UpdateSchedule
from moon.trainer.sparsity.structure import parse_structure
from moon.trainer.sparsity.topology import (
    Topology,
    bernoulli_mask,
    find_layers,
    full_mask,
    generator,
    magnitude_mask,
    random_mask,
)
from moon.trainer.sparsity.watch import Watch

__all__ = ["INITS", "Sparsifier"]

INITS = ("random", "magnitude", "bernoulli")


class Sparsifier:
    """Masks a model's weights and evolves the masks, driven by its optimizer alone.

    The weights are masked at construction. From then on every ``optimizer.step()`` first
    masks the gradients, which keeps inactive weights and their optimizer state at zero. Every
    ``interval`` steps the topology is updated from the dense gradient **just before** the
    optimizer step, which then moves the weights, the newly grown ones included (in the
    original RigL the update takes the place of the step). Grown weights start at zero with
    zero optimizer state. The gradient is whatever ``weight.grad`` holds at that moment: the
    mean over accumulated micro-batches and, under DistributedDataParallel, over ranks, so no
    communication is needed and all ranks get the same masks.

    Loops that clip gradients call ``mask_gradients()`` after the last backward pass (and
    after ``scaler.unscale_``) and before clipping. Gradients that are not finite postpone an
    update to the next step. A step that GradScaler skips is not counted, except with a fused
    optimizer, whose step is called all the same. The model and its state dict gain nothing.

    Gradual magnitude pruning (``gmp``) starts dense instead, and drops the smallest weights
    every ``interval`` steps, and once more at T_end = ``stop`` * ``total_steps``, so that the
    share (1 - t / T_end)^3 of what is to go is left. It reads no gradient, so nothing
    postpones it. Bounds per group (N:M, fan-in) hold from its last update on.

    Args:
        model: any module with Conv or Linear layers; may be compiled or wrapped in DDP.
        optimizer: a torch optimizer over the model's weights.
        density: nonzeros over all Conv and Linear weights, in (0, 1]; 1 masks nothing.
        rule: ``rigl``, ``set``, ``static``, ``gmp`` or ``dense`` (which needs density 1).
        distribution: ``erk``, ``er`` or ``uniform``.
        structure: ``unstructured``; ``N:M`` such as ``2:4``, at most N connections among M
            consecutive input channels; ``block4x1``, blocks of 4 output channels; ``fan-in``,
            as many connections in every output channel. A density of just N/M fills every
            group of N:M, and layers kept dense come on top; any lower one is met as a total,
            dense layers included, under the bound of N a group.
        total_steps: optimizer steps of the run; None updates with a constant drop fraction
            until ``freeze()``, which ``gmp`` cannot.
        interval: optimizer steps between updates.
        drop_fraction: share of a layer's connections replaced at first; ``gmp`` has none.
        stop: share of ``total_steps`` after which the topology stands still.
        dense: layers kept dense: module or weight names, ``stem``, ``head``.
        seed: all random draws depend on (seed, step, layer) only.
        exclude_dropped: connections dropped by an update cannot regrow in it.
        init: first masks: ``random``; ``magnitude`` to keep a trained model's largest;
            ``bernoulli`` to draw each connection by itself, so that a layer's number of them
            varies and then stays; ``gmp`` starts dense.
        cosine_steps: steps after which the drop fraction has fallen to zero; None for as long
            as the topology is updated.
        sparse_depthwise: also sparsify depth-wise convolutions.

    Raises:
        UsageError: a bad argument, or a sparse weight the optimizer does not train.
        TrainingError: optimizer state of unknown meaning.

    Source: Evci et al. 2020 (RigL), Mocanu et al. 2018 (SET), Zhu and Gupta 2017 (GMP),
    Mishra et al. 2021 (2:4), Lasby et al. 2023 (constant fan-in).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        density: float,
        rule: str = "rigl",
        distribution: str = "erk",
        structure: str = "unstructured",
        total_steps: int | None = None,
        interval: int = 100,
        drop_fraction: float = 0.3,
        stop: float = 0.7,
        dense: Sequence[str] = (),
        seed: int = 0,
        exclude_dropped: bool = False,
        init: str = "random",
        cosine_steps: int | None = None,
        sparse_depthwise: bool = False,
    ) -> None:
        checks.check_choice("rule", rule, rule_names())
        checks.check_choice("init", init, INITS)
        checks.check_rule(rule, density)
        checks.check_pruning(rule, total_steps)
        checks.check_bernoulli(init, rule, structure)
        checks.check_optimizer(optimizer)
        self.optimizer = optimizer
        self.structure = parse_structure("unstructured" if rule == "dense" else structure)
        self.rule = make_rule(
            "static" if rule == "dense" else rule, exclude_dropped=exclude_dropped
        )
        self.schedule = UpdateSchedule(
            interval=interval,
            drop_fraction=drop_fraction,
            stop=stop,
            total_steps=total_steps,
            cosine_steps=cosine_steps,
        )
        self._course = Course(seed=seed)
        self._grown = torch.zeros((), dtype=torch.int64)
        self._watch = Watch()
        self._stepping = False
        layers = find_layers(model, dense=dense, sparse_depthwise=sparse_depthwise)
        self._sizes = {layer.name: layer.size for layer in layers}
        self._targets = share_out(layers, density, distribution, self.structure)
        self._layers = [
            self._masked(layer.name, layer.weight, init)
            for layer in layers
            if self._targets[layer.name] < layer.size
        ]
        checks.check_trained(self._layers, optimizer)
        checks.check_slots(self._layers, optimizer)
        self._hooks = self._attached()
        self.apply_masks()

    def _masked(self, name: str, weight: nn.Parameter, init: str) -> MaskedLayer:
        target = nonzeros = self._targets[name]
        if self.rule.prunes:
            mask, nonzeros = full_mask(weight), weight.numel()
        elif init == "magnitude":
            mask = magnitude_mask(weight, target, self.structure)
        elif init == "bernoulli":
            mask = bernoulli_mask(weight, target, generator(self._course.seed, 0, name))
            target = nonzeros = self._targets[name] = int(mask.sum())
        else:
            draw = generator(self._course.seed, 0, name)
            mask = random_mask(weight, target, draw, self.structure)
        return MaskedLayer(name=name, weight=weight, mask=mask, target=target, nonzeros=nonzeros)

    # ------------------------------------------------------------------ reading

    @property
    def masks(self) -> Topology:
        """Masks of the sparse layers by weight name: the live tensors, not to be changed."""
        return {layer.name: layer.mask for layer in self._layers}

    @property
    def densities(self) -> dict[str, float]:
        """Density of every Conv and Linear weight by name now, dense layers included."""
        return {name: count / self._sizes[name] for name, count in self.nonzeros.items()}

    @property
    def density(self) -> float:
        """Nonzeros of all Conv and Linear weights over their number, now."""
        return sum(self.nonzeros.values()) / sum(self._sizes.values())

    @property
    def nonzeros(self) -> dict[str, int]:
        """Connections of every Conv and Linear weight by name now; constant but for ``gmp``."""
        return self._targets | {layer.name: layer.nonzeros for layer in self._layers}

    @property
    def targets(self) -> dict[str, int]:
        """Connections of every Conv and Linear weight by name when the topology is final."""
        return dict(self._targets)

    @property
    def step_count(self) -> int:
        """Optimizer steps taken."""
        return self._course.step

    @property
    def update_count(self) -> int:
        """Topology updates made."""
        return self._course.updates

    @property
    def turnover(self) -> float:
        """Connections grown so far over the number of connections of the sparse layers."""
        total = sum(layer.target for layer in self._layers)
        return int(self._grown) / total if total else 0.0

    @property
    def frozen(self) -> bool:
        """Whether the topology has reached its final form."""
        course = self._course
        still = not self.rule.updates or not self._layers
        over = course.frozen or (course.step >= self.schedule.end and not self._surplus)
        return still or over

    @property
    def update_due(self) -> bool:
        """Whether the next optimizer step updates the topology."""
        course = self._course
        last = course.step >= self.schedule.end and self._surplus
        due = course.pending or self.schedule.due(course.step) or last
        return due and course.updated_at != course.step and not self.frozen

    @property
    def _surplus(self) -> bool:
        return any(layer.nonzeros > layer.target for layer in self._layers)

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """What masking a gradient reads: a captured CUDA graph holds on to these.

        They are changed in place; others take their place only when the model changes its
        device, and a graph captured before must then not be replayed.
        """
        return tuple(layer.mask for layer in self._layers)

    # ------------------------------------------------------------------ acting

    @torch.no_grad()
    def freeze(self) -> None:
        """Keep the topology as it is from now on; ``gmp`` prunes what is left to prune first."""
        if self._surplus:
            self._evolve(0.0)
        self._course.frozen = True

    def advance(self, steps: int = 1) -> None:
        """Count optimizer steps that ran without Python, in a replayed CUDA graph.

        Steps with ``update_due`` have to run outside the graph.
        """
        self._course.step += steps

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Update the topology if that is due, then zero the gradients of inactive weights.

        Called by every ``optimizer.step()``; loops that clip call it themselves once, after
        the last backward pass. Calling it again changes nothing.
        """
        if not _capturing():
            if self._watch.written(self._layers):
                self.apply_masks()
            if self.update_due:
                self._update()
            self._watch.note(self._layers)
        mask_gradients_(self._layers)

    @torch.no_grad()
    def apply_masks(self) -> None:
        """Zero inactive weights and their optimizer state, in place.

        The next step does so by itself when something else has written the weights, such as
        a dense state dict loaded into the model; call it to have the zeros before that, or
        after writing through ``weight.data``, which goes unseen.
        """
        for layer in self._layers:
            layer.follow_weight()
            layer.clear_(self.optimizer, ~layer.mask)

    def remove(self) -> None:
        """Let go of the optimizer: masks stay as they are, gradients are no longer masked."""
        detach(self.optimizer, self._hooks)
        self._hooks = ()

    def _update(self) -> None:
        course, prunes = self._course, self.rule.prunes
        course.pending = not prunes and not gradients_finite(self.optimizer)
        if not course.pending:
            schedule = self.schedule
            self._evolve((schedule.surplus if prunes else schedule.fraction)(course.step))

    def _evolve(self, fraction: float) -> None:
        course = self._course
        for layer in self._layers:
            gradient = layer.weight.grad
            if gradient is None and not self.rule.prunes:
                continue  # Frozen or no part of the loss: what grew would stay at zero.
            layer.follow_weight()
            mask = self.rule.step(
                layer.mask,
                layer.weight,
                layer.weight if gradient is None else gradient,
                nonzeros=layer.target,
                fraction=fraction,
                draw=generator(course.seed, course.step, layer.name, layer.weight.device),
                structure=self.structure,
            )
            grown = layer.replace_(self.optimizer, mask)
            self._grown = self._grown.to(grown.device) + grown
        course.updated_at = course.step
        course.updates += 1

    # ------------------------------------------------------------------ hooks

    def _attached(self) -> Hooks:
        return attach(
            self.optimizer,
            before=self._before_step,
            after=self._after_step,
            loaded=self._after_loading,
        )

    @torch.no_grad()
    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._stepping = True
        if self._layers:
            checks.check_no_closure(args, kwargs)
            self.mask_gradients()

    @torch.no_grad()
    def _after_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        # An optimizer whose step calls that of its parent runs the hooks of both.
        if _capturing() or not self._stepping:
            return
        self._stepping = False
        self._course.step += 1
        if self._watch.stepped(self._layers, optimizer):
            # A fused SGD whose first step overflowed leaves its momentum uninitialised.
            self.apply_masks()
        self._watch.note(self._layers)

    def _after_loading(self, optimizer: Optimizer) -> None:
        self._watch.restart()

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Masks (bool tensors, copies) and plain numbers; enough to resume bit for bit."""
        self._course.grown = int(self._grown)
        return save(self._course, self.rule, self.structure, self._layers)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict()``, on a sparsifier constructed with the same arguments.

        Construct first, since that masks the weights at random; then load the model, the
        optimizer and this in any order. Weights and optimizer state outside the loaded masks
        are set to zero, here and again at the first step.

        Raises:
            TrainingError: the state is of another version, rule, structure, model or density;
                nothing has been changed then.
        """
        self._course, masks = restore(state, self.rule, self.structure, self._layers)
        for layer in self._layers:
            layer.follow_weight()
            layer.set_mask_(masks[layer.name])
        self._grown = torch.tensor(self._course.grown, dtype=torch.int64)
        self._watch.restart()
        self.apply_masks()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_hooks": bool(self._hooks)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy (of model, optimizer and sparsifier together) drives its own optimizer."""
        self.__dict__.update(state)
        self._hooks = self._attached() if state["_hooks"] else ()


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
