"""The attention function that replaced modules of transformers models call."""

import torch
from torch import Tensor, nn

from longvq_layers.replace.adapters.base import BOTH_SIDES
from longvq_layers.replace.adapters.huggingface.attach import attach
from longvq_layers.replace.adapters.huggingface.masks import read_mask
from longvq_layers.replace.adapters.huggingface.support import check_keywords
from longvq_layers.replace.slot.attention_slot import AttentionSlot, find_slot
from longvq_layers.replace.slot.context import FarQueryKey, ForwardContext, claim_context


def longvq_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: object,
) -> tuple[Tensor, Tensor | None]:
    """Attend with the module's slot: query (B, H, q, D), key and value (B, Hkv, k, D).

    `dropout` isn't applied to the probabilities; the report says so for every layer that has dropout.

    Returns:
        output (B, q, H, E), and None for the attention weights.
    """
    slot = find_slot(module)
    if slot is None:
        slot = attach(module, query, key)
    with slot.refusals():
        context = claim_context(slot)
        if context.probe is not None:
            context.probe.keys = key
            return value.new_zeros(*query.shape[:3], value.shape[3]).transpose(1, 2).contiguous(), None
        check_keywords(kwargs)
        past = 0 if context.cache_layer is None else context.cache_layer.positions
        q_len, k_len = query.shape[2], key.shape[2] + past
        says_causal = bool(getattr(module, "is_causal", True)) if is_causal is None else bool(is_causal)
        causal, padding = _read_mask(context, attention_mask, says_causal, query.shape[0], q_len, k_len)
        _check_sizes(key, value, causal, q_len, k_len)
        far = _far_pairs(slot, context, query, key, causal, k_len)
        if slot.original is not None:
            mask = _dense_mask(attention_mask, q_len, k_len)
            options = {"scaling": scaling, "dropout": dropout, "is_causal": is_causal, **kwargs}
            output, weights = slot.original(module, query, key, value, mask, **options)
            by_head = output.transpose(1, 2)
            slot.observe(query, key, value, by_head, far=far, causal=causal, key_padding_mask=padding, scale=scaling)
            return output, weights
        layer = context.cache_layer
        if layer is not None and not causal:
            layer.close(q_len)  # it keeps sums over the past, which can't serve queries that see the future
            layer = None
        if layer is not None:
            output = layer.attend(query, key, value, padding, attention_mask, far=far, scale=scaling)
            return output.transpose(1, 2).contiguous(), None
        if q_len < k_len:  # the queries are the last positions; the rows before them are computed and dropped
            query = torch.cat([query.new_zeros(*query.shape[:2], k_len - q_len, query.shape[3]), query], dim=2)
        output = slot(query, key, value, padding, far=far, causal=causal, scale=scaling)
        return output[:, :, k_len - q_len :].transpose(1, 2).contiguous(), None


def _read_mask(
    context: ForwardContext, mask: Tensor | None, says_causal: bool, batch: int, q_len: int, k_len: int
) -> tuple[bool, Tensor | None]:
    """Causal or not, and the padding (B, k)."""
    if context.eager and mask is None:
        says_causal = False  # the eager attention uses masks alone, whatever the module says of itself
    causal, padding = read_mask(mask, causal=says_causal, q_len=q_len, k_len=k_len)
    if causal and not says_causal and context.skips_masks and mask is not None and mask.dim() == 2 and q_len == k_len:
        # Transformers would have made no mask here, and the module would have attended to both sides.
        causal = padding is not None and bool(padding.any())
    if q_len == 1 and k_len == 1:  # causal and bidirectional attention are the same for a single token
        causal = True
    if padding is not None and padding.shape[0] != batch:
        padding = padding.expand(batch, -1)
    return causal, padding


def _dense_mask(mask: Tensor | None, q_len: int, k_len: int) -> Tensor | None:
    """A mask made by `longvq_mask` as the dense mask that the original attention reads."""
    if mask is None or mask.dim() != 2:
        return mask
    past = torch.ones(q_len, k_len, dtype=torch.bool, device=mask.device).tril()
    return mask.bool()[:, None, None, :] & past


def _check_sizes(key: Tensor, value: Tensor, causal: bool, q_len: int, k_len: int) -> None:
    if q_len > k_len or (q_len < k_len and not causal):
        raise NotImplementedError(
            "longvq attention: key must have one key per query (with a cache: more keys, causal), got "
            f"{q_len} queries for {k_len} keys in {'causal' if causal else 'bidirectional'} attention. Cross-attention "
            "and prefixes can't be replaced; leave them out with filter_fn="
        )
    if value.shape[1] != key.shape[1]:
        raise NotImplementedError(
            f"longvq attention: value must have as many heads as key, got {value.shape[1]} and {key.shape[1]}"
        )


def _far_pairs(
    slot: AttentionSlot, context: ForwardContext, query: Tensor, key: Tensor, causal: bool, k_len: int
) -> FarQueryKey | None:
    """Queries and keys without positions, if they arrived with positions that must be removed."""
    if context.rotation is None:
        return None
    if not causal and not slot.keep_rotated(BOTH_SIDES):
        raise NotImplementedError(
            'longvq attention: the attention must be causal with far_positions="rectified", got a bidirectional call; '
            'use far_positions="rotated"'
        )
    if key.shape[2] != query.shape[2]:
        raise NotImplementedError(
            f"longvq attention: past_key_values must be empty at first, got {query.shape[2]} queries for {k_len} keys "
            "of a cache that grows: the positions of its keys can't be removed any more. Call the model under "
            "torch.no_grad() in eval mode, with an empty cache at first, or use far_positions='rotated'"
        )
    return None if slot.rotary is None else slot.rotary(query, key, *context.rotation)
