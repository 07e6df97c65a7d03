"""Ordinary attention with the call of `CodebookAttention`: what a block compares its quantised keys with."""

import torch
from torch import Tensor, nn

from longvq_layers import _checks as check
from longvq_layers.layers.attention.window_bias import WindowBias
from longvq_layers.layers.common import input_checks
from longvq_layers.layers.common.context import no_autocast
from longvq_layers.layers.common.representation import call_repr


class DenseAttention(WindowBias):
    """Softmax attention over all keys as they are, by `scaled_dot_product_attention`: quadratic time.

        out_i = Σ_j softmax_j(q_i·k_j / √D + b_{j−i}) v_j           b inside the window only

    It is what `CodebookAttention` computes with a codeword for every key. With a window bias or a mask that differs
    between queries, memory is quadratic too.

    Args:
        num_heads: H, query heads.
        num_kv_heads: Hkv, key-value heads; H must be a multiple.
        head_dim: D, width of a query or key.
        value_dim: E, width of a value, default D.
        window: W, positions in which a bias is added, default 64; 0 = none. All keys are attended anyway.
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
        value_dim = head_dim if value_dim is None else value_dim
        check.positive(name, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, value_dim=value_dim)
        check.divides(name, "num_kv_heads", num_kv_heads, "num_heads", num_heads)
        check.window(name, window)
        check.floating(name, dtype)
        check.flags(name, causal=causal, window_bias=window_bias)
        self.num_heads, self.num_kv_heads, self.head_dim, self.value_dim = num_heads, num_kv_heads, head_dim, value_dim
        self.window, self.causal = window, causal
        self._add_window_bias(window_bias, num_heads, window, causal, device, dtype)

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
        check.tensor(name, "q", q, "B H L D")
        rows, length = q.shape[0], q.shape[2]
        check.size(name, "q", q, (rows, self.num_heads, length, self.head_dim), "B H L D")
        for which, x, width, dims in (("k", k, self.head_dim, "B Hkv L D"), ("v", v, self.value_dim, "B Hkv L E")):
            check.tensor(name, which, x, dims)
            check.size(name, which, x, (rows, self.num_kv_heads, length, width), dims)
            if x.dtype != q.dtype:
                raise TypeError(f"{name}: {which} must have the dtype of q, {q.dtype}, got {x.dtype}")
        if key_padding_mask is not None:
            check.key_padding_mask(name, key_padding_mask, rows, length)
        input_checks.packed(name, "q", q, cu_seqlens, axis=2)
        masked = None if key_padding_mask is None else key_padding_mask[:, None, :, None]
        if masked is not None:  # weights of 0 would not hide what stands there: 0 · NaN = NaN
            q, k, v = (x.masked_fill(masked, 0) for x in (q, k, v))
        mask = self._mask(q, key_padding_mask, cu_seqlens)
        with no_autocast(q.device):
            out = nn.functional.scaled_dot_product_attention(
                q, k, v, mask, is_causal=self.causal and mask is None, enable_gqa=self.num_heads != self.num_kv_heads
            )
        return out if masked is None else out.masked_fill(masked, 0)

    def _mask(self, q: Tensor, key_padding_mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor | None:
        """What is added to scores, or which are allowed, for (B, H, L, L); None if `is_causal` says all of it."""
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
            # A query that may see nothing is NaN with some kernels; itself it may see, and it is put to 0 afterwards.
            allowed = allowed & (~key_padding_mask[:, None, None] | (offset == 0))
        if self.window_bias is None:
            return allowed
        columns = -offset if self.causal else offset + self.window - 1
        bias = self.window_bias.to(q.dtype)[:, columns.clamp(0, self.window_bias.shape[1] - 1)]
        bias = bias.masked_fill(offset.abs() >= self.window, 0)
        return bias.masked_fill(~allowed, -torch.inf)

    def extra_repr(self) -> str:
        return call_repr(
            (self.num_heads, self.num_kv_heads, self.head_dim),
            value_dim=self.value_dim,
            window=self.window,
            causal=self.causal,
            window_bias=self.window_bias is not None or self.window == 0,
        )
