"""Elementwise steps of gated blocks that save only their inputs for backward.

Other operations save these inputs anyway. A composition of PyTorch's operators would save one more tensor of the size
of its output. A compiler gets PyTorch's operators: it decides itself what to recompute, and it can't trace an autograd
function with a forward-mode rule.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def silu_product(a: Tensor, b: Tensor) -> Tensor:
    """``silu(a) ⊙ b`` of tensors of one shape."""
    return _call(_SiluProduct, a, b, plain=False)


def gated_residual(logits: Tensor, new: Tensor, old: Tensor, *, recompute: bool = False) -> Tensor:
    """``g ⊙ new + (1 − g) ⊙ old`` with ``g = sigmoid(logits)``, of tensors of one shape.

    Set `recompute` if this is the last operation of a checkpointed part, which saves nothing. Plain operators then
    compute the result, so that the backward need not run this operation again.
    """
    return _call(_GatedResidual, logits, new, old, plain=recompute)


def _call(function: type[Function], *tensors: Tensor, plain: bool) -> Tensor:
    plain = plain or torch.compiler.is_compiling() or not torch.is_grad_enabled()  # then nothing is saved anyway
    return function.forward(*tensors) if plain else function.apply(*tensors)


class _SavesInputs(Function):
    """A function that saves its inputs for backward and forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)


def _silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return torch.ops.aten.silu_backward(grad, x)  # one pass over memory, but it can't be differentiated
    gate = x.sigmoid()
    return grad * gate * (1 + x * (1 - gate))


class _SiluProduct(_SavesInputs):
    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return torch.nn.functional.silu(a) * b

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        da = _silu_backward((grad * b).to(a.dtype), a) if ctx.needs_input_grad[0] else None
        db = (grad * torch.nn.functional.silu(a)).to(b.dtype) if ctx.needs_input_grad[1] else None
        return da, db

    @staticmethod
    def jvp(ctx: Any, da: Tensor, db: Tensor) -> Tensor:
        a, b = ctx.saved_tensors
        return _silu_backward(da, a) * b + torch.nn.functional.silu(a) * db


class _GatedResidual(_SavesInputs):
    @staticmethod
    def forward(logits: Tensor, new: Tensor, old: Tensor) -> Tensor:
        dtype = torch.promote_types(torch.promote_types(logits.dtype, new.dtype), old.dtype)
        return torch.lerp(old.to(dtype), new.to(dtype), logits.sigmoid().to(dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, new, old = ctx.saved_tensors
        wanted, gate = ctx.needs_input_grad, logits.sigmoid()
        # In this order at most three results and temporaries exist at a time.
        dlogits = torch.ops.aten.sigmoid_backward(grad * (new - old), gate).to(logits.dtype) if wanted[0] else None
        dnew = grad * gate
        dold = (grad - dnew).to(old.dtype) if wanted[2] else None
        return dlogits, dnew.to(new.dtype), dold

    @staticmethod
    def jvp(ctx: Any, dlogits: Tensor, dnew: Tensor, dold: Tensor) -> Tensor:
        logits, new, old = ctx.saved_tensors
        gate = logits.sigmoid()
        return (new - old) * gate * (1 - gate) * dlogits + gate * dnew + (1 - gate) * dold
