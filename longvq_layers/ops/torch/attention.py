"""Forward of vector-quantised attention in linear time.

Keys within ``W − 1`` positions of a block of queries are *near*: each gets its own score. All other keys are *far* and
are attended through their codes:
``Σ_{j far} exp(q·C_{z_j}) v_j = Σ_s n_s exp(q·C_s) m_s``, where ``n_s`` is the number and ``m_s`` the mean value of the
far keys of code s. This is ordinary attention over S more keys with an additive bias ``log n_s`` (Lingle 2023,
Transformer-VQ, theorem 3.7; LongVQ 2024, section 4.2). A near key may be outside the window of some query of the block:
its score for this query is that of its codeword.
"""

import torch
from torch import Tensor

from longvq_layers.ops._attention_inputs import AttentionInputs
from longvq_layers.ops._attention_options import Activation, AttentionOptions
from longvq_layers.ops.torch.elementwise import laplace
from longvq_layers.ops.torch.scores import Scores


def vq_attention(inputs: AttentionInputs, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """The output (B, H, L, E) in the dtype of ``v``, and the normalizers (B, H, L, 2) for the backward.

    The normalizers are the m and t of the softmax weights ``exp(score − m) / t``. One number ``m + log t`` would lose
    the digits of ``t`` where scores are large.
    """
    q, v = inputs.q, inputs.v
    if q.numel() == 0:
        return q.new_zeros(*q.shape[:3], v.shape[-1]), q.new_zeros(*q.shape[:3], 2, dtype=inputs.precise)
    if inputs.cu_seqlens is not None:
        out = v.new_empty(*q.shape[:3], v.shape[-1])
        normalizers = q.new_empty(*q.shape[:3], 2, dtype=inputs.precise)
        for at, document in inputs.documents():
            out[:, :, at], normalizers[:, :, at] = vq_attention(document, options)
        return out, normalizers
    with torch.autocast(q.device.type, enabled=False):
        s = Scores(inputs, options)
        out = s.v.new_empty(s.batch, s.kv_heads, s.group, s.length, s.value_dim)
        normalizers = s.v.new_zeros(s.batch, s.kv_heads, s.group, s.length, 2)
        for block in range(s.blocks.count):
            rows, keys = s.blocks.rows(block), s.blocks.near(block)
            q_block, far_q_block = s.queries(rows)
            near = s.near(q_block, far_q_block, s.near_codewords(keys), rows, keys)
            far = s.far(far_q_block, block)
            if options.activation == Activation.SOFTMAX:
                largest = far.amax(-1, keepdim=True)
                if near.shape[-1]:
                    largest = torch.maximum(largest, near.amax(-1, keepdim=True))
                largest.masked_fill_(largest == -torch.inf, 0)  # no key is allowed: every weight is exp(−inf) = 0
                near, far = near.sub_(largest).exp_(), far.sub_(largest).exp_()
                total = near.sum(-1, keepdim=True) + far.sum(-1, keepdim=True)
                total.masked_fill_(total == 0, 1)
                normalizers[..., rows, :] = torch.cat([largest, total], -1).view(*normalizers.shape[:3], -1, 2)
                result = near @ s.v[:, :, keys] + far @ s.far_values[s.far_index(block)]
                result /= total
            else:
                result = laplace(near) @ s.v[:, :, keys] + laplace(far) @ s.far_values[s.far_index(block)]
            out[..., rows, :] = result.view(*out.shape[:3], -1, s.value_dim)
        out = out.flatten(1, 2)
        if s.mask is not None:
            out.masked_fill_(s.mask[:, None, :, None], 0)
        return out.to(v.dtype), normalizers.flatten(1, 2)
