"""Vector-quantised attention: the public functions, their checks and the choice of the backend."""

import functools

import torch
from torch import Tensor

from longvq_layers import _checks as check
from longvq_layers.ops import _cuda_limits as cuda
from longvq_layers.ops import _schema  # noqa: F401  defines the operators
from longvq_layers.ops._attention_inputs import AttentionInputs
from longvq_layers.ops._attention_options import attention_options
from longvq_layers.ops._dispatch import choose, refuse_forward_mode
from longvq_layers.ops.reference import vq as reference

_NAMESPACE = {"native": torch.ops.longvq, "torch": torch.ops.longvq_torch}


def vq_assign(k: Tensor, codebook: Tensor, *, backend: str = "auto") -> Tensor:
    """The code of the codeword nearest to each key, ``z_j = argmin_s ‖k_j − C_s‖²``; of equal distances the lowest s.

    Distances are computed in float32 (float64 for float64 keys), also under autocast. Not differentiable.

    Args:
        k: keys (B, H, L, D), floating point, any strides.
        codebook: codewords (H, S, D) with S ≥ 1, one codebook per head, finite.
        backend: ``"auto"`` (default), ``"native"``, ``"torch"`` or ``"reference"``.

    Returns:
        Codes (B, H, L), int64, in [0, S).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value; the message names it.
        NotImplementedError: ``backend="native"`` has no kernel for these arguments; the message has the reason.

    Example:
        >>> codebook = torch.tensor([[[0.0, 0.0], [1.0, 1.0]]])
        >>> vq_assign(torch.tensor([[[[0.9, 0.8], [0.1, -0.2]]]]), codebook)
        tensor([[[1, 0]]])

    Source: van den Oord et al. 2017, "Neural Discrete Representation Learning", eq. 1.
    """
    op = "vq_assign"
    check.tensor(op, "k", k, "B H L D")
    check.real(op, "k", k)
    _check_codebook(op, k, codebook, heads_of="k")
    chosen = choose(op, backend, k.device, (k.dtype, codebook.dtype), lambda: cuda.assign(k))
    k, codebook = k.detach(), codebook.detach()
    if chosen == "reference":
        return reference.vq_assign(k, codebook)
    return _NAMESPACE[chosen].vq_assign(k, codebook)


