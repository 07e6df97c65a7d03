"""Backward of vector-quantised attention in linear time. The weights of each block are recomputed, not stored.

With ``P`` the weights, ``dP = dO·Vᵀ`` and ``dS`` the gradient of the scores (softmax: ``P ∘ (dP − rowsum(dO ∘ O))``):

* near pairs give ``dq``, ``dv`` and ``db`` as in any attention; pairs inside the window give ``dk``, by the
  straight-through estimator if keys are quantised;
* the key gradient of pairs outside the window goes to the codeword; with ``key_grad="cluster"`` all keys of that code
  in the batch row share it equally: ``dk_j += dC_{z_j} / n_{z_j}``;
* the gradient of the far field of a block goes to the values of all its far keys, through the adjoint of the running
  sums.
"""

import torch
from torch import Tensor

from longvq_layers.ops._attention_inputs import AttentionGradients, AttentionInputs
from longvq_layers.ops._attention_options import Activation, AttentionOptions, KeyGrad
from longvq_layers.ops.torch.elementwise import laplace, laplace_grad
from longvq_layers.ops.torch.far_field import segment_sum
from longvq_layers.ops.torch.scores import Scores


def diagonal_sums(x: Tensor) -> Tensor:
    """(…, T, K) -> (…, T + K − 1): entry o is the sum of the diagonal ``column − row = o − (T − 1)``."""
    rows, columns = x.shape[-2:]
    # Reverse the order of the rows, and append T zeros to each row. Then view the memory with rows that are one element
    # shorter: row r moves right by r.
    skew = torch.nn.functional.pad(x.flip(-2), (0, rows)).flatten(-2)[..., : rows * (rows + columns - 1)]
    return skew.unflatten(-1, (rows, rows + columns - 1)).sum(-2)


