"""Elementwise steps that save only their inputs: values, derivatives of all kinds, and saved tensors."""

import pytest
import torch
from torch.nn import functional as F

from longvq_layers.layers.parts.pointwise import gated_residual, silu_product
from tests.tolerances import assert_close


def plain_silu_product(a, b):
    return F.silu(a) * b


def plain_gated_residual(logits, new, old):
    gate = logits.sigmoid()
    return gate * new + (1 - gate) * old


each = pytest.mark.parametrize(
    ("ours", "plain", "count"), [(silu_product, plain_silu_product, 2), (gated_residual, plain_gated_residual, 3)]
)


@each
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # PyTorch's jvp calls it
def test_values_and_derivatives(ours, plain, count):
    leaves = [torch.randn(2, 5, dtype=torch.float64, requires_grad=True) for _ in range(count)]
    assert_close(ours(*leaves), plain(*leaves), "y")
    assert torch.autograd.gradcheck(ours, leaves, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(ours, leaves)
    for wanted in range(count):  # any subset of the inputs may need a gradient
        some = [leaf.detach().requires_grad_(i == wanted) for i, leaf in enumerate(leaves)]
        (own,) = torch.autograd.grad(ours(*some).square().sum(), some[wanted])
        (other,) = torch.autograd.grad(plain(*some).square().sum(), some[wanted])
        assert_close(own, other, f"gradient {wanted}")


@each
def test_only_inputs_are_saved(ours, plain, count):
    leaves = [torch.randn(2, 5, requires_grad=True) for _ in range(count)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        ours(*leaves)
    assert {x.data_ptr() for x in saved} == {x.data_ptr() for x in leaves}


@each
@pytest.mark.parametrize("dtypes", [(torch.bfloat16,) * 3, (torch.bfloat16, torch.bfloat16, torch.float32)])
def test_half_and_mixed_types(ours, plain, count, dtypes):
    results = []
    torch.manual_seed(2)
    leaves = [torch.randn(40, 5).to(dtype) for dtype in dtypes[:count]]
    for function in (ours, plain):
        own = [leaf.clone().requires_grad_() for leaf in leaves]
        y = function(*own)
        y.float().square().sum().backward()
        results.append([y, *(leaf.grad for leaf in own)])
    for first, second in zip(*results, strict=True):
        assert first.dtype == second.dtype
        assert_close(first.float(), second.float(), "half", torch.bfloat16)


@each
def test_functional_transforms_and_compilation(ours, plain, count):
    leaves = [torch.randn(3, 4, 5) for _ in range(count)]
    assert_close(torch.vmap(ours)(*leaves), plain(*leaves), "vmap")
    gradients = [
        torch.vmap(torch.func.grad(lambda *x, f=f: f(*x).square().sum(), argnums=0))(*leaves) for f in (ours, plain)
    ]
    assert_close(*gradients, "vmap of grad")
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    some = [leaf.clone().requires_grad_() for leaf in leaves]
    own = torch.autograd.grad(compiled(*some).square().sum(), some)
    other = torch.autograd.grad(plain(*some).square().sum(), some)
    for first, second in zip(own, other, strict=True):
        assert_close(first, second, "compiled")
