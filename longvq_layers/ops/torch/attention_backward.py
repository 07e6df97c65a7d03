"""Backward of vector-quantised attention in linear time: the weights of each block are computed again, none is stored.

With ``P`` the weights, ``dP = dO·Vᵀ`` and ``dS`` the gradient of the scores (softmax: ``P ∘ (dP − rowsum(dO ∘ O))``):

* near pairs give ``dq``, ``dv`` and ``db`` as in any attention, and ``dk`` by the straight-through estimator for pairs
  inside the window;
* pairs outside the window give their key gradient to the codeword; with ``key_grad="cluster"`` the row's keys of that
  code share it equally: ``dk_j += dC_{z_j} / n_{z_j}``;
* the gradient of a block's per-code sums goes back to the values of all its far keys, through the adjoint of the
  running sums.
"""

import torch
from torch import Tensor

from longvq_layers.ops._packed import documents, part
from longvq_layers.ops.torch.far_field import segment_sum
from longvq_layers.ops.torch.scores import Options, Scores, laplace, laplace_grad


def diagonal_sums(x: Tensor) -> Tensor:
    """(…, T, K) -> (…, T + K − 1): entry o is the sum over all pairs with ``column − row = o − (T − 1)``."""
    rows, columns = x.shape[-2:]
    # Append T zeros to each (flipped) row and cut the memory into rows one shorter: row r shifts right by r.
    skew = torch.nn.functional.pad(x.flip(-2), (0, rows)).flatten(-2)[..., : rows * (rows + columns - 1)]
    return skew.unflatten(-1, (rows, rows + columns - 1)).sum(-2)


