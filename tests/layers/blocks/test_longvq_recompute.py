"""LongVQBlock(recompute=True): the same numbers with less memory."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from longvq_layers.layers import LongVQBlock, commitment_loss
from tests.layers.blocks.longvq_blocks import LENGTH, OPTIONS, WIDTH, block_of
from tests.tolerances import assert_close


def results_of_training(block, call, x, mask) -> list[torch.Tensor]:
    """Output, gradients, and buffers of codebook and norms after two training forwards."""
    torch.manual_seed(5)
    for _ in range(2):
        x = x.detach().requires_grad_()
        y = call(x, mask)
        (y.square().mean() + commitment_loss(block)).backward()
    return [y, x.grad, *(p.grad for p in block.parameters()), *block.buffers()]


NAMES = ["default", "post", "batch", "no_ffn", "gelu_glu", "heads", "gates_of_x", "dense"]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    ("name", "around"),
    [*((name, around) for name in NAMES for around in ("nothing", "checkpoint")), ("default", "compile")],
)
def test_training_is_the_same(name, around, dropout):
    torch.compiler.reset()  # the limit of recompilations counts blocks that earlier tests compiled
    plain = block_of(name, True).train()
    for module in plain.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    x = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64)
    mask = torch.zeros(2, LENGTH, dtype=torch.bool)
    mask[1, 9:] = True
    plain(x, mask)  # the k-means start of a codebook can't be compiled
    block = copy.deepcopy(plain)
    block.recompute = True
    call = {
        "nothing": lambda block: block,
        "checkpoint": lambda block: lambda *inputs: checkpoint(block, *inputs, use_reentrant=False),
        "compile": lambda block: torch.compile(block, fullgraph=True, backend="aot_eager"),
    }[around]
    own, expected = (results_of_training(b, call(b), x, mask) for b in (block, plain))
    assert len(own) == len(expected) > 10
    for first, second in zip(own, expected, strict=True):
        assert_close(first.double(), second.double(), "training")


@pytest.mark.parametrize("name", OPTIONS)
def test_fewer_activations_are_saved(name):
    kept = {}
    block = block_of(name, False).train().float()
    x = torch.randn(1, 200, WIDTH)
    block(x)
    own = {p.untyped_storage().data_ptr() for p in block.parameters()}
    for recompute in (False, True):
        block.recompute = recompute
        storages = {}

        def keep(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no other tensor gets its address
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = block(x)
        kept[recompute] = sum(t.untyped_storage().nbytes() for key, t in storages.items() if key not in own)
        y.sum().backward()
    assert kept[False] - kept[True] > 6 * x.nbytes, kept


def test_evaluation_and_steps_stay_the_same():
    block = LongVQBlock(WIDTH, num_codes=4, d_state=4, causal=True, recompute=True)
    x = torch.randn(2, 20, WIDTH)
    block(x).sum().backward()
    block.eval()
    with torch.no_grad():
        y, _ = block.step(x, block.initial_state(2))
        assert_close(y, block(x), "step")
    assert "recompute=True" in repr(block) and "recompute=False" in repr(LongVQBlock(WIDTH))
