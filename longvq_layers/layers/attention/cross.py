"""Multi-head attention of a decoder to an encoder's output."""

import torch
from einops import rearrange
from torch import Tensor, nn

from longvq_layers import _checks as check
from longvq_layers.layers.attention.heads import HeadProjections, split_heads
from longvq_layers.layers.common import input_checks
from longvq_layers.layers.common.factory import Factory
from longvq_layers.layers.common.padding import zero_padding
from longvq_layers.layers.common.representation import arguments_repr
from longvq_layers.layers.common.sequence_layer import SequenceLayer


class CrossAttention(HeadProjections, SequenceLayer):
    """Multi-head softmax attention from every position of x to every position of a memory: O(L·M).

        q = split_heads(x W_q + b_q),   k, v = split_heads(memory W_k + b_k, memory W_v + b_v)
        y = dropout(concat_heads(softmax(q kᵀ / √D) v) W_o + b_o)

    The softmax is 0 where all positions of the memory are masked.

    Args:
        embed_dim: width of x, memory and output; a multiple of num_heads.
        num_heads: H, heads of width D = embed_dim / H.
        bias: whether the four projections have a bias, default True.
        dropout: probability of dropping an element of y, default 0.0.
        device, dtype: of the parameters.

    Raises:
        ValueError, TypeError: sizes out of range; in `forward` a wrong shape, dtype or device.

    Example:
        >>> layer = CrossAttention(16, 4)
        >>> layer(torch.randn(2, 5, 16), torch.randn(2, 30, 16)).shape
        torch.Size([2, 5, 16])

    Source: Vaswani et al. 2017 (arXiv 1706.03762), section 3.2.3.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "CrossAttention"
        check.probability(name, "dropout", dropout)
        factory: Factory = {"device": device, "dtype": dtype}
        self._add_projections(name, embed_dim, num_heads, num_heads, bias, factory)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        memory_key_padding_mask: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Attend from every position of x to its whole memory.

        Args:
            x: (B, L, embed_dim), dtype of the layer.
            memory: (B, M, embed_dim), any M ≥ 0; with `cu_seqlens` (N, M, embed_dim), one row for each document.
            memory_key_padding_mask: (B, M) or (N, M) bool, True = ignore. Default none.
            key_padding_mask: (B, L) bool, True = the output is 0 here. Default none.
            cu_seqlens: (N+1,) int32, offsets of N documents in the one row of x (B = 1); each attends to its own row
                of the memory, at a cost of O(L·N·M). Default none.

        Returns:
            (B, L, embed_dim), exactly 0 at masked positions.
        """
        name = "CrossAttention"
        x = self._checked_input(name, x, key_padding_mask, cu_seqlens)
        rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        keys, values = self.project_memory(name, memory, memory_key_padding_mask, rows)
        allowed = None if memory_key_padding_mask is None else ~memory_key_padding_mask[:, None, None]  # (B, 1, 1, M)
        if cu_seqlens is not None:
            # The memories of all documents form one row of N·M positions. A token sees that of its own document.
            positions = torch.arange(x.shape[1], dtype=torch.int32, device=x.device)
            document = torch.bucketize(positions, cu_seqlens[1:], right=True)  # (L,)
            allowed = document[:, None, None] == torch.arange(rows, device=x.device)[:, None]
            allowed = allowed.expand(-1, -1, memory.shape[1])  # (L, N, M)
            if memory_key_padding_mask is not None:
                allowed = allowed & ~memory_key_padding_mask
            allowed = allowed.flatten(1)[None, None]  # (1, 1, L, N·M)
            keys, values = (rearrange(y, "n h m d -> 1 h (n m) d") for y in (keys, values))
        return zero_padding(self.dropout(self.attend(x, keys, values, allowed)), key_padding_mask)

    def project_memory(
        self, name: str, memory: Tensor, memory_key_padding_mask: Tensor | None, rows: int
    ) -> tuple[Tensor, Tensor]:
        """Keys and values (rows, H, M, D) of a memory (rows, M, embed_dim); `name` is the operation in errors."""
        check.tensor(name, "memory", memory, "B M d_model")
        check.real(name, "memory", memory)
        check.size(name, "memory", memory, (rows, memory.shape[1], self.embed_dim), "B M d_model")
        check.same_device(name, "the layer's parameters", self.k_proj.weight, memory=memory)
        input_checks.layer_dtype(name, "memory", memory, self.k_proj.weight)
        if memory_key_padding_mask is not None:
            check.tensor(name, "memory_key_padding_mask", memory_key_padding_mask, "B M")
            if memory_key_padding_mask.dtype != torch.bool:
                raise TypeError(
                    f"{name}: memory_key_padding_mask must be bool with True = ignore, got "
                    f"{memory_key_padding_mask.dtype}"
                )
            check.size(name, "memory_key_padding_mask", memory_key_padding_mask, tuple(memory.shape[:2]), "B M")
            check.same_device(name, "memory", memory, memory_key_padding_mask=memory_key_padding_mask)
        memory = zero_padding(memory, memory_key_padding_mask)
        return split_heads(self.k_proj(memory), self.num_heads), split_heads(self.v_proj(memory), self.num_heads)

    def attend(self, x: Tensor, keys: Tensor, values: Tensor, allowed: Tensor | None) -> Tensor:
        """y (B, L, embed_dim) before dropout, with keys and values from `project_memory`.

        `allowed` is None or bool and broadcasts to (B, H, L, M), True = attend.
        """
        q = split_heads(self.q_proj(x), self.num_heads)
        keys, values = keys.to(q.dtype), values.to(q.dtype)
        if keys.shape[2] == 0:
            out = torch.zeros_like(q)
        elif allowed is None:
            out = nn.functional.scaled_dot_product_attention(q, keys, values)
        else:
            # A query that may see nothing attends to everything, because an empty softmax is NaN. Its output becomes 0.
            blind = ~allowed.any(-1, keepdim=True)
            out = nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=allowed | blind)
            out = out.masked_fill(blind, 0)
        return self._project_output(out)

    def _width_and_parameter(self) -> tuple[int, Tensor]:
        return self.embed_dim, self.q_proj.weight

    def extra_repr(self) -> str:
        return arguments_repr(self, CrossAttention, bias=self.q_proj.bias is not None)
