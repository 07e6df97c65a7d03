"""The class of a replaced nn.MultiheadAttention: the same projections, with the slot's attention between them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longvq_layers.replace.adapters.torch_nn.masks import NAME, read_attn_mask, read_padding
from longvq_layers.replace.slot.attention_slot import slot_of


class VQMultiheadAttention(nn.MultiheadAttention):
    """An nn.MultiheadAttention whose keys are quantised; only `replace_attention` makes it.

    Same parameters and same call as nn.MultiheadAttention for self-attention. `attn_mask` may be None or the causal
    mask; `is_causal=True` alone is enough and needs no L×L mask. `need_weights` must be False.
    """

    @property
    def _qkv_same_embed_dim(self) -> bool:
        # False makes nn.TransformerEncoderLayer skip its evaluation fast path, which reads the weights and bypasses
        # this forward. A property of the class hides the instance's own value. `undo` makes this value visible again.
        return False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Self-attention of query (B, L, C), or (L, B, C) without batch_first, or (L, C) unbatched.

        Args:
            key: must be `query` itself, or share its memory.
            value: (…, vdim), often `query` itself.
            key_padding_mask: (B, L) bool, True = ignore, or float of 0 and -inf.
            need_weights: must be False.
            attn_mask: None, exactly the causal mask, or a mask that hides nothing; bool (True = not allowed) or float
                of 0 and -inf.
            average_attn_weights: has no effect, because there are no weights.
            is_causal: attend to the past only; attn_mask may then be None.

        Returns:
            the output, shaped like query, and None.
        """
        slot = slot_of(self)
        with slot.refusals():
            self._check_call(query, key, need_weights)
            batched = query.dim() == 3
            q, k, v = self._project(query, key, value, batched)
            length = q.shape[2]
            causal = is_causal if attn_mask is None else read_attn_mask(attn_mask, is_causal, length)
            padding = read_padding(key_padding_mask, q.shape[0], length)
            output = slot(q, k, v, padding, causal=causal)
            output = F.linear(output.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
            if not batched:
                return output.squeeze(0), None
            return (output if self.batch_first else output.transpose(0, 1)), None

    def _check_call(self, query: Tensor, key: Tensor, need_weights: bool) -> None:
        if need_weights:
            raise NotImplementedError(
                f"{NAME}: need_weights must be False, got True (the default), because attention weights are never "
                "formed; pass need_weights=False"
            )
        if query.is_nested:
            raise NotImplementedError(
                f"{NAME}: query must be a dense tensor with key_padding_mask=, got a nested tensor; build "
                "nn.TransformerEncoder with enable_nested_tensor=False"
            )
        if query is not key and not _share_memory(query, key):
            raise NotImplementedError(
                f"{NAME}: key must be query itself, got another tensor (cross-attention); pass the same object, or "
                "leave this module out with filter_fn="
            )
        if query.dim() not in (2, 3) or query.shape[-1] != self.embed_dim:
            raise ValueError(
                f"{NAME}: query must have shape (B, L, {self.embed_dim}) or (L, {self.embed_dim}), got "
                f"{tuple(query.shape)}"
            )

    def _project(self, query: Tensor, key: Tensor, value: Tensor, batched: bool) -> tuple[Tensor, Tensor, Tensor]:
        """-> q, k, v (B, H, L, D)."""
        packed, bias = self.in_proj_weight, self.in_proj_bias
        projected: tuple[Tensor, ...]
        if packed is not None and key is query and value is query:
            projected = F.linear(query, packed, bias).chunk(3, dim=-1)
        else:  # packed is None if vdim differs from embed_dim
            separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            weights = separate if packed is None else packed.chunk(3)
            biases = (None, None, None) if bias is None else bias.chunk(3)
            inputs = (query, key, value)
            projected = tuple(F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True))
        if not batched:
            projected = tuple(x.unsqueeze(0) for x in projected)
        elif not self.batch_first:
            projected = tuple(x.transpose(0, 1) for x in projected)
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in projected)
        return q, k, v


def _share_memory(query: Tensor, key: Tensor) -> bool:
    # Reentrant checkpointing detaches each argument separately. The results are two objects with the same memory.
    if torch.compiler.is_compiling():
        return False
    try:
        return (query.data_ptr(), query.shape, query.stride()) == (key.data_ptr(), key.shape, key.stride())
    except RuntimeError:  # the wrappers of torch.func have no memory of their own
        return False
