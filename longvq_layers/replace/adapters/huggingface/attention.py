"""The attention function that replaced modules of transformers models call, see `huggingface`."""

import contextlib

import torch
from torch import Tensor, nn

from longvq_layers.replace.adapters.huggingface import attach as by_name
from longvq_layers.replace.adapters.huggingface import forward_hook as calls
from longvq_layers.replace.adapters.huggingface import support as refusals
from longvq_layers.replace.adapters.huggingface.masks import read_mask
from longvq_layers.replace.slot.recorder import Recorder


def longvq_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """The attention function that transformers calls: query (B, H, q, D), key and value (B, Hkv, k, D).

    `dropout` isn't applied to the probabilities; the report says so for every layer that has one.

    Returns:
        output (B, q, H, E), and None for the attention weights.
    """
    seam = module._modules.get(by_name.NAME)
    if seam is None:
        seam = by_name.attach(module, query, key)
    with seam.refusals() if isinstance(seam, Recorder) else contextlib.nullcontext():
        return _attend(module, seam, query, key, value, attention_mask, scaling, dropout, is_causal, kwargs)


def _attend(
    module: nn.Module,
    seam: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    is_causal: bool | None,
    kwargs: dict,
) -> tuple[Tensor, Tensor | None]:
    call = calls.taken(seam)
    if isinstance(seam, calls.Probe):
        seam.keys = key
        return value.new_zeros(*query.shape[:3], value.shape[3]).transpose(1, 2).contiguous(), None
    refusals.check_call(kwargs)
    layer = call.cache_layer
    q_len, k_len = query.shape[2], key.shape[2] + (0 if layer is None else layer.positions)
    says = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if call.eager and attention_mask is None:
        says = False  # the eager attention goes by masks alone, whatever the module says of itself
    causal, padding = read_mask(attention_mask, causal=bool(says), q_len=q_len, k_len=k_len)
    if causal and not says and call.skips_masks and attention_mask.dim() == 2 and q_len == k_len:
        causal = padding is not None and bool(padding.any())
    if not causal and q_len == 1 and k_len == 1:  # of one token alone both are the same
        causal = True
    if padding is not None and padding.shape[0] != query.shape[0]:
        padding = padding.expand(query.shape[0], -1)
    if q_len > k_len or (q_len < k_len and not causal):
        raise NotImplementedError(
            f"longvq attention: got {q_len} queries for {k_len} keys in {'causal' if causal else 'bidirectional'} "
            "attention; expected as many keys as queries (with a cache: more keys, causal). Cross-attention and "
            "prefixes can't be replaced; leave them out with filter_fn="
        )
    if value.shape[1] != key.shape[1]:
        raise NotImplementedError(
            f"longvq attention: got values of {value.shape[1]} heads for keys of {key.shape[1]}; expected as many"
        )
    far = None
    if call.rotation is not None:
        if not causal and not calls.stays_rotated(seam, "bidirectional attention has far keys on both sides"):
            raise NotImplementedError(
                'longvq attention: far_positions: "rectified" needs causal attention, got a bidirectional call; use '
                '"rotated"'
            )
        if key.shape[2] != q_len:
            raise NotImplementedError(
                f"longvq attention: got {q_len} queries for {k_len} keys of a cache that grows, whose keys can't be "
                "taken without their positions any more; call the model under torch.no_grad() in eval mode, with an "
                "empty cache at first, or use far_positions='rotated'"
            )
        far = None if seam.rotary is None else seam.rotary(query, key, *call.rotation)
    if isinstance(seam, Recorder):
        if attention_mask is not None and attention_mask.dim() == 2:  # made by name: the original reads dense masks
            past = torch.ones(q_len, k_len, dtype=torch.bool, device=query.device).tril()
            attention_mask = attention_mask.bool()[:, None, None, :] & past
        output, weights = seam.original(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, is_causal=is_causal, **kwargs
        )
        options = {"causal": causal, "key_padding_mask": padding, "scale": scaling}
        seam.observe(query, key, value, output.transpose(1, 2), far=far, **options)
        return output, weights
    if layer is not None and not causal:
        layer.close(q_len)  # what it keeps are sums over the past: queries that see the future can't be served by them
        layer = None
    if layer is not None:
        padding = layer.check(padding, attention_mask, q_len)
        output = seam.step(query, key, value, layer.state, padding, far=far, scale=scaling)
        layer.advance(q_len)
        return output.transpose(1, 2).contiguous(), None
    if q_len < k_len:  # the queries are the last positions; the earlier rows are computed and dropped
        query = torch.cat([query.new_zeros(*query.shape[:2], k_len - q_len, query.shape[3]), query], dim=2)
    output = seam(query, key, value, padding, far=far, causal=causal, scale=scaling)
    return output[:, :, k_len - q_len :].transpose(1, 2).contiguous(), None
