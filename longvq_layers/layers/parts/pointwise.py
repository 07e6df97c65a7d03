"""Elementwise steps of gated blocks that save only their inputs for backward, which others save as well.

Composed of PyTorch's operators each would keep one more activation of the size of its output. A compiler decides by
itself what to compute again, and cannot trace an autograd function with a forward-mode rule: it gets the operators.
"""

import torch
from torch import Tensor
from torch.autograd import Function


def silu_product(a: Tensor, b: Tensor) -> Tensor:
    """``silu(a) ⊙ b`` of tensors of one shape."""
    return _call(_SiluProduct, a, b, plain=False)


def gated_residual(logits: Tensor, new: Tensor, old: Tensor, *, recompute: bool = False) -> Tensor:
    """``g ⊙ new + (1 − g) ⊙ old`` with ``g = sigmoid(logits)``, of tensors of one shape.

    `recompute`: it is the last step of what checkpointing computes again, keeps nothing and need not run a second time.
    """
    return _call(_GatedResidual, logits, new, old, plain=recompute)


def _call(function: type[Function], *tensors: Tensor, plain: bool) -> Tensor:
    plain = plain or torch.compiler.is_compiling() or not torch.is_grad_enabled()  # these keep nothing anyway
    return function.forward(*tensors) if plain else function.apply(*tensors)


def _silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return torch.ops.aten.silu_backward(grad, x)  # one pass, but without a derivative of its own
    gate = x.sigmoid()
    return grad * gate * (1 + x * (1 - gate))


class _SiluProduct(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(a, b):
        return torch.nn.functional.silu(a) * b

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        da = _silu_backward((grad * b).to(a.dtype), a) if ctx.needs_input_grad[0] else None
        db = (grad * torch.nn.functional.silu(a)).to(b.dtype) if ctx.needs_input_grad[1] else None
        return da, db

    @staticmethod
    def jvp(ctx, da, db):
        a, b = ctx.saved_tensors
        return _silu_backward(da, a) * b + torch.nn.functional.silu(a) * db


class _GatedResidual(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(logits, new, old):
        dtype = torch.promote_types(torch.promote_types(logits.dtype, new.dtype), old.dtype)
        return torch.lerp(old.to(dtype), new.to(dtype), logits.sigmoid().to(dtype))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        logits, new, old = ctx.saved_tensors
        wanted, gate = ctx.needs_input_grad, logits.sigmoid()
        # In this order no more than three results and temporaries exist at a time.
        dlogits = torch.ops.aten.sigmoid_backward(grad * (new - old), gate).to(logits.dtype) if wanted[0] else None
        dnew = grad * gate
        dold = (grad - dnew).to(old.dtype) if wanted[2] else None
        return dlogits, dnew.to(new.dtype), dold

    @staticmethod
    def jvp(ctx, dlogits, dnew, dold):
        logits, new, old = ctx.saved_tensors
        gate = logits.sigmoid()
        return (new - old) * gate * (1 - gate) * dlogits + gate * dnew + (1 - gate) * dold
