"""Ordinary attention with the interface of `CodebookAttention`, to compare quantised keys with."""

import torch
from torch import Tensor, nn

from longvq_layers import _checks as check
from longvq_layers.layers.attention.core import AttentionCore
from longvq_layers.layers.common.context import no_autocast
from longvq_layers.layers.common.factory import Factory
from longvq_layers.layers.common.representation import arguments_repr


class DenseAttention(AttentionCore):
    """Softmax attention over all keys by `scaled_dot_product_attention`, in quadratic time.

        out_i = Σ_j softmax_j(q_i·k_j / √D + b_{j−i}) v_j           b inside the window only

    `CodebookAttention` computes the same if every key equals a codeword. Memory is quadratic too with a window bias, or
    with a mask that differs between queries.

    Args:
        num_heads: H, query heads.
        num_kv_heads: Hkv, key-value heads; H must be a multiple.
        head_dim: D, width of a query or key.
        value_dim: E, width of a value, default D.
        window: W, positions in which a bias is added, default 64; 0 = none. Attention always covers all keys.
        causal: whether a query sees only itself and the past, default False.
        window_bias: whether to learn b, (H, W) causal or (H, 2W − 1), from zero; default True. None when window=0.
        device, dtype: of the bias.

    Raises:
        ValueError, TypeError: sizes out of range; in `forward` wrong shapes or dtypes.

    Example:
        >>> attention = DenseAttention(4, 2, 16, window=8, causal=True)
        >>> q, k, v = torch.randn(2, 4, 50, 16), torch.randn(2, 2, 50, 16), torch.randn(2, 2, 50, 16)
        >>> attention(q, k, v).shape
        torch.Size([2, 4, 50, 16])

    Source: Vaswani et al. 2017, section 3.2.1.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        window: int = 64,
        causal: bool = False,
        window_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "DenseAttention"
        self._set_sizes(name, num_heads, num_kv_heads, head_dim, value_dim, window, causal, window_bias, dtype)
        factory: Factory = {"device": device, "dtype": dtype}
        self._add_window_bias(window_bias, num_heads, window, causal, factory)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_padding_mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            q: (B, H, L, D) float.
            k: (B, Hkv, L, D), dtype of q.
            v: (B, Hkv, L, E), dtype of q.
            key_padding_mask: (B, L) bool, True = ignore.
            cu_seqlens: (N+1,) int32, offsets of N documents in one row (B = 1) that don't see each other. Default none.

        Returns:
            (B, H, L, E), dtype of q; 0 at masked positions.
        """
        name = "DenseAttention"
        self._check_queries(name, q, cu_seqlens)
        batch, length = q.shape[0], q.shape[2]
        for which, x, dim, dims in (("k", k, self.head_dim, "B Hkv L D"), ("v", v, self.value_dim, "B Hkv L E")):
            check.tensor(name, which, x, dims)
            check.size(name, which, x, (batch, self.num_kv_heads, length, dim), dims)
            if x.dtype != q.dtype:
                raise TypeError(f"{name}: {which} must have the dtype of q, {q.dtype}, got {x.dtype}")
        if key_padding_mask is not None:
            check.key_padding_mask(name, key_padding_mask, batch, length)
        padding = None if key_padding_mask is None else key_padding_mask[:, None, :, None]
        if padding is not None:  # a weight of 0 doesn't hide NaN: 0 · NaN = NaN
            q, k, v = (x.masked_fill(padding, 0) for x in (q, k, v))
        mask = self._mask(q, key_padding_mask, cu_seqlens)
        with no_autocast(q.device):
            out = nn.functional.scaled_dot_product_attention(
                q, k, v, mask, is_causal=self.causal and mask is None, enable_gqa=self.num_heads != self.num_kv_heads
            )
        return out if padding is None else out.masked_fill(padding, 0)

    def _mask(self, q: Tensor, key_padding_mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor | None:
        """The mask of the scores (B, H, L, L), bool or a term to add; None if the flag `is_causal` is enough."""
        if self.window_bias is None and key_padding_mask is None and cu_seqlens is None:
            return None
        positions = torch.arange(q.shape[2], device=q.device)
        offset = positions - positions.unsqueeze(1)  # j − i, (L, L)
        allowed = offset <= 0 if self.causal else torch.ones_like(offset, dtype=torch.bool)
        if cu_seqlens is not None:
            document = torch.bucketize(positions, cu_seqlens[1:], right=True)
            allowed = allowed & (document == document.unsqueeze(1))
        allowed = allowed[None, None]
        if key_padding_mask is not None:
            # Some kernels give NaN for a query that sees nothing. So a masked query sees itself; its output becomes 0.
            allowed = allowed & (~key_padding_mask[:, None, None] | (offset == 0))
        if self.window_bias is None:
            return allowed
        columns = -offset if self.causal else offset + self.window - 1
        bias = self.window_bias.to(q.dtype)[:, columns.clamp(0, self.window_bias.shape[1] - 1)]
        bias = bias.masked_fill(offset.abs() >= self.window, 0)
        return bias.masked_fill(~allowed, -torch.inf)

    def extra_repr(self) -> str:
        return arguments_repr(self, DenseAttention, window_bias=self._wants_window_bias())
