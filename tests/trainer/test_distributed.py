"""Two processes over gloo: equal masks, the mean gradient, one w."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moon.trainer.objective.loss import UnknownAwareLoss
from moon.trainer.sparsity.sparsifier import Sparsifier

pytestmark = pytest.mark.slow

RANKS = 2
STARTED = [[True, True, False, False]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_rank, args=(str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def test_opposite_gradients_score_zero(results: list[dict[str, Any]]) -> None:
    # |mean| is 0 where the ranks disagree by +-10 and 1 where they agree; mean |g| is not.
    for result in results:
        assert result["opposite"].tolist() == [[True, False, False, True]]


@pytest.mark.parametrize("rule", ["rigl", "set"])
def test_masks_are_equal_on_all_ranks(results: list[dict[str, Any]], rule: str) -> None:
    first, second = (result[rule] for result in results)
    assert first == second and first["updates"] == 5


def test_w_is_the_same_everywhere(results: list[dict[str, Any]]) -> None:
    first, second = results
    assert first["average"] != second["average"]
    assert first["w"] == second["w"]
    assert first["w"] == pytest.approx((first["average"] + second["average"]) / 2, rel=1e-6)


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS
    )
    try:
        found = {
            "opposite": _opposite(rank),
            "rigl": _evolve(rank, "rigl"),
            "set": _evolve(rank, "set"),
            **_weight(rank),
        }
        torch.save(found, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def _opposite(rank: int) -> torch.Tensor:
    model = nn.Linear(4, 1, bias=False)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.0)
    sparsifier = Sparsifier(wrapped, optimizer, density=0.5, interval=1, drop_fraction=0.5)
    state = sparsifier.state_dict()
    state["masks"]["weight"] = torch.tensor(STARTED)
    sparsifier.load_state_dict(state)
    model.weight.data = torch.tensor([[2.0, 1.0, 0.0, 0.0]])
    sign = 1.0 if rank == 0 else -1.0
    for _ in range(2):
        optimizer.zero_grad()
        wrapped(torch.tensor([[0.0, 0.0, 10.0 * sign, 1.0]])).sum().backward()
        optimizer.step()
    return sparsifier.masks["weight"]


def _evolve(rank: int, rule: str) -> dict[str, Any]:
    torch.manual_seed(0)
    wrapped = DistributedDataParallel(nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 5)))
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9)
    sparsifier = Sparsifier(wrapped, optimizer, density=0.2, rule=rule, interval=2)
    torch.manual_seed(100 + rank)
    for _ in range(11):
        optimizer.zero_grad()
        wrapped(torch.randn(8, 20)).square().mean().backward()
        optimizer.step()
    digest = hashlib.sha256()
    for mask in sparsifier.masks.values():
        digest.update(mask.numpy().tobytes())
    return {"masks": digest.hexdigest(), "updates": sparsifier.update_count}


def _weight(rank: int) -> dict[str, Any]:
    criterion = UnknownAwareLoss(total_epochs=1001, warmup_epochs=1, init_factor=1.0, w_final=0.0)
    criterion.start_epoch(1)
    torch.manual_seed(rank)
    criterion(torch.randn(16, 5), torch.randint(0, 4, (16,)))
    average = criterion.auto_weight.average
    criterion.start_epoch(2)
    return {"average": average, "w": criterion.auto_weight.w_initial}
