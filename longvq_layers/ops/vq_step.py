"""Vector-quantised attention over a growing sequence: the public function, its checks and the choice of the backend."""

import torch
from torch import Tensor

from longvq_layers import _checks as check
from longvq_layers.ops import vq  # defines the operators
from longvq_layers.ops._attention_inputs import AttentionStepInputs
from longvq_layers.ops._attention_options import ACTIVATIONS, check_scale
from longvq_layers.ops._dispatch import choose, refuse_forward_mode
from longvq_layers.ops.reference import vq_step as reference
from longvq_layers.ops.vq_state import VQAttentionState

_NAMESPACE = {
    "native": torch.ops.longvq.vq_attention_step.default,
    "torch": torch.ops.longvq_torch.vq_attention_step.default,
}


def vq_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    codebook: Tensor,
    state: VQAttentionState,
    *,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    activation: str = "softmax",
    codes: Tensor | None = None,
    far_q: Tensor | None = None,
    far_k: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The next T tokens of causal :func:`vq_attention`, for generation. ``state`` holds the past; **updated in place**.

    A sequence may be cut into pieces anywhere: the results equal those of one call, ``vq_attention(q, k, v, codebook,
    causal=True, window=state.window, local_keys=state.local_keys, ...)``. A prompt of any length takes linear time,
    each further token constant time and memory. :meth:`VQAttentionState.clone` keeps the state from before a call. A
    call that raises because of its arguments leaves the state unchanged.

    A masked token is not part of its sequence: it takes no position and its output is 0. So prompts of different
    lengths can be padded on either side, prefilled in one call, and continued each at its own length.

    For inference only; there are no gradients.

    Args:
        q: queries (B, H, T, D), T ≥ 0, floating point, any strides.
        k: keys (B, Hkv, T, D), dtype of ``q``.
        v: values (B, Hkv, T, E), dtype of ``q``.
        codebook: codewords (Hkv, S, D), or (Hkv, S, F) with ``far_q``, floating point, finite; the same at every call
            of a sequence, because the state only stores codes. `vq_attention_state` has checked that they are finite.
        state: from :func:`vq_attention_state` or the previous call; float64 if and only if ``q`` is float64.
        bias: bias inside the window, (H, W) as ``bias[h, i − j]``; floating point. Default none.
        key_padding_mask: (B, T) bool, True = ignore that token. Default none.
        scale: factor of the scores; default ``D ** -0.5``. Must be None with ``activation="laplace"``, which divides
            the scores by the number of the row's tokens up to and including the query.
        activation: ``"softmax"`` (default) or ``"laplace"``.
        codes: codes (B, Hkv, T), int64; default those of the nearest codewords.
        far_q: queries (B, H, T, F) for pairs outside the window, see :func:`vq_attention`. Needs ``far_k`` and a state
            with ``local_keys="exact"`` and ``key_dim=D``. Default none.
        far_k: keys (B, Hkv, T, F) that the codewords represent.
        backend: ``"auto"`` (default), ``"native"``, ``"torch"`` or ``"reference"`` (one token after the other).

    Returns:
        (B, H, T, E) in the dtype of ``v``. Half precision is computed, and kept in the state, in float32.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value; the message names it.
        NotImplementedError: an argument requires a gradient while gradients are enabled, or ``backend="native"`` has no
            kernel for these arguments; the message has the reason.

    Example:
        >>> from longvq_layers.ops import vq_attention, vq_attention_state
        >>> codebook, (q, k, v) = torch.randn(4, 32, 16), torch.randn(3, 1, 4, 100, 16).unbind(0)
        >>> state, pieces = vq_attention_state(1, codebook, window=8), []
        >>> for x in zip(*(x.split([90, 1, 9], dim=2) for x in (q, k, v))):
        ...     pieces.append(vq_attention_step(*x, codebook, state))
        >>> torch.allclose(torch.cat(pieces, 2), vq_attention(q, k, v, codebook, causal=True, window=8), atol=1e-5)
        True

    Source: as :func:`vq_attention`; Transformer-VQ (arXiv 2309.16354) section 3.4 for the recurrence.
    """
    op = "vq_attention_step"
    if not isinstance(state, VQAttentionState):
        raise TypeError(
            f"{op}: state must be a VQAttentionState, from ops.vq_attention_state, got {type(state).__name__}"
        )
    has_far = far_q is not None or far_k is not None
    is_common = codes is None and key_padding_mask is None and scale is None and not has_far
    if not (is_common and _is_common_step(q, k, v, codebook, state, bias, activation)):
        _check(op, q, k, v, codebook, state, bias, key_padding_mask, scale, activation, codes, far_q, far_k)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, bias, far_q, far_k)):
        raise NotImplementedError(
            f"{op}: gradients are not supported, because the state is updated in place; call it under torch.no_grad() "
            "or torch.inference_mode(), or use vq_attention"
        )
    chosen = choose(op, backend, q.device, (q.dtype,))
    if chosen != "reference":
        refuse_forward_mode(op, q, k, v, bias, far_q, far_k)

    precise = state.far_sums.dtype
    if codes is None and chosen != "native":  # the compiled kernel finds the codes itself
        codes = vq.vq_assign((k if far_k is None else far_k).to(precise), codebook, backend=backend)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    bias = None if bias is None else bias.detach().to(precise)
    inputs = (q, k, v, codebook.detach().to(precise), codes, bias, key_padding_mask, far_q, far_k)
    if chosen == "reference":
        return reference.vq_attention_step(AttentionStepInputs(*inputs), state, scale, ACTIVATIONS.index(activation))
    return _NAMESPACE[chosen](*inputs, *state.tensors(), scale, state.window, ACTIVATIONS.index(activation))


def _is_common_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    codebook: Tensor,
    state: VQAttentionState,
    bias: Tensor | None,
    activation: str,
) -> bool:
    """Whether the call is valid and has the form that generation uses for every token; then `_check` is skipped."""
    try:
        batch, heads, length, head_dim = q.shape
        state_batch, kv_heads, codes, value_dim = state.far_sums.shape
        device = q.device
        return (
            activation in ACTIVATIONS
            and q.dtype is k.dtype is v.dtype is codebook.dtype is state.far_sums.dtype is torch.float32
            and head_dim > 0
            and batch == state_batch
            and heads % kv_heads == 0
            and k.shape == (batch, kv_heads, length, head_dim)
            and v.shape == (batch, kv_heads, length, value_dim)
            and codebook.shape == (kv_heads, codes, head_dim)
            and state.ring_keys.shape[3] in (0, head_dim)
            and (
                bias is None
                or (state.window > 0 and bias.shape == (heads, state.window) and bias.dtype is torch.float32)
            )
            and device == k.device == v.device == codebook.device == state.far_sums.device
            and (bias is None or bias.device == device)
        )
    except (AttributeError, ValueError, TypeError):  # an argument is no tensor, or has another rank
        return False


def _check(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    codebook: Tensor,
    state: VQAttentionState,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    scale: float | None,
    activation: str,
    codes: Tensor | None,
    far_q: Tensor | None,
    far_k: Tensor | None,
) -> None:
    vq.check_qkv(op, q, k, v)
    coded_keys = vq.check_far(op, q, k, far_q, far_k, state.local_keys)
    check.tensor(op, "codebook", codebook, "H S D")
    check.real(op, "codebook", codebook)
    check.one_of(op, "activation", activation, ACTIVATIONS)
    check_scale(op, scale, activation)
    vq.check_bias(op, bias, q.shape[1], state.window, causal=True)
    if key_padding_mask is not None:
        check.key_padding_mask(op, key_padding_mask, q.shape[0], q.shape[2])
    check.same_device(
        op, "q", q, k=k, v=v, codebook=codebook, bias=bias, key_padding_mask=key_padding_mask, codes=codes, state=state
    )
    _check_state(op, q, k, v, coded_keys, codebook, state)
    if codes is not None:
        vq.check_codes(op, codes, k, codebook)


def _check_state(
    op: str, q: Tensor, k: Tensor, v: Tensor, coded_keys: Tensor, codebook: Tensor, state: VQAttentionState
) -> None:
    batch, heads, codes, value_dim = state.far_sums.shape
    precise = torch.promote_types(q.dtype, torch.float32)
    if state.far_sums.dtype != precise:
        raise TypeError(
            f"{op}: state must be {precise} for q of {q.dtype}, got {state.far_sums.dtype}; make it with "
            "vq_attention_state from a codebook in that dtype"
        )
    if (k.shape[0], k.shape[1], v.shape[3]) != (batch, heads, value_dim):
        raise ValueError(
            f"{op}: k and v must have the (B, Hkv, E) = {(batch, heads, value_dim)} of the state, got "
            f"{(k.shape[0], k.shape[1], v.shape[3])}"
        )
    name = "k" if coded_keys is k else "far_k"
    expected = (heads, codes, coded_keys.shape[3])
    if tuple(codebook.shape) != expected:
        raise ValueError(
            f"{op}: codebook must have shape (H, S, D) = {expected}, with H and S of the state and D of {name}, "
            f"got {tuple(codebook.shape)}"
        )
    if state.ring_keys.shape[3] not in (0, k.shape[3]):
        raise ValueError(f"{op}: k must have the D = {state.ring_keys.shape[3]} of the state, got {k.shape[3]}")
