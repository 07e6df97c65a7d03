"""A Transformer block to compare the others with: softmax attention over all pairs, rotary positions."""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn

from longvq_layers import _checks as check
from longvq_layers.layers.attention.heads import merge_heads
from longvq_layers.layers.blocks.base import ResidualBlock, feed_forward_width
from longvq_layers.layers.common.factory import Factory
from longvq_layers.layers.common.padding import allowed_pairs, causal_pairs, zero_padding
from longvq_layers.layers.parts.dropout import Dropout, make_dropout
from longvq_layers.layers.parts.norm import make_norm


class TransformerBlock(ResidualBlock):
    """Pre-norm Transformer block with rotary positions.

        Y = X + dropout(softmax(R(Q) R(K)ᵀ / √D) V W_o),   out = Y + FFN(norm₂(Y)),   Q, K, V from norm₁(X)

    Args:
        d_model: width of input and output.
        num_heads: H, default 4; d_model must be a multiple, and d_model / H even.
        d_ff: hidden width of the feed-forward block, default 4 d_model.
        causal: only past and present, default False (bidirectional).
        dropout: probability of dropping an element of the attention's and the feed-forward block's output, default 0.0.
        hidden_dropout: the same for the feed-forward block's hidden layer, default `dropout`.
        dropout_type: "element" (default), or "feature" for whole channels of a sequence.
        norm_type: "layer" (default), "rms", "scale" or "batch".
        ffn_activation: "gelu" (default), "silu" or "relu".
        glu: whether the feed-forward block is gated, default False.
        attention: "fused" (default) is `scaled_dot_product_attention`; "dense" forms the matrix of weights, as the
            first Transformer did.
        device, dtype: of the parameters.

    Raises:
        ValueError, TypeError: sizes out of range or unknown options; in `forward` a wrong shape, dtype or device.

    Example:
        >>> TransformerBlock(16, num_heads=2, causal=True)(torch.randn(2, 50, 16)).shape
        torch.Size([2, 50, 16])

    Source: Vaswani et al. 2017; Su et al. 2021 (arXiv 2104.09864) for the positions.
    """

    qkv_proj: nn.Linear
    out_proj: nn.Linear
    dropout: Dropout

    def __init__(
        self,
        d_model: int,
        num_heads: int = 4,
        *,
        d_ff: int | None = None,
        causal: bool = False,
        dropout: float = 0.0,
        hidden_dropout: float | None = None,
        dropout_type: str = "element",
        norm_type: str = "layer",
        ffn_activation: str = "gelu",
        glu: bool = False,
        attention: str = "fused",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "TransformerBlock"
        check.positive(name, d_model=d_model, num_heads=num_heads)
        check.divides(name, "2 num_heads", 2 * num_heads, "d_model", d_model)
        d_ff = feed_forward_width(name, d_ff, 4 * d_model)
        check.flags(name, causal=causal)
        check.probability(name, "dropout", dropout)
        check.one_of(name, "attention", attention, tuple(ATTENTION))
        factory: Factory = {"device": device, "dtype": dtype}
        self.d_model, self.num_heads, self.causal, self.attention = d_model, num_heads, causal, attention
        self.norm_type, self.dropout_type, self.ffn_activation, self.glu = norm_type, dropout_type, ffn_activation, glu
        self.norm1 = make_norm(name, norm_type, d_model, **factory)
        self.qkv_proj = nn.Linear(d_model, 3 * d_model, **factory)
        self.out_proj = nn.Linear(d_model, d_model, **factory)
        self.dropout = make_dropout(name, dropout_type, dropout)
        self._add_feed_forward(name, d_ff, dropout, hidden_dropout, factory)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """x (B, L, d_model) -> the same shape, 0 where key_padding_mask (B, L) is True."""
        x = self._checked_input("TransformerBlock", x, key_padding_mask)
        qkv = self.qkv_proj(self._before_mixer(x, key_padding_mask))
        q, k, v = rearrange(qkv, "b l (n h d) -> n b h l d", n=3, h=self.num_heads)
        rotation = _rotation(q)
        attend = ATTENTION[self.attention]
        out = attend(_rotate(q, rotation), _rotate(k, rotation), v, self._allowed(x, key_padding_mask), self.causal)
        y = self._after_mixer(x + self.dropout(self.out_proj(merge_heads(out))), key_padding_mask)
        return zero_padding(self._feed_forward(y, key_padding_mask), key_padding_mask)

    def _width_and_parameter(self) -> tuple[int, Tensor]:
        return self.d_model, self.out_proj.weight

    def _allowed(self, x: Tensor, key_padding_mask: Tensor | None) -> Tensor | None:
        """(B, 1, L or 1, L) bool, True = attend; None where causality alone decides."""
        if key_padding_mask is None:
            return None
        # Every position may attend to itself: without any key its output would be NaN.
        itself = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        return allowed_pairs(key_padding_mask, self.causal) | itself


def _fused(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, causal: bool) -> Tensor:
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=causal and allowed is None)


def _dense(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, causal: bool) -> Tensor:
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if allowed is None and causal:
        allowed = causal_pairs(q.shape[-2], q.device)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    return scores.softmax(-1) @ v


# Names of the argument `attention` -> functions of q, k, v, allowed (as in `TransformerBlock._allowed`) and causal.
ATTENTION: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor | None, bool], Tensor]] = {
    "fused": _fused,
    "dense": _dense,
}


def _rotation(x: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine (L, D / 2) of the angles position · 10000^(−2n / D), for x (B, H, L, D)."""
    length, head_dim = x.shape[-2:]
    exact: Factory = {"device": x.device, "dtype": torch.promote_types(x.dtype, torch.float32)}
    position = torch.arange(length, **exact)
    frequency = 10000.0 ** (-torch.arange(0, head_dim, 2, **exact) / head_dim)
    angle = position.unsqueeze(-1) * frequency
    return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