def vq_attention_backward(
    grad: Tensor, out: Tensor, normalizers: Tensor, inputs: AttentionInputs, options: AttentionOptions
) -> AttentionGradients:
    """Gradients of the inputs, in the dtypes of the inputs."""
    if inputs.cu_seqlens is not None or out.numel() == 0:
        gradients = _zeros(inputs)
        if out.numel() == 0:
            return gradients
        for at, document in inputs.documents():
            of_document = vq_attention_backward(grad[:, :, at], out[:, :, at], normalizers[:, :, at], document, options)
            for name in ("q", "k", "v", "far_q", "far_k"):
                if getattr(inputs, name) is not None:
                    getattr(gradients, name)[:, :, at] = getattr(of_document, name)
            gradients.bias.add_(of_document.bias)
        return gradients
    q, k, v, _, codes, bias, key_padding_mask, _, far_q, far_k = inputs
    with torch.autocast(q.device.type, enabled=False):
        s = Scores(inputs, options)
        precise = s.v.dtype
        grad = grad.to(precise)
        if key_padding_mask is not None:
            grad = grad.masked_fill(key_padding_mask[:, None, :, None], 0)
        delta = (grad * out).sum(-1, keepdim=True)
        grad, delta, normalizers = s.grouped(grad), s.grouped(delta), s.grouped(normalizers)
        dq = torch.zeros_like(s.q, memory_format=torch.contiguous_format)
        dfar_q = torch.zeros_like(s.far_q, memory_format=torch.contiguous_format) if s.has_far_q else dq
        dv = torch.zeros_like(s.v, memory_format=torch.contiguous_format)
        dk_window = s.v.new_zeros(s.batch, s.kv_heads, s.length, s.head_dim)
        dk_outside = s.v.new_zeros(s.batch, s.kv_heads, s.length, s.far_dim)  # near pairs outside the window
        dcode = s.v.new_zeros(s.batch, s.kv_heads, s.num_codes, s.far_dim)
        dbias = None if s.bias is None else torch.zeros_like(s.bias)
        dvalues = torch.zeros_like(s.far_values, memory_format=torch.contiguous_format)

        for block in range(s.blocks.count):
            rows, keys = s.blocks.rows(block), s.blocks.near(block)
            q_block, far_q_block = s.queries(rows)
            do, d = (s.rows_of(x, rows) for x in (grad, delta))
            codewords = s.near_codewords(keys)
            values, far_values = s.v[:, :, keys], s.far_values[s.far_index(block)]
            near, far = s.near(q_block, far_q_block, codewords, rows, keys), s.far(far_q_block, block)
            dp_near, dp_far = do @ values.transpose(2, 3), do @ far_values.transpose(2, 3)
            if options.activation == Activation.SOFTMAX:
                largest, total = s.rows_of(normalizers, rows).split(1, -1)
                p_near, p_far = near.sub_(largest).exp_().div_(total), far.sub_(largest).exp_().div_(total)
                ds_near, ds_far = dp_near.sub_(d).mul_(p_near), dp_far.sub_(d).mul_(p_far)
            else:
                p_near, p_far = laplace(near), laplace(far)
                ds_near, ds_far = dp_near.mul_(laplace_grad(near)), dp_far.mul_(laplace_grad(far))
            del near, far

            dv[:, :, keys] += p_near.transpose(2, 3) @ do
            dvalues[s.far_index(block)] += p_far.transpose(2, 3) @ do
            dfar_block = ds_far @ s.codebook
            dcode += ds_far.transpose(2, 3) @ far_q_block

            in_window = s.tile(rows, keys)[0]
            ds_near = ds_near.view(s.batch, s.kv_heads, s.group, *in_window.shape)
            inside = ds_near * in_window
            outside = (ds_near - inside).flatten(2, 3)
            if dbias is not None:
                add_bias_grad(dbias, inside, rows, keys, options)
            inside = inside.flatten(2, 3)
            from_inside = inside @ (codewords if s.k is None else s.k[:, :, keys])
            from_outside = outside @ codewords
            dk_window[:, :, keys] += inside.transpose(2, 3) @ q_block
            dk_outside[:, :, keys] += outside.transpose(2, 3) @ far_q_block
            if not s.has_far_q:
                dq[..., rows, :] = s.as_rows(dfar_block.add_(from_inside + from_outside))
            else:
                dfar_q[..., rows, :] = s.as_rows(dfar_block.add_(from_outside))
                if s.k is not None:  # None only with W = 0: no pair is inside the window
                    dq[..., rows, :] = s.as_rows(from_inside)

        if options.activation == Activation.SOFTMAX:  # far values are means: get the gradients of the sums
            dvalues /= s.far_counts.clamp(min=1)
        dv_far = s.far_field.gather(dvalues.flatten(1, 2)).view_as(dv)
        if key_padding_mask is not None:
            dv_far = dv_far.masked_fill_(key_padding_mask[:, None, :, None], 0)
        dv += dv_far

        dk, dfar_k = dk_window, torch.zeros_like(dk_outside) if s.has_far_q else dk_window
        if options.key_grad == KeyGrad.CLUSTER:
            dfar_k += shared_by_cluster(dcode, dk_outside, codes, key_padding_mask)
        if bias is not None:
            dbias = torch.zeros_like(bias) if dbias is None else dbias.flatten(0, 1)
        dq = dq.flatten(1, 2).mul_(s.score_factor)
        dfar_q = dfar_q.flatten(1, 2).mul_(s.score_factor) if s.has_far_q else dq

        def finished(gradient: Tensor | None, argument: Tensor | None) -> Tensor:
            return q.new_empty(0) if gradient is None or argument is None else gradient.to(argument.dtype)

        pairs = ((dq, q), (dk, k), (dv, v), (dbias, bias), (dfar_q, far_q), (dfar_k, far_k))
        return AttentionGradients(*(finished(gradient, argument) for gradient, argument in pairs))


def _zeros(inputs: AttentionInputs) -> AttentionGradients:
    """Zero gradients of the inputs."""

    def zeros(x: Tensor | None) -> Tensor:
        return inputs.q.new_empty(0) if x is None else x.new_zeros(x.shape)

    return AttentionGradients(*(zeros(getattr(inputs, name)) for name in AttentionGradients._fields))


def add_bias_grad(dbias: Tensor, inside: Tensor, rows: slice, keys: slice, options: AttentionOptions) -> None:
    """Add the score gradients of one block inside the window, by diagonal, to ``dbias`` (Hkv, G, W or 2W − 1)."""
    sums = diagonal_sums(inside.sum(0))
    # Entry o has j − i = o + first. Take the offsets that are inside the window, in the order of the bias.
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
    """``dC_{z_j} / n_{z_j}``: each key's share of the gradient of its codeword in this row."""
    batch, heads, num_codes, far_dim = dcode.shape
    pair = torch.arange(batch * heads, device=codes.device).view(batch, heads, 1)
    segment = (pair * num_codes + codes).reshape(-1)
    dcode = dcode.reshape(-1, far_dim) + segment_sum(dk_outside.reshape(-1, far_dim), segment, pair.numel() * num_codes)
    member = codes.new_ones(batch, heads, codes.shape[2]) if mask is None else (~mask)[:, None].expand_as(codes).long()
    count = codes.new_zeros(pair.numel() * num_codes).scatter_add_(0, segment, member.reshape(-1))
    share = (dcode / count.clamp(min=1).unsqueeze(-1)).index_select(0, segment).view(batch, heads, -1, far_dim)
    return share if mask is None else share.masked_fill(mask[:, None, :, None], 0)
