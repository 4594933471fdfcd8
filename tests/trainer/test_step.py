from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from moon.trainer.batches import RawBatch
from moon.trainer.objective.objective import Objective
from moon.trainer.sparsity.sparsifier import Sparsifier
from moon.trainer.step import WARM_UP, Step, Tally, _Graph, _Recorder
from tests.trainer.recipes_small import tiny_recipe

CPU = torch.device("cpu")


def test_the_tally_sums_by_hand() -> None:
    tally = Tally(2, 2, CPU)
    logits = torch.tensor([[5.0, 0.0, 0.0], [0.0, 0.0, 9.0]])
    tally.add(torch.tensor(0.5), logits, torch.tensor([0, 1]))
    tally.add(torch.tensor(2.0), logits[:1], torch.tensor([1]))
    sums = tally.sums()
    assert sums.loss == 0.5 * 2 + 2.0
    # The unknown wins the second image, but answers are given among the known classes: 0.
    assert sums.correct == 1
    p = logits.softmax(1)[:, 2]
    assert sums.p_unknown == pytest.approx(float(2 * p[0] + p[1]), rel=1e-6)
    assert tally.first_bad is None
    tally.reset()
    assert (tally.sums().loss, tally.sums().correct) == (0, 0)


def test_the_tally_remembers_the_first_loss_that_is_not_finite() -> None:
    tally = Tally(2, None, CPU)
    for loss in (1.0, float("inf"), float("nan")):
        tally.add(torch.tensor(loss), torch.zeros(1, 2), torch.tensor([0]))
    assert tally.first_bad == (1, float("inf"))
    tally.reset()
    assert tally.first_bad is None


def test_a_step_is_the_textbook_one_at_the_rate_given() -> None:
    model, step, batch = _parts(lr=123.0)
    x, y = _prepare(batch), batch.labels
    reference = nn.Linear(12, 3)
    reference.load_state_dict(model.state_dict())
    for rate, share in ((0.1, 1.0), (0.01, 0.5)):
        step(replace(batch, share=share), rate, step=0, number=0)
        reference.zero_grad()
        (nn.functional.cross_entropy(reference(x), y) * share).backward()
        with torch.no_grad():
            for parameter in reference.parameters():
                assert parameter.grad is not None
                parameter -= rate * parameter.grad
        assert torch.allclose(model.weight, reference.weight, atol=1e-6)


def test_the_share_is_not_in_the_sums() -> None:
    _, step, batch = _parts()
    x, y = _prepare(batch), batch.labels
    expected = nn.functional.cross_entropy(step._model(x), y).detach()
    step(replace(batch, share=0.25), 0.1, step=0, number=0)
    assert step._tally.sums().loss == pytest.approx(float(expected) * len(y), rel=1e-5)


def test_the_branch_names_the_path_of_the_loss() -> None:
    moon = _objective(nn.Linear(12, 3), "moon.warmup_epochs=2")
    branches: list[Hashable] = []
    for epoch in range(1, 5):
        moon.start_epoch(epoch, [4])
        branches.append(moon.branch)
        moon(nn.Linear(12, 3), torch.zeros(4, 12), torch.tensor([0, 1, 0, 1]))
    warming, tuned = branches[0], branches[2]
    assert branches == [warming, warming, tuned, tuned] and warming != tuned
    plain = _objective(nn.Linear(12, 3), "moon.enabled=false")
    seen = set()
    for epoch in (1, 4, 6):
        plain.start_epoch(epoch, [4])
        seen.add(plain.branch)
    assert len(seen) == 1 and seen.isdisjoint({warming, tuned})


def test_raw_batches_are_copied_in_place() -> None:
    batch = _batch()
    copy = batch.clone()
    other = RawBatch(pixels=batch.pixels + 1, labels=batch.labels + 1, crops=None)
    where = copy.pixels.data_ptr()
    copy.copy_(other)
    assert copy.pixels.data_ptr() == where
    assert torch.equal(copy.pixels, other.pixels) and torch.equal(copy.labels, other.labels)
    assert not torch.equal(batch.pixels, other.pixels)


def test_graphs_are_for_cuda_only() -> None:
    _, step, batch = _parts()
    for _ in range(2 * WARM_UP):
        assert step._graph(batch) is None


def test_replays_with_updates_between_equal_the_eager_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A "graph" that runs the captured step as a replay would: on the batch it was captured
    # with, without the sparsifier counting.
    captures, capturing = [], [False]

    def capture(
        _: _Recorder,
        compute: Callable[[RawBatch], None],
        batch: RawBatch,
        buffers: tuple[Tensor, ...],
    ) -> _Graph:
        static = batch.clone()
        captures.append(buffers)

        def replay() -> None:
            capturing[0] = True
            compute(static)
            capturing[0] = False

        return _Graph(replay=replay, batch=static, buffers=buffers)

    monkeypatch.setattr(_Recorder, "capture", capture)
    monkeypatch.setattr("moon.trainer.sparsity.sparsifier._capturing", lambda: capturing[0])
    results = []
    for graphs in (False, True):
        model, step, _ = _parts(density=0.5)
        step._graphs = graphs
        for number in range(30):
            step(_batch(number), 0.1, step=number, number=number)
        sparsifier = step._sparsifier
        assert (sparsifier.step_count, sparsifier.update_count) == (30, 4)
        results.append((step._tally.sums(), model.weight.detach().clone()))
    assert len(captures) == 1
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