def vq_attention_backward(
    grad: Tensor,
    out: Tensor,
    normalizers: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    codebook: Tensor,
    codes: Tensor,
    bias: Tensor | None,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    activation: str,
    local_keys: str,
    key_grad: str,
    near_dim: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and bias (an empty tensor without bias), in the dtypes of those arguments."""
    if out.numel() == 0:
        empty = q.new_empty(0) if bias is None else torch.zeros_like(bias)
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), empty
    if cu_seqlens is not None:
        options = (scale, causal, window, activation, local_keys, key_grad, near_dim)
        dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
        dbias = q.new_empty(0) if bias is None else torch.zeros_like(bias, memory_format=torch.contiguous_format)
        for at in documents("vq_attention", cu_seqlens, q.shape[2]):
            rows, mask = (part(x, at, 2) for x in (grad, out, normalizers, q, k, v)), part(key_padding_mask, at, 1)
            dq[:, :, at], dk[:, :, at], dv[:, :, at], more = vq_attention_backward(
                *rows, codebook, part(codes, at, 2), bias, mask, None, *options
            )
            dbias += more
        return dq, dk, dv, dbias
    options = Options(scale, causal, window, activation, local_keys, key_grad, near_dim)
    with torch.autocast(q.device.type, enabled=False):
        s = Scores(q, k, v, codebook, codes, bias, key_padding_mask, options)
        precise = s.v.dtype
        grad = grad.to(precise)
        if key_padding_mask is not None:
            grad = grad.masked_fill(key_padding_mask[:, None, :, None], 0)
        delta = (grad * out).sum(-1, keepdim=True)

        def grouped(x: Tensor) -> Tensor:
            return x.unflatten(1, (s.kv_heads, s.group))

        grad, delta, normalizers = grouped(grad), grouped(delta), grouped(normalizers)
        dq = torch.empty_like(s.q, memory_format=torch.contiguous_format)
        dv = torch.zeros_like(s.v, memory_format=torch.contiguous_format)
        dk_window = s.v.new_zeros(s.batch, s.kv_heads, s.length, s.width)
        dk_outside = torch.zeros_like(dk_window)  # near pairs outside the window
        dcode = s.v.new_zeros(s.batch, s.kv_heads, s.num_codes, s.width)
        dbias = None if s.bias is None else torch.zeros_like(s.bias)
        dvalues = torch.zeros_like(s.far_values, memory_format=torch.contiguous_format)

        for block in range(s.blocks.count):
            rows, keys = s.blocks.rows(block), s.blocks.near(block)
            q_block, do, d = (s.rows_of(x, rows) for x in (s.q, grad, delta))
            codewords = s.near_codewords(keys)
            values, far_values = s.v[:, :, keys], s.far_values[s.far_index(block)]
            near, far = s.near(q_block, codewords, rows, keys), s.far(q_block, block)
            dp_near, dp_far = do @ values.transpose(2, 3), do @ far_values.transpose(2, 3)
            if activation == "softmax":
                top, total = s.rows_of(normalizers, rows).split(1, -1)
                p_near, p_far = near.sub_(top).exp_().div_(total), far.sub_(top).exp_().div_(total)
                ds_near, ds_far = dp_near.sub_(d).mul_(p_near), dp_far.sub_(d).mul_(p_far)
            else:
                p_near, p_far = laplace(near), laplace(far)
                ds_near, ds_far = dp_near.mul_(laplace_grad(near)), dp_far.mul_(laplace_grad(far))
            del near, far

            dv[:, :, keys] += p_near.transpose(2, 3) @ do
            dvalues[s.far_index(block)] += p_far.transpose(2, 3) @ do
            dq_block = ds_far @ s.codebook
            dcode += ds_far.transpose(2, 3) @ q_block

            in_window = s.tile(rows, keys)[0]
            ds_near = ds_near.view(s.batch, s.kv_heads, s.group, *in_window.shape)
            inside = ds_near * in_window
            outside = (ds_near - inside).flatten(2, 3)
            if dbias is not None:
                add_bias_grad(dbias, inside, rows, keys, options)
            inside = inside.flatten(2, 3)
            local = codewords if s.k is None else s.k[:, :, keys]
            dq_block += inside @ local + outside @ codewords
            dk_window[:, :, keys] += inside.transpose(2, 3) @ q_block
            dk_outside[:, :, keys] += outside.transpose(2, 3) @ q_block
            dq[..., rows, :] = dq_block.view(s.batch, s.kv_heads, s.group, -1, s.width)

        dq = dq.flatten(1, 2)
        dq = dq.mul_(s.unit if isinstance(s.unit, float) else s.unit[:, None, :, None])

        if activation == "softmax":  # the far values are means: back to sums
            dvalues /= s.far_counts.clamp(min=1)
        dv_far = s.far_field.gather(dvalues.flatten(1, 2)).view_as(dv)
        if key_padding_mask is not None:
            dv_far = dv_far.masked_fill_(key_padding_mask[:, None, :, None], 0)
        dv += dv_far

        dk = dk_window
        if near_dim:  # the scores of pairs inside the window have no part in the other columns, and the reverse
            dk[..., near_dim:] = 0
            dcode[..., :near_dim] = dk_outside[..., :near_dim] = 0
        if key_grad == "cluster":
            dk += shared_by_cluster(dcode, dk_outside, codes, key_padding_mask)
        if bias is None:
            dbias = grad.new_empty(0)
        else:
            dbias = torch.zeros_like(bias) if dbias is None else dbias.flatten(0, 1).to(bias.dtype)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dbias


def add_bias_grad(dbias: Tensor, inside: Tensor, rows: slice, keys: slice, options: Options) -> None:
    """Add the diagonals of one block's in-window score gradients to ``dbias`` (Hkv, G, W or 2W − 1), in place."""
    sums = diagonal_sums(inside.sum(0))
    # Entry o belongs to j − i = o + first; bring the offsets that exist in the window into the bias' order.
    first = keys.start - (rows.stop - 1)
    last = first + sums.shape[-1] - 1
    window = options.window
    low, high = max(first, 1 - window), min(last, 0 if options.causal else window - 1)
    if low > high:
        return
    part = sums[..., low - first : high - first + 1]
    if options.causal:  # bias[i − j]
        dbias[..., -high : -low + 1] += part.flip(-1)
    else:  # bias[j − i + W − 1]
        dbias[..., low + window - 1 : high + window] += part


def shared_by_cluster(dcode: Tensor, dk_outside: Tensor, codes: Tensor, mask: Tensor | None) -> Tensor:
    """``dC_{z_j} / n_{z_j}``: what each key gets of the gradient that its codeword collected in this row."""
    batch, heads, num_codes, width = dcode.shape
    pair = torch.arange(batch * heads, device=codes.device).view(batch, heads, 1)
    segment = (pair * num_codes + codes).reshape(-1)
    dcode = dcode.reshape(-1, width) + segment_sum(dk_outside.reshape(-1, width), segment, pair.numel() * num_codes)
    member = codes.new_ones(batch, heads, codes.shape[2]) if mask is None else (~mask)[:, None].expand_as(codes).long()
    count = codes.new_zeros(pair.numel() * num_codes).scatter_add_(0, segment, member.reshape(-1))
    share = (dcode / count.clamp(min=1).unsqueeze(-1)).index_select(0, segment).view(batch, heads, -1, width)
    return share if mask is None else share.masked_fill(mask[:, None, :, None], 0)
