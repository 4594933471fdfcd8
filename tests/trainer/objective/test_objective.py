"""Every method trains a whole run, and each of its parts can be seen at work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from moon.trainer.checkpoint import Checkpoint
from moon.trainer.dataset import open_dataset
from moon.trainer.fit import fit
from moon.trainer.objective.objective import Objective
from moon.trainer.session import Session
from moon.trainer.voting import Votes
from tests.trainer.recipes_small import tiny_recipe

CPU = torch.device("cpu")
PLAIN = "moon.enabled=false"
VOS = ("vos.queue=10", "vos.sample_from=100", "vos.warmup_epochs=2")
METHODS = {
    "plain": (PLAIN,),
    "logitnorm": (PLAIN, "logitnorm.tau=0.1"),
    "moon-logitnorm": ("logitnorm.tau=0.1",),
    "dac": (PLAIN, "dac.warmup_epochs=2"),
    "mixup": (PLAIN, "mixup.alpha=0.4"),
    "vos": (PLAIN, *VOS),
    "cigl": (PLAIN, "cigl.rate=0.2"),
    "official": ("compat=official",),
    "temperature": (PLAIN, "temperature=true", "data.val=60"),
}


@pytest.fixture(scope="module")
def trained() -> dict[str, Checkpoint]:
    return {name: fit(tiny_recipe(*settings)) for name, settings in METHODS.items()}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_learns_and_keeps_its_sparsity(trained: dict[str, Checkpoint], method: str) -> None:
    checkpoint = trained[method]
    assert checkpoint.metrics["accuracy"] >= 0.6
    known = {"plain", "logitnorm", "mixup", "vos", "cigl", "temperature"}
    assert (checkpoint.unknown_index is None) == (method in known)
    for name, mask in checkpoint.masks.items():
        assert not checkpoint.state[name][~mask].any()


def test_methods_differ(trained: dict[str, Checkpoint]) -> None:
    heads = [checkpoint.state["head.bias"].tolist() for checkpoint in trained.values()]
    assert len({str(head) for head in heads}) == len(heads)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_resumes_to_the_same_bits(
    trained: dict[str, Checkpoint], tmp_path: Path, method: str
) -> None:
    class StopError(Exception):
        pass

    def stop(record: object) -> None:
        if getattr(record, "epoch", 0) == 4:
            raise StopError

    recipe = tiny_recipe(*METHODS[method])
    with pytest.raises(StopError):
        fit(recipe, tmp_path / "run", report=stop)
    resumed = fit(recipe, tmp_path / "run", resume=True)
    for name, value in trained[method].state.items():
        assert torch.equal(value, resumed.state[name]), name


def test_logitnorm_is_the_cross_entropy_of_normalised_logits() -> None:
    model = nn.Linear(3, 3)
    objective = _objective(model, PLAIN, "logitnorm.tau=0.5")
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    objective.start_epoch(1, [4])
    objective.start_step(0, 0)
    loss, logits = objective(model, x, y)
    z = model(x)
    assert torch.equal(logits, z)
    expected = F.cross_entropy(z / (0.5 * z.norm(dim=1, keepdim=True)), y)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_mixup_mixes_inputs_and_losses() -> None:
    model = nn.Linear(3, 3)
    objective = _objective(model, PLAIN, "mixup.alpha=1")
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    objective.start_epoch(1, [4, 4])
    objective.start_step(1, 1)
    mix = objective._mix
    assert mix is not None and 0.5 <= float(mix.share) < 1
    loss, logits = objective(model, x, y)
    share, others = mix.share, mix.partners
    z = model(share * x + (1 - share) * x[others])
    assert torch.allclose(logits, z, atol=1e-6)
    expected = share * F.cross_entropy(z, y) + (1 - share) * F.cross_entropy(z, y[others])
    assert torch.allclose(loss, expected, atol=1e-6)
    objective.start_step(0, 0)
    assert objective._mix is mix, "a captured graph would read the draws of another step"


def test_vos_adds_its_loss_once_the_queues_are_full() -> None:
    recipe = tiny_recipe(PLAIN, *VOS)
    session = Session(recipe, open_dataset(recipe, CPU), CPU)
    for group in session.optimizer.param_groups:
        # As on CUDA, where these kernels take momentum for all of a group or for none.
        group["fused"] = True
    outliers = session.objective._outliers
    assert outliers is not None
    before = outliers.phi.weight.detach().clone()
    session.run_epoch()
    session.run_epoch()
    assert outliers.full and not outliers.active
    assert torch.equal(outliers.phi.weight, before)
    session.run_epoch()
    assert outliers.active
    assert not torch.equal(outliers.phi.weight, before)
    assert not session.objective.capturable


def test_cigl_votes_without_the_dropped_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    votes: list[int] = []
    add = Votes.add

    def count(self: Votes, model: nn.Module, *rest: object) -> None:
        votes.append(sum(int((p != 0).sum()) for p in model.parameters() if p.ndim > 1))
        add(self, model, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Votes, "add", count)
    recipe = tiny_recipe(PLAIN, "cigl.rate=0.5")
    checkpoint = fit(recipe)
    active = checkpoint.metrics["nonzeros"]
    assert len(votes) == 2
    assert all(0.4 * active < count < 0.6 * active for count in votes)


def test_the_official_code_votes_through_the_first_tenth_of_an_epoch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("moon.trainer.session.SNAPSHOT_SHARE", 3)
    session_votes = fit(tiny_recipe("compat=votes")).metrics["votes"]
    # Six steps an epoch, two epochs that vote, a third of the steps of each.
    assert session_votes == 4


def test_a_tenth_of_few_steps_is_one(trained: dict[str, Checkpoint]) -> None:
    # Six steps an epoch: without a vote in each of the two there would be nothing to average.
    assert trained["official"].metrics["votes"] == 2


def _objective(model: nn.Module, *settings: str) -> Objective:
    recipe = tiny_recipe(*settings)
    unknown = 2 if recipe.unknown else None
    return Objective(recipe, model, known=3, unknown_index=unknown, device=CPU)