def vq_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    codebook: Tensor,
    *,
    causal: bool = False,
    window: int = 0,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    activation: str = "softmax",
    local_keys: str = "quantized",
    key_grad: str = "cluster",
    codes: Tensor | None = None,
    far_q: Tensor | None = None,
    far_k: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention over vector-quantised keys, in time and memory linear in the length.

    ``out_i = Σ_j φ(scale · q_i·k̃_j + b_{j−i}) v_j`` over the keys j allowed for query i. A pair is inside the window
    if ``0 ≤ i − j < W`` (causal) or ``|i − j| < W`` (bidirectional). Inside the window ``k̃_j`` is the codeword of key
    j or, with ``local_keys="exact"``, the key itself, and the bias is added. Outside ``k̃_j`` is the codeword
    ``C_{z_j}``.

    With a codebook that contains every key this equals
    ``torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)``.

    Gradients of ``q``, ``v`` and ``bias`` are exact. Inside the window, gradients of ``k`` are straight-through, or
    exact with ``local_keys="exact"``. Outside the window, the keys that have the same code and batch row share the
    gradient of the codeword equally (``key_grad="cluster"``), or keys get no gradient (``"window"``). ``codebook`` gets
    no gradient: it is learned by moving averages (:class:`longvq_layers.Codebook`).

    Args:
        q: queries (B, H, L, D), floating point, any strides.
        k: keys (B, Hkv, L, D), dtype of ``q``; H must be a multiple of Hkv (grouped-query attention).
        v: values (B, Hkv, L, E), dtype of ``q``.
        codebook: codewords (Hkv, S, D), floating point, finite; keep it in float32 also for half-precision inputs.
        causal: whether query i sees keys j ≤ i only. Default False.
        window: W ≥ 0, in positions; 0 (default) means no window.
        bias: learned bias inside the window, floating point: (H, W) as ``bias[h, i − j]`` if causal, else (H, 2W − 1)
            as ``bias[h, j − i + W − 1]``. Default none.
        key_padding_mask: (B, L) bool, True = ignore that position. Its output is 0.
        cu_seqlens: (N+1,) int32, offsets of N documents packed into one row (B = 1), ascending from 0 to L. Document n
            has the positions ``cu_seqlens[n] ≤ i < cu_seqlens[n + 1]``; no query attends to another document. Default
            none.
        scale: factor of the scores; default ``D ** -0.5``. Must be None with ``activation="laplace"``, which divides
            the scores by the number of allowed keys.
        activation: ``"softmax"`` (default) or ``"laplace"`` (elementwise, not normalised).
        local_keys: the keys inside the window: ``"quantized"`` (default, as in the paper) or ``"exact"``.
        key_grad: the gradient of keys outside the window: ``"cluster"`` (default) or ``"window"`` (none).
        codes: codes (B, Hkv, L), int64; default ``vq_assign(k, codebook)``, or ``vq_assign(far_k, codebook)`` if
            ``far_k`` is given.
        far_q: queries (B, H, L, F) for pairs outside the window; default ``q``. Models with rotary positions need it:
            one codeword can't represent keys at many positions, so ``far_q`` and ``far_k`` carry no position. The
            codewords are then (Hkv, S, F). Needs ``local_keys="exact"`` and ``far_k``.
        far_k: keys (B, Hkv, L, F) that the codewords represent. They get the gradients of pairs outside the window.
        backend: ``"auto"`` (default), ``"native"``, ``"torch"`` or ``"reference"`` (dense, O(L²)).

    Returns:
        (B, H, L, E) in the dtype of ``v``; 0 for a query without allowed keys. Half precision is computed in float32.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value; the message names it.
        NotImplementedError: ``backend="native"`` has no kernel for these arguments; the message has the reason.

    Example:
        >>> q, k, v = torch.randn(3, 1, 4, 100, 16).unbind(0)
        >>> vq_attention(q, k, v, torch.randn(4, 32, 16), causal=True, window=8).shape
        torch.Size([1, 4, 100, 16])

    Source: LongVQ (arXiv 2404.11163) section 4.2; Transformer-VQ (arXiv 2309.16354) theorem 3.7; laplace: Mega
    (arXiv 2209.10655) eq. 16.
    """
    op = "vq_attention"
    check_qkv(op, q, k, v)
    coded_keys = check_far(op, q, k, far_q, far_k, local_keys)
    _check_codebook(op, coded_keys, codebook, heads_of="k" if coded_keys is k else "far_k")
    options = attention_options(
        op,
        head_dim=q.shape[-1],
        scale=scale,
        causal=causal,
        window=window,
        activation=activation,
        local_keys=local_keys,
        key_grad=key_grad,
    )
    check_bias(op, bias, q.shape[1], window, causal)
    if key_padding_mask is not None:
        check.key_padding_mask(op, key_padding_mask, q.shape[0], q.shape[2])
    if cu_seqlens is not None:
        check.cu_seqlens(op, "q", q, cu_seqlens, axis=2)
    check.same_device(op, "q", q, k=k, v=v, bias=bias, key_padding_mask=key_padding_mask, codes=codes)
    if codes is not None:
        check_codes(op, codes, k, codebook)
    declines = functools.partial(cuda.attention, q, v, far_q, cu_seqlens, activation)
    chosen = choose(op, backend, q.device, (q.dtype,), declines)

    if codes is None:
        # vq_assign chooses its own backend for "auto"; a backend that the user named serves both operators.
        codes = vq_assign(coded_keys, codebook, backend=backend)
    precise = torch.promote_types(q.dtype, torch.float32)
    bias = None if bias is None else bias.to(precise)
    codebook = codebook.detach().to(precise)
    inputs = AttentionInputs(q, k, v, codebook, codes, bias, key_padding_mask, cu_seqlens, far_q, far_k)
    if chosen == "reference":
        return reference.vq_attention(inputs, options)
    refuse_forward_mode(op, q, k, v, bias, far_q, far_k)
    return _NAMESPACE[chosen].vq_attention(*inputs, *options)[0]


def check_qkv(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """q, k and v have shapes and dtypes that belong together."""
    check.tensor(op, "q", q, "B H L D")
    check.tensor(op, "k", k, "B Hkv L D")
    check.tensor(op, "v", v, "B Hkv L E")
    check.real(op, "q", q)
    check.same_dtype(op, "q", q.dtype, k=k, v=v)
    batch, heads, length, head_dim = q.shape
    if k.shape[1] < 1 or heads % k.shape[1]:
        raise ValueError(
            f"{op}: the heads of q must be a multiple of those of k (grouped-query attention), "
            f"got {heads} and {k.shape[1]}"
        )
    check.size(op, "k", k, (batch, k.shape[1], length, head_dim), "B Hkv L D")
    check.size(op, "v", v, (batch, k.shape[1], length, v.shape[3]), "B Hkv L E")
    check.at_least_one(op, "q", q, 3, "key dimension D")
    check.at_least_one(op, "v", v, 3, "value dimension E")


def check_far(op: str, q: Tensor, k: Tensor, far_q: Tensor | None, far_k: Tensor | None, local_keys: str) -> Tensor:
    """Check ``far_q`` and ``far_k``; return the keys that the codewords represent: ``far_k`` if given, else ``k``."""
    if far_q is None and far_k is None:
        return k
    if far_q is None:
        raise ValueError(f"{op}: far_q must be given with far_k, got None")
    if far_k is None:
        raise ValueError(f"{op}: far_k must be given with far_q, got None")
    check.tensor(op, "far_q", far_q, "B H L F")
    check.tensor(op, "far_k", far_k, "B Hkv L F")
    check.same_dtype(op, "q", q.dtype, far_q=far_q, far_k=far_k)
    check.at_least_one(op, "far_q", far_q, 3, "key dimension F")
    check.size(op, "far_q", far_q, (*q.shape[:3], far_q.shape[3]), "B H L F")
    check.size(op, "far_k", far_k, (*k.shape[:3], far_q.shape[3]), "B Hkv L F")
    check.same_device(op, "q", q, far_q=far_q, far_k=far_k)
    if local_keys != "exact":
        raise ValueError(
            f'{op}: local_keys must be "exact" with far_q, which separates keys inside the window from codewords, '
            f"got {local_keys!r}"
        )
    return far_k


def _check_codebook(op: str, k: Tensor, codebook: Tensor, heads_of: str) -> None:
    """``codebook`` has the heads and the width of ``k``, an argument named ``heads_of``."""
    check.tensor(op, "codebook", codebook, "H S D")
    check.real(op, "codebook", codebook)
    check.same_device(op, heads_of, k, codebook=codebook)
    if codebook.shape[0] != k.shape[1] or codebook.shape[2] != k.shape[3]:
        raise ValueError(
            f"{op}: codebook must have shape (H, S, D) with the H = {k.shape[1]} and D = {k.shape[3]} of "
            f"{heads_of}, got {tuple(codebook.shape)}"
        )
    check.codebook_values(op, codebook)


def check_codes(op: str, codes: Tensor, k: Tensor, codebook: Tensor) -> None:
    """``codes`` has a code of the codebook for every key."""
    check.tensor(op, "codes", codes, "B Hkv L")
    if codes.dtype != torch.int64:
        raise TypeError(f"{op}: codes must be int64, got {codes.dtype}")
    check.size(op, "codes", codes, tuple(k.shape[:3]), "B Hkv L")
    if codes.numel() and check.values_are_readable(codes):
        low, high = (int(x) for x in codes.aminmax())
        if low < 0 or high >= codebook.shape[1]:
            raise ValueError(f"{op}: codes must lie in [0, S) = [0, {codebook.shape[1]}), got {low} to {high}")


def check_bias(op: str, bias: Tensor | None, num_heads: int, window: int, causal: bool) -> None:
    """``bias`` has an entry for every head and every offset inside the window."""
    if bias is None:
        return
    if window == 0:
        raise ValueError(f"{op}: bias must be None with window=0, since it applies inside the window; got a tensor")
    shape = "H W" if causal else "H 2W-1"
    check.tensor(op, "bias", bias, shape)
    check.real(op, "bias", bias)
    check.size(op, "bias", bias, (num_heads, window if causal else 2 * window - 1), shape)