def test_a_failed_capture_is_said_once_and_training_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def capture(*args: object) -> _Graph:
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(_Recorder, "capture", capture)
    _, step, batch = _parts()
    said: list[str] = []
    step._graphs, step._say = True, said.append
    for number in range(10):
        step(batch, 0.1, step=number, number=number)
    assert step._sparsifier.step_count == 10
    assert said == [
        "training without CUDA graphs: the step could not be captured: "
        "operation not permitted when stream is capturing"
    ]


@pytest.mark.gpu
def test_graphs_and_the_eager_path_give_the_same_bits() -> None:
    device = torch.device("cuda")
    losses, weights = {}, {}
    for graphs in (False, True):
        model, step, _ = _parts(device=device, graphs=graphs, density=0.5)
        found = []
        for number in range(30):
            step._tally.reset()
            step(_batch(number, device), 0.1, step=number, number=number)
            found.append(step._tally.sums().loss)
        assert bool(step._captured) is graphs, "the step was not captured"
        losses[graphs], weights[graphs] = found, model.weight.detach().clone()
        assert step._sparsifier.step_count == 30 and step._sparsifier.update_count == 4
    assert losses[False] == losses[True]
    assert torch.equal(weights[False], weights[True])


@pytest.mark.gpu
@pytest.mark.parametrize("index", [0, 1])
def test_graphs_of_two_sizes_share_memory_and_draw_dropout_like_the_eager_path(index: int) -> None:
    if index >= torch.cuda.device_count():
        pytest.skip("needs a second GPU")
    device = torch.device("cuda", index)
    results = []
    for graphs in (False, True):
        model, step, _ = _parts(device=device, graphs=graphs, density=0.5, dropout=0.3)
        torch.manual_seed(1)
        for number in range(30):
            count = 3 if number % 3 == 2 else 4
            step(_batch(number, device, count), 0.1, step=number, number=number)
        assert len(step._captured) == (2 if graphs else 0)
        results.append((step._tally.sums(), model.weight.detach().clone()))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.gpu
def test_training_goes_on_where_it_was_after_a_failed_capture() -> None:
    device = torch.device("cuda")
    stream = torch.cuda.current_stream()
    said: list[str] = []
    results = []
    for waits in (False, True):
        model, step, _ = _parts(device=device, graphs=waits, density=0.5, dropout=0.3)
        step._say = said.append
        if waits:
            # No capture may wait for the device, as this does.
            step._prepare = lambda batch: _prepare(batch) * float(batch.pixels.ne(-1).any())
        torch.manual_seed(1)
        for number in range(12):
            step(_batch(number, device), 0.1, step=number, number=number)
        results.append((step._tally.sums(), model.weight.detach().clone()))
    assert len(said) == 1 and "previous error" not in said[0]
    assert torch.cuda.current_stream() == stream
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


def _prepare(batch: RawBatch) -> Tensor:
    return batch.pixels.flatten(1).float() / 255


def _batch(seed: int = 0, device: torch.device = CPU, count: int = 4) -> RawBatch:
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 255, (count, 2, 2, 3), dtype=torch.uint8, generator=draw)
    return RawBatch(
        pixels=pixels.to(device),
        labels=torch.randint(0, 3, (count,), generator=draw).to(device),
        crops=None,
    )


def _objective(model: nn.Module, *settings: str, device: torch.device = CPU) -> Objective:
    recipe = tiny_recipe(*settings)
    unknown = 2 if recipe.unknown else None
    return Objective(recipe, model, known=2, unknown_index=unknown, device=device)


def _parts(
    *,
    lr: float = 0.1,
    device: torch.device = CPU,
    graphs: bool = True,
    density: float = 1.0,
    dropout: float = 0.0,
) -> tuple[nn.Linear, Step, RawBatch]:
    torch.manual_seed(0)
    model = nn.Linear(12, 3).to(device)
    trained = nn.Sequential(nn.Dropout(dropout), model) if dropout else model
    rate = torch.tensor(lr, device=device) if device.type == "cuda" else lr
    fused = True if device.type == "cuda" else None
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, fused=fused)
    sparsifier = Sparsifier(
        model, optimizer, density=density, rule="rigl", interval=5, total_steps=40, stop=0.6
    )
    objective = _objective(model, "moon.enabled=false", device=device)
    tally = Tally(3, None, device)
    step = Step(trained, optimizer, sparsifier, objective, tally, _prepare, device, graphs=graphs)
    return model, step, _batch(device=device)
