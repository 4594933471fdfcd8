"""account, against counts made by hand and against what torch really allocates."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from moon.errors import UsageError
from moon.trainer.accounting.accounts import account
from moon.trainer.accounting.memory import optimizer_bytes, saved_bytes
from moon.trainer.models import build
from tests.trainer.small import OPTIMIZERS, make, small_model, train


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 36, 5),
    )


EXAMPLE = torch.zeros(1, 2, 6, 6)


def test_a_small_network_by_hand() -> None:
    """float32 throughout, one image of 2x6x6.

    conv:   72 weights; output 4x6x6 = 144 numbers; keeps its input, 72 numbers.
    norm:   8 parameters, buffers 8 numbers and an int64; keeps its input, 144 numbers, and
            once mean and inverse deviation, 8 numbers.
    relu:   keeps its result, 144 numbers, which is the linear layer's input as well.
    linear: 720 weights, 5 biases; output 5 numbers; keeps its input, 144 numbers.
    """
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    mask = torch.zeros(5, 144, dtype=torch.bool)
    mask[:, :10] = True
    found = account(model, EXAMPLE, masks={"4.weight": mask}, optimizer=optimizer)
    conv, linear = found.layers
    assert (conv.dense_bytes, conv.activation_bytes, conv.saved_bytes) == (288, 576, 288)
    assert (conv.gradient_bytes, conv.slot_bytes, conv.mask_bytes) == (288, 2 * 288, 0)
    assert (linear.dense_bytes, linear.activation_bytes, linear.saved_bytes) == (2880, 20, 576)
    assert (linear.gradient_bytes, linear.slot_bytes, linear.mask_bytes) == (2880, 5760, 720)
    # 50 nonzeros: 200 bytes of values and 720 bits, or 5 rows of 2-byte columns.
    assert (linear.nonzeros, linear.sparse_format, linear.sparse_bytes) == (50, "bitmask", 290)
    rest = found.rest
    assert (rest.parameter_bytes, rest.gradient_bytes, rest.slot_bytes) == (52, 52, 104)
    assert (rest.buffer_bytes, rest.saved_bytes, rest.saved_once_bytes) == (40, 576, 32)
    assert found.dense_bytes == 288 + 2880 + 52 + 40
    assert found.sparse_bytes == 288 + 290 + 52 + 40
    assert found.activation_bytes == 596 and found.saved_bytes == 288 + 576 + 576
    steady = 3260 + 3220 + 6440 + 720
    assert found.training_bytes(64) == steady + 32 + 64 * 1440
    assert found.totals(64)["training_bytes"] == found.training_bytes(64)
    assert found.dense_flops == 2 * (72 * 36 + 720) and found.flops == 2 * (72 * 36 + 50)


def kept_by(model: nn.Module, batch: Tensor) -> int:
    """Bytes that the graph of one forward pass really holds, found after the fact: every
    tensor its nodes saved, apart from parameters and buffers, each storage once."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}
    todo, seen = [model.train()(batch).grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [parent for parent, _ in node.next_functions]
        for name in dir(node):
            value = getattr(node, name) if name.startswith("_saved_") else None
            for tensor in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in own:
                    found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(found.values())


@pytest.mark.parametrize(("name", "size"), [("cnn", 12), ("resnet18", 16), ("mobilenet_v2", 32)])
def test_what_autograd_keeps_is_what_its_graph_holds(name: str, size: int) -> None:
    model = build(name, outputs=3, channels=3, size=(size, size))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    saved = saved_bytes(model, torch.zeros(1, 3, size, size))
    each = sum(saved.layers.values()) + saved.elsewhere
    for batch in (2, 5):
        real = kept_by(model, torch.zeros(batch, 3, size, size))
        assert saved.once + batch * each == real


def test_layers_keep_their_inputs() -> None:
    inputs = {}
    model = build("cnn", outputs=3, size=(12, 12))
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_pre_hook(
                lambda _, args, name=name: inputs.__setitem__(f"{name}.weight", args[0].numel())
            )
    saved = saved_bytes(model, torch.zeros(1, 3, 12, 12))
    model.eval()(torch.zeros(1, 3, 12, 12))
    assert saved.layers == {name: 4 * count for name, count in inputs.items()}


def test_a_tensor_that_two_layers_keep_is_counted_once() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x.sin()
            return self.one(x) + self.two(x)

    saved = saved_bytes(Shared(), torch.zeros(1, 6))
    assert saved.layers == {"one.weight": 24, "two.weight": 0}
    assert saved.elsewhere == 0 and saved.once == 0


def test_mixed_precision_keeps_half_and_the_cast_weights() -> None:
    model = nn.Sequential(nn.Linear(64, 32, bias=False), nn.Linear(32, 8, bias=False))
    example = torch.zeros(1, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = account(model, example)
    assert [layer.saved_bytes for layer in found.layers] == [2 * 64, 2 * 32]
    assert [layer.activation_bytes for layer in found.layers] == [2 * 32, 2 * 8]
    # The gradient of the second layer's input needs that layer's weight, cast.
    assert found.rest.saved_once_bytes == 2 * 32 * 8
    assert found.layers[0].dense_bytes == 4 * 64 * 32


def test_frozen_weights_have_neither_gradient_nor_state() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    conv, linear = account(model, EXAMPLE, slots=1).layers
    assert (conv.gradient_bytes, conv.slot_bytes, conv.saved_bytes) == (0, 0, 0)
    assert (linear.gradient_bytes, linear.slot_bytes) == (2880, 2880)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_foreseen_as_it_comes(name: str) -> None:
    model = small_model()
    optimizer = OPTIMIZERS[name](model.parameters())
    before = optimizer_bytes(optimizer)
    assert not optimizer.state or name == "adagrad"
    train(model, optimizer, range(2))
    assert before == optimizer_bytes(optimizer)
    real = sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for key, value in state.items()
        if isinstance(value, Tensor) and key != "step"
    )
    # NAdam and others keep single numbers a parameter besides.
    assert sum(before.values()) == pytest.approx(real, abs=64)


def test_groups_count_by_their_own_settings() -> None:
    model = network()
    groups = [{"params": model[0].parameters()}, {"params": model[4].parameters(), "momentum": 0.9}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    found = account(model, EXAMPLE, optimizer=optimizer)
    assert [layer.slot_bytes for layer in found.layers] == [0, 2880]
    assert found.rest.slot_bytes == 20


def test_the_sparsifier_hooks_do_not_run_and_its_masks_are_counted() -> None:
    model, optimizer, sparsifier = make("adam")
    found = account(model, torch.zeros(1, 1, 6, 6), masks=sparsifier.masks, optimizer=optimizer)
    assert sparsifier.step_count == 0
    assert found.mask_bytes == sum(mask.numel() for mask in sparsifier.masks.values())
    assert found.slot_bytes == 2 * found.gradient_bytes
    dense = account(small_model(), torch.zeros(1, 1, 6, 6), slots=2)
    assert found.training_bytes(16) - found.mask_bytes == dense.training_bytes(16)


def test_accounting_leaves_everything_as_it_was() -> None:
    model = nn.Sequential(network(), nn.Dropout(0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model[0][1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    account(model, EXAMPLE + 1, optimizer=optimizer)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(generator, torch.get_rng_state())
    assert model.training and not model[0][1].training
    assert not optimizer.state and not any(p.grad is not None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_cannot_be_accounted_is_refused() -> None:
    model = network()
    with pytest.raises(UsageError, match="the same twice"):
        account(model, EXAMPLE, slots=1, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(UsageError, match=r"how many numbers LBFGS keeps.*Give slots="):
        account(model, EXAMPLE, optimizer=torch.optim.LBFGS(model.parameters()))
    with pytest.raises(UsageError, match="a batch of one example"):
        account(model, EXAMPLE.repeat(2, 1, 1, 1))
