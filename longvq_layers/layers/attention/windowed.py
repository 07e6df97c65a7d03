"""Exact softmax attention in a sliding window, in linear time: blocks of queries with the keys around them."""

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

_LEAST_ROWS = 32  # least number of queries in a block: below it, overhead dominates


def windowed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    causal: bool,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    past: int = 0,
) -> Tensor:
    """``out_i = Σ_j softmax_j(q_i·k_j / √D + b_{j−i}) v_j`` over ``0 ≤ i−j < W`` (causal) or ``|i−j| < W``.

    Time and memory are O(L·W). The arguments are not checked.

    Args:
        q: (B, H, L, D).
        k, v: (B, Hkv, past + L, D), first those before the queries, then those at the queries' positions.
        window: W ≥ 1, in positions.
        causal: whether a query sees only itself and the past.
        bias: (H, W) as ``bias[h, i−j]`` causal, (H, 2W − 1) as ``bias[h, j−i+W−1]`` otherwise. Default none.
        key_padding_mask: (B, past + L) bool, True = ignore. Default none.
        cu_seqlens: (N+1,) int32, offsets of documents that don't see each other; needs B = 1 and past = 0. Default
            none.
        past: number of keys before the first query, at most W − 1.

    Returns:
        (B, H, L, D). A masked query sees itself alone, so that no softmax is empty.
    """
    batch, _, length, _ = q.shape
    if length == 0:
        return q
    # Branches instead of min(): with symbolic lengths, min() leaves expressions that make compiling slow.
    rows = max(window, _LEAST_ROWS)
    rows = length if length < rows else rows  # queries of a block
    count = -(-length // rows)  # blocks
    back = (window if window < past + length else past + length) - 1  # keys before a block's first query
    ahead = 0 if causal else (window if window < length else length) - 1  # keys after a block's last query
    width = back + rows + ahead  # keys of a block
    sides = (back - past, count * rows - length + ahead)  # padding of the keys that makes all blocks equally wide

    index = torch.arange(max(rows, width), device=q.device)
    offset = index[:rows, None] - index[:width] + back  # (rows, width)  i − j
    near = offset.abs() < window
    if causal:
        near = near & (offset >= 0)
    if bias is not None:
        column = offset if causal else window - 1 - offset
        bias = bias.to(q.dtype)[:, column.clamp(0, bias.shape[1] - 1)]  # (H, rows, width)

    # Positions with the same label see each other. A position labelled −1 sees only itself.
    labels = torch.zeros(1, past + length, dtype=torch.int32, device=q.device)
    if cu_seqlens is not None:
        positions = torch.arange(length, dtype=torch.int32, device=q.device)
        labels = torch.bucketize(positions, cu_seqlens, right=True, out_int32=True).unsqueeze(0)
    if key_padding_mask is not None:
        labels = labels.masked_fill(key_padding_mask, -1)
    labels = pad(labels, sides, value=-1)
    key_labels = labels.unfold(1, width, rows)  # (1 or B, count, width)
    query_labels = torch.unflatten(labels[:, back : back + count * rows], 1, (count, rows))

    # Contiguous before padding: padding by nothing keeps strides, other padding makes tensors contiguous, and a graph
    # that is compiled for all lengths must not depend on the difference.
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    q = pad(q, (0, 0, 0, count * rows - length))
    q = torch.unflatten(q, 2, (count, rows)).transpose(1, 2)  # (B, count, H, rows, D)
    k, v = (pad(x, (0, 0, *sides)).unfold(2, width, rows).permute(0, 2, 1, 4, 3) for x in (k, v))  # … width, D

    def attend(blocks: slice, all_keys_exist: bool) -> Tensor:
        """(B, blocks, H, rows, D). Blocks whose keys all exist share one mask."""
        allowed = near
        if not all_keys_exist:
            of_query, of_key = query_labels[:, blocks].unsqueeze(-1), key_labels[:, blocks].unsqueeze(-2)
            allowed = (near & (of_query == of_key) & (of_key >= 0)) | (offset == 0)
            allowed = allowed.expand(batch, *allowed.shape[1:]).flatten(0, 1).unsqueeze(1)  # (B·blocks, 1, rows, width)
        mask = allowed if bias is None else torch.where(allowed, bias, -torch.inf)
        queries, keys, values = (x[:, blocks].flatten(0, 1) for x in (q, k, v))
        grouped = q.shape[2] != k.shape[2]
        out = scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=grouped)
        return torch.unflatten(out, 0, (batch, blocks.stop - blocks.start))

    first = last = 0  # the blocks between them have all their keys
    if key_padding_mask is None and cu_seqlens is None:
        first = -(-(back - past) // rows)
        last = max(first, (length - ahead) // rows)
    parts = ((slice(0, first), False), (slice(first, last), True), (slice(last, count), False))
    out = torch.cat([attend(blocks, full) for blocks, full in parts if blocks.start < blocks.stop], dim=1)
    return out.transpose(1, 2).flatten(2, 3)[:, :, :length]
