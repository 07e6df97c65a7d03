"""The norms of the blocks: their equations, padding masks, precision and running averages."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from longvq_layers.layers.parts.norm import NORMS, make_norm
from tests.tolerances import assert_close

each_kind = pytest.mark.parametrize("kind", NORMS)


def moved(kind: str, dim: int, **factory) -> nn.Module:
    """A norm whose parameters differ from their initial values."""
    norm = make_norm("test", kind, dim, **factory)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


def test_each_equals_its_equation():
    x = 3 * torch.randn(2, 9, 6, dtype=torch.float64) + 1
    layer, rms, scale, batch = (moved(kind, 6, dtype=torch.float64) for kind in ("layer", "rms", "scale", "batch"))
    mean, var = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
    assert_close(layer(x), (x - mean) / (var + 1e-5).sqrt() * layer.weight + layer.bias, "layer")
    root = (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert_close(rms(x), x / root * rms.weight, "rms")
    assert_close(scale(x), x / root * scale.scalar, "scale")
    mean, var = x.mean((0, 1)), x.flatten(0, 1).var(0, correction=0)
    assert_close(batch(x), (x - mean) / (var + 1e-5).sqrt() * batch.weight + batch.bias, "batch")


def test_batch_norm_equals_torch_on_unmasked_positions():
    ours, theirs = moved("batch", 5, dtype=torch.float64), nn.BatchNorm1d(5, dtype=torch.float64)
    theirs.load_state_dict({**ours.state_dict(), "num_batches_tracked": torch.tensor(0)})
    mask = torch.rand(3, 20) < 0.4
    for _ in range(3):
        x = torch.randn(3, 20, 5, dtype=torch.float64) * 2 + 1
        y = ours(x.masked_fill(mask.unsqueeze(-1), 7.0), mask)
        assert_close(y[~mask], theirs(x[~mask]), "training")
    assert_close(ours.running_mean, theirs.running_mean, "mean")
    assert_close(ours.running_var, theirs.running_var, "variance")
    assert_close(ours.eval()(x)[~mask], theirs.eval()(x[~mask]), "eval")


def test_batch_norm_without_positions_learns_nothing():
    norm = make_norm("test", "batch", 4)
    before = copy.deepcopy(norm.state_dict())
    for x, mask in ((torch.randn(2, 0, 4), None), (torch.randn(2, 3, 4), torch.ones(2, 3, dtype=torch.bool))):
        assert norm(x, mask).isfinite().all()
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    one = torch.ones(1, 1, 4)
    assert norm(one).isfinite().all() and norm.running_var.isfinite().all()  # the variance of one number


def test_batch_norm_learns_once_with_activation_checkpointing():
    norm, other = (make_norm("test", "batch", 4) for _ in range(2))
    x = torch.randn(2, 9, 4, requires_grad=True)
    checkpoint(norm, x, use_reentrant=False).square().sum().backward()
    other(x)
    assert torch.equal(norm.running_mean, other.running_mean) and torch.equal(norm.running_var, other.running_var)


@each_kind
def test_gradcheck(kind):
    norm = moved(kind, 3, dtype=torch.float64)
    names, values = zip(*norm.named_parameters(), strict=True)
    mask = torch.tensor([[False, False, True], [False, False, False]])
    x = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)

    def run(x, *values):
        y = torch.func.functional_call(norm, dict(zip(names, values, strict=True)), (x, mask))
        return y.masked_fill(mask.unsqueeze(-1), 0)

    assert torch.autograd.gradcheck(run, (x, *values))


@each_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(kind, dtype):
    norm = moved(kind, 64)
    norm(torch.randn(4, 10, 64) * 20 + 3)
    norm.eval()
    x = (torch.randn(2, 5, 64) * 20).to(dtype)
    half = copy.deepcopy(norm).to(dtype)
    assert half(x).dtype == dtype
    assert_close(half(x).float(), norm(x.float()), "half", dtype)
    assert make_norm("test", kind, 64, dtype=dtype)(x).dtype == dtype
    with torch.autocast("cpu", dtype):
        assert_close(norm(x).float(), norm(x.float()), "autocast", dtype)
    if kind == "batch":
        assert {value.dtype for value in half.state_dict().values()} == {torch.float32}


@each_kind
def test_constant_and_huge_inputs_stay_finite(kind):
    norm = make_norm("test", kind, 4)
    for value in (0.0, 1.0, 1e15):
        x = torch.full((2, 3, 4), value, requires_grad=True)
        y = norm(x)
        y.sum().backward()
        assert y.isfinite().all() and x.grad.isfinite().all(), value


@pytest.mark.parametrize("kind", ["scale", "batch"])  # the other norms are one call of PyTorch
def test_compiled_equals_eager(kind):
    norm = moved(kind, 4)
    compiled = torch.compile(copy.deepcopy(norm), fullgraph=True, backend="aot_eager")
    x, mask = torch.randn(2, 7, 4), torch.rand(2, 7) < 0.3
    assert_close(compiled(x, mask), norm(x, mask), "y")
    for name, value in norm.state_dict().items():
        assert_close(compiled.state_dict()[f"_orig_mod.{name}"], value, name)


def test_unknown_kinds_are_named():
    with pytest.raises(
        ValueError, match=r"Block: norm_type must be one of 'layer', 'rms', 'scale', 'batch', got 'group'"
    ):
        make_norm("Block", "group", 4)
