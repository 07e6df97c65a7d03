"""Masks of transformers models: the linear-size mask that we make, and how any mask is read."""

from collections.abc import Callable

import torch
from torch import Tensor

_ARGUMENT = "longvq attention: attention_mask"  # in errors


def longvq_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable[..., object] | None = None,
    attention_mask: Tensor | None = None,
    config: object = None,
    device: torch.device | None = None,
    **kwargs: object,
) -> Tensor:
    """The mask of a replaced model: only the padding, O(B·L) instead of O(B·L²). Its rank tells whether it is causal.

    Transformers calls this function (`AttentionMaskInterface`) once per forward pass.

    Returns:
        bool, True = attend: (B, kv) for a causal mask, (B, 1, 1, kv) for a bidirectional mask. Without padding it is
        one element expanded, which `read_mask` recognises by its strides.

    Raises:
        NotImplementedError: packed sequences, sliding windows, chunks, extra masks, prefixes, static caches.
    """
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    if mask_function is not causal_mask_function and mask_function is not bidirectional_mask_function:
        name = getattr(mask_function, "__name__", str(mask_function))
        raise NotImplementedError(
            "longvq attention: mask must be made by transformers' plain causal or bidirectional mask function, got "
            f"{name!r}. Packed sequences, sliding or chunked windows and overlays would be lost; pass one "
            "sequence per row with attention_mask= (under torch.compile always pass attention_mask=), or "
            "restore_attention(model)."
        )
    if isinstance(q_offset, Tensor) or isinstance(kv_offset, Tensor) or kv_offset != 0:
        raise NotImplementedError(
            "longvq attention: past_key_values must be the default DynamicCache (cache_implementation=None), got a "
            "static or sliding cache."
        )
    if kv_length != q_offset + q_length:
        raise NotImplementedError(
            f"longvq attention: past_key_values must give one key per position, got {kv_length} keys for queries at "
            f"positions {q_offset} to {q_offset + q_length - 1}. Static caches and prefixes are not supported; use the "
            "default DynamicCache."
        )
    if attention_mask is not None and tuple(attention_mask.shape) != (batch_size, kv_length):
        raise ValueError(
            f"{_ARGUMENT} must have shape {(batch_size, kv_length)} (batch, cached and new tokens), got "
            f"{tuple(attention_mask.shape)}"
        )
    if attention_mask is None:
        padding = torch.ones((), dtype=torch.bool, device=device).expand(batch_size, kv_length)
    else:
        padding = attention_mask.to(device=device, dtype=torch.bool)[:]  # an object of this forward, never the user's
    return padding if mask_function is causal_mask_function else padding[:, None, None, :]


def read_mask(mask: Tensor | None, *, causal: bool, q_len: int, k_len: int) -> tuple[bool, Tensor | None]:
    """Whether attention is causal, and the padding, from any mask that reached an attention module.

    Args:
        mask: None, the result of `longvq_mask`, or a dense (B or 1, 1, q, k) mask, bool (True = attend) or additive.
        causal: whether the module calls itself causal; decides if there is no mask.
        q_len, k_len: number of queries and keys; the queries are the last q_len positions.

    Returns:
        causal, and key_padding_mask (B, k) bool with True = ignore, or None.

    Raises:
        NotImplementedError: a mask that is more than causal and padding.
    """
    if mask is None:
        return causal, None
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4) or mask.shape[-1] != k_len:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise NotImplementedError(
            f"{_ARGUMENT} must be None or have shape (batch, {k_len}) or (batch, 1, {q_len}, {k_len}), got {got}"
        )
    if mask.dim() == 2:
        return True, _padding(mask)
    if mask.shape[1] != 1:
        raise NotImplementedError(
            f"{_ARGUMENT} must be one mask for all heads, got one mask per head {tuple(mask.shape)}"
        )
    allowed = _allowed(mask)[:, 0]  # (B, q or 1, k)
    if allowed.shape[1] == 1 and (q_len > 1 or not causal):
        return False, _padding(allowed[:, 0])
    return _read_dense(allowed, causal, q_len, k_len)


def _padding(attend: Tensor) -> Tensor | None:
    # longvq_mask expands one element over all keys if there is no padding: this needs no pass over the data.
    if attend.dtype != torch.bool:
        attend = attend != 0
    return None if attend.stride(0) == 0 and attend.stride(-1) == 0 else ~attend


def _allowed(mask: Tensor) -> Tensor:
    """bool or additive -> bool. Any other additive value is a bias that quantised keys can't carry."""
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        raise NotImplementedError(f"{_ARGUMENT} must be bool or float, got {mask.dtype}")
    masked = mask <= torch.finfo(mask.dtype).min / 2
    if not ((mask == 0) | masked).all():
        raise NotImplementedError(
            f"{_ARGUMENT} must hold 0 and -inf only, got an additive position bias, which has no linear-time form"
        )
    return ~masked


def _read_dense(allowed: Tensor, causal: bool, q_len: int, k_len: int) -> tuple[bool, Tensor]:
    """allowed (B, q, k) must be exactly "key is no padding" (∧ causal).

    The kind that the module says is tried first.
    """
    real = allowed[:, -1]  # (B, k): the last query sees every real key, causal or not
    kinds = (causal, not causal) if q_len > 1 else (causal,)
    for kind in kinds:
        if _fits(allowed, real, kind, q_len, k_len):
            return kind, ~real
    if causal:  # a batch row of padding alone may attend to everything: it has no real key
        real = real & ~allowed.flatten(1).all(-1, keepdim=True)
        if _fits(allowed, real, True, q_len, k_len):
            return True, ~real
    kind_name = "causal" if causal else "bidirectional"
    raise NotImplementedError(
        f"{_ARGUMENT} must be {kind_name} with padding, got a dense mask that is not exactly {kind_name} with padding "
        "(packed sequences, a sliding window or a prefix?); it has no linear-time form here"
    )


def _fits(allowed: Tensor, real: Tensor, causal: bool, q_len: int, k_len: int) -> bool:
    """Whether allowed (B, q, k) is the mask of these real keys (B, k).

    For a query without any real key, the row may be all False or all True.
    """
    expected = real[:, None].expand_as(allowed)
    if causal:
        position = torch.arange(k_len, device=allowed.device)
        expected = expected & (position[None, :] <= position[k_len - q_len :, None])  # (B, q, k)
    nothing = ~expected.any(-1, keepdim=True)  # (B, q, 1)
    row_is_free = nothing & (allowed.all(-1, keepdim=True) | ~allowed.any(-1, keepdim=True))
    return bool(((allowed == expected) | row_is_free).all())
