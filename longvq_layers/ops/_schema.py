"""Every operator of this library: schema, default implementation, fake, autograd.

Each operator is defined in two namespaces. ``longvq_torch::x`` always runs the PyTorch code. ``longvq::x`` has the same
PyTorch code as its default (``CompositeExplicitAutograd``), and the compiled library overrides the default for the
devices that it has kernels for. So all operators exist, compile, export and differentiate with and without the library,
whether the library is loaded before or after this file.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from longvq_layers.ops._attention_inputs import AttentionGradients, AttentionInputs, AttentionStepInputs
from longvq_layers.ops._attention_options import LOCAL_KEYS, AttentionOptions, LocalKeys, schema_of
from longvq_layers.ops._scan_inputs import ScanInputs
from longvq_layers.ops.torch.assign import vq_assign
from longvq_layers.ops.torch.attention import vq_attention
from longvq_layers.ops.torch.attention_backward import vq_attention_backward
from longvq_layers.ops.torch.attention_step import vq_attention_step
from longvq_layers.ops.torch.packed_ssm import ssm_scan, ssm_scan_backward
from longvq_layers.ops.torch.ssm_step import ssm_step, ssm_step_backward
from longvq_layers.ops.vq_state import VQAttentionState

NATIVE, TORCH = "longvq", "longvq_torch"
_libraries = {namespace: torch.library.Library(namespace, "DEF") for namespace in (NATIVE, TORCH)}


def _define(schema: str, default: Callable, fake: Callable) -> None:
    name = schema[: schema.index("(")]
    for namespace, library in _libraries.items():
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, default, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)


def _no_double_backward(name: str) -> None:
    """Make double backward an error. Without an error, PyTorch would silently leave these gradients out."""

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(
            f'{name}: double backward is not supported by the compiled and the torch backend; use backend="reference"'
        )

    for namespace, library in _libraries.items():
        torch.library.register_autograd(
            f"{namespace}::{name}_backward", refuse, setup_context=lambda ctx, inputs, output: None, lib=library
        )


def _define_autograd(name: str, setup_context: Callable, backward: Callable) -> None:
    for namespace, library in _libraries.items():
        # The backward runs in the namespace of its forward.
        ops = getattr(torch.ops, namespace)
        torch.library.register_autograd(
            f"{namespace}::{name}",
            lambda ctx, *grads, ops=ops: backward(ops, ctx, *grads),
            setup_context=setup_context,
            lib=library,
        )


# ---- vq_assign ------------------------------------------------------------------------------------------------------


def _vq_assign_fake(k: Tensor, codebook: Tensor) -> Tensor:
    return torch.empty(k.shape[:3], dtype=torch.int64, device=k.device)


_define("vq_assign(Tensor k, Tensor codebook) -> Tensor", vq_assign, _vq_assign_fake)

# ---- vq_attention ---------------------------------------------------------------------------------------------------

_NUM_INPUTS = len(AttentionInputs._fields)


def _call(arguments: Sequence[Any]) -> tuple[AttentionInputs, AttentionOptions]:
    """The arguments of the operator as the two objects that all Python code takes."""
    return AttentionInputs(*arguments[:_NUM_INPUTS]), AttentionOptions(*arguments[_NUM_INPUTS:])


def _vq_attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    return vq_attention(*_call(arguments))


def _vq_attention_backward(grad: Tensor, out: Tensor, normalizers: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return tuple(vq_attention_backward(grad, out, normalizers, *_call(arguments)))


def _vq_attention_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs, _ = _call(arguments)
    q, v = inputs.q, inputs.v
    return v.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(*q.shape[:3], 2, dtype=inputs.precise)


def _vq_attention_backward_fake(grad: Tensor, out: Tensor, normalizers: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    inputs, _ = _call(arguments)

    def like(x: Tensor | None) -> Tensor:
        return inputs.q.new_empty(0) if x is None else x.new_empty(x.shape)

    return tuple(like(x) for x in (inputs.q, inputs.k, inputs.v, inputs.bias, inputs.far_q, inputs.far_k))


def _vq_attention_setup(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor]) -> None:
    tensors, ctx.options = inputs[:_NUM_INPUTS], inputs[_NUM_INPUTS:]
    ctx.save_for_backward(*output, *tensors)


def _vq_attention_grad(ops: Any, ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    out, normalizers, *tensors = ctx.saved_tensors
    gradients = AttentionGradients(*ops.vq_attention_backward(grad, out, normalizers, *tensors, *ctx.options))
    inputs = AttentionInputs(*tensors)
    # Gradients of absent tensors are empty: the schema has no optional results.
    of_inputs = {name: gradient for name, gradient in gradients._asdict().items() if getattr(inputs, name) is not None}
    return *(of_inputs.get(name) for name in AttentionInputs._fields), *[None] * len(ctx.options)


_ATTENTION = f"{schema_of(AttentionInputs)}, {schema_of(AttentionOptions)}"
_define(f"vq_attention({_ATTENTION}) -> (Tensor, Tensor)", _vq_attention, _vq_attention_fake)
_define(
    f"vq_attention_backward(Tensor grad, Tensor out, Tensor normalizers, {_ATTENTION}) "
    f"-> ({', '.join(['Tensor'] * len(AttentionGradients._fields))})",
    _vq_attention_backward,
    _vq_attention_backward_fake,
)
_define_autograd("vq_attention", _vq_attention_setup, _vq_attention_grad)
_no_double_backward("vq_attention")

# ---- vq_attention_step ----------------------------------------------------------------------------------------------

_NUM_STEP_INPUTS = len(AttentionStepInputs._fields)


def _vq_attention_step(*arguments: Any) -> Tensor:
    inputs = AttentionStepInputs(*arguments[:_NUM_STEP_INPUTS])
    *tensors, scale, window, activation = arguments[_NUM_STEP_INPUTS:]
    ring_keys = tensors[4]
    local_keys = LOCAL_KEYS[LocalKeys.EXACT if ring_keys.shape[3] > 0 else LocalKeys.QUANTIZED]
    state = VQAttentionState(*(*tensors, window, local_keys))
    return vq_attention_step(inputs, state, scale, activation)


def _vq_attention_step_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return v.new_empty(*q.shape[:3], v.shape[-1])


# No autograd: the step overwrites its state, which a backward would need. `ops.vq_attention_step` refuses gradients.
_define(
    f"vq_attention_step({schema_of(AttentionStepInputs)}, Tensor(a!) far_sums, Tensor(b!) far_counts, "
    "Tensor(c!) ring_codes, Tensor(d!) ring_keys, Tensor(e!) ring_values, Tensor(f!) lengths, float scale, int window, "
    "int activation) -> Tensor",
    _vq_attention_step,
    _vq_attention_step_fake,
)

# ---- ssm_scan -------------------------------------------------------------------------------------------------------

_NUM_SCAN_INPUTS = len(ScanInputs._fields)


def _ssm_scan(*arguments: Any) -> tuple[Tensor, Tensor]:
    return ssm_scan(ScanInputs(*arguments))


def _ssm_scan_backward(grad_y: Tensor, grad_state: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    inputs = ScanInputs(*arguments[:_NUM_SCAN_INPUTS])
    return tuple(ssm_scan_backward(grad_y, grad_state, inputs, *arguments[_NUM_SCAN_INPUTS:]))


def _ssm_scan_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs = ScanInputs(*arguments)
    rows = inputs.u.shape[0] if inputs.cu_seqlens is None else inputs.cu_seqlens.shape[0] - 1
    return inputs.u.new_empty(inputs.u.shape), inputs.log_decay.new_empty(rows, *inputs.log_decay.shape)


def _ssm_scan_backward_fake(grad_y: Tensor, grad_state: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    inputs = ScanInputs(*arguments[:_NUM_SCAN_INPUTS])
    need_inputs, need_parameters = arguments[_NUM_SCAN_INPUTS:]
    family, real = inputs.log_decay.dtype, inputs.log_decay.real.dtype

    def like(x: Tensor | None, needed: bool, dtype: torch.dtype) -> Tensor:
        return inputs.u.new_empty(x.shape if x is not None and needed else 0, dtype=dtype)

    return (
        like(inputs.u, need_inputs, inputs.u.dtype),
        like(inputs.log_decay, need_parameters, family),
        like(inputs.weight, need_parameters, family),
        like(inputs.skip, need_parameters, real),
        like(inputs.initial_state, need_inputs, family),
    )


def _ssm_scan_setup(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _ssm_scan_grad(ops: Any, ctx: Any, grad_y: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors  # read only once: under checkpointing each access computes them again
    need_u, need_log_decay, need_weight, need_skip, need_initial = ctx.needs_input_grad[:5]
    needed = need_u or need_initial, need_log_decay or need_weight or need_skip
    gradients = ops.ssm_scan_backward(grad_y, grad_state, *tensors, ctx.reverse, *needed)
    return *(g if need else None for g, need in zip(gradients, ctx.needs_input_grad, strict=False)), None, None, None


_SCAN = schema_of(ScanInputs)
_define(f"ssm_scan({_SCAN}) -> (Tensor, Tensor)", _ssm_scan, _ssm_scan_fake)
_define(
    f"ssm_scan_backward(Tensor grad_y, Tensor grad_state, {_SCAN}, bool need_inputs, bool need_parameters) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _ssm_scan_backward,
    _ssm_scan_backward_fake,
)
_define_autograd("ssm_scan", _ssm_scan_setup, _ssm_scan_grad)
_no_double_backward("ssm_scan")

# ---- ssm_step -------------------------------------------------------------------------------------------------------


def _ssm_step_fake(
    u: Tensor, decay: Tensor, weight: Tensor, skip: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), state.new_empty(state.shape)


def _ssm_step_setup(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor]) -> None:
    u, decay, weight, skip, state = inputs
    ctx.save_for_backward(u, decay, weight, skip, state, output[1])


def _ssm_step_grad(ops: Any, ctx: Any, grad_y: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
    return ssm_step_backward(grad_y, grad_state, *ctx.saved_tensors)


_define(
    "ssm_step(Tensor u, Tensor decay, Tensor weight, Tensor? skip, Tensor state) -> (Tensor, Tensor)",
    ssm_step,
    _ssm_step_fake,
)
_define_autograd("ssm_step", _ssm_step_setup, _ssm_step_grad)
