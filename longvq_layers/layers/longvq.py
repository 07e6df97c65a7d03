"""The LongVQ block: structured memory from a state space model guides attention over quantised keys."""

import torch
from einops import rearrange
from torch import Tensor, nn

from longvq_layers.layers import _inputs
from longvq_layers.layers.codebook_attention import CodebookAttention
from longvq_layers.layers.ssm import DiagonalSSM
from longvq_layers.ops import _checks as check


class LongVQBlock(nn.Module):
    """A gated block of state space model and VQ attention, followed by a feed-forward block.

        Z   = silu(SSM(X'))                                      structured memory
        Q   = Z W_q + b_q,   K = Z W_k + b_k
        G_a = silu(Z W_a + b_a)                                  attention gate
        V   = silu(X' W_v + b_v)
        O   = VQAttention(Q, K, V)                               see `CodebookAttention`
        U   = silu(X' W_h + (G_a ⊙ O) U_h + b_h)                 candidate
        G_o = sigmoid(Z W_o + b_o)                               output gate
        Y   = G_o ⊙ U + (1 − G_o) ⊙ X                            the gate is the residual connection
        norm="pre":   X' = norm₁(X),  out = Y + FFN(norm₂(Y))
        norm="post":  X' = X,  Y ← norm₁(Y),  out = norm₂(Y + FFN(Y))
        FFN(X) = silu(X W₁ + b₁) W₂ + b₂

    The codebook learns in training mode; add `commitment_loss(model)` to the loss and make the optimiser with
    `optimizer_groups`.

    Args:
        d_model: width of input and output.
        num_heads: H, attention heads, default 1 as in the paper.
        num_codes: S, codes per head, default 256.
        window: W, positions in which keys count one by one, default 64; 0 = none.
        d_state: 2N, state of an SSM channel, even, default 64.
        d_attn: width of Q and K over all heads, a multiple of H; default d_model / 2 rounded up to one.
        d_value: width of V, G_a and O over all heads, a multiple of H; default d_model rounded up to one.
        d_ff: hidden width of the feed-forward block, default 2 d_model.
        causal: only past and present, default False (bidirectional).
        dropout: probability of dropping an element of Z, of U, and of the feed-forward block's hidden layer and
            output; default 0.0.
        activation: of the attention, "softmax" (default) or "laplace".
        norm: "pre" (default) or "post", layer norm.
        local_keys: "quantized" (default) or "exact", see `ops.vq_attention`.
        key_grad: "cluster" (default) or "window", see `ops.vq_attention`.
        commitment: β of the commitment loss, default 1e-4.
        backend: of SSM and attention, default "auto".
        device, dtype: of the parameters; SSM and codebook stay in float32 or float64.

    Raises:
        ValueError, TypeError: sizes out of range or unknown options; in `forward` a wrong shape, dtype or device.

    Example:
        >>> block = LongVQBlock(32, num_codes=16, window=8, d_state=16, causal=True)
        >>> block(torch.randn(2, 100, 32)).shape
        torch.Size([2, 100, 32])

    Source: LongVQ (arXiv 2404.11163), section 4; gates as in Mega (arXiv 2209.10655), section 3.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 1,
        num_codes: int = 256,
        window: int = 64,
        d_state: int = 64,
        d_attn: int | None = None,
        d_value: int | None = None,
        d_ff: int | None = None,
        causal: bool = False,
        dropout: float = 0.0,
        activation: str = "softmax",
        norm: str = "pre",
        local_keys: str = "quantized",
        key_grad: str = "cluster",
        commitment: float = 1e-4,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "LongVQBlock"
        _inputs.positive(name, d_model=d_model, num_heads=num_heads)
        d_attn = _round_up(d_model / 2, num_heads) if d_attn is None else d_attn
        d_value = _round_up(d_model, num_heads) if d_value is None else d_value
        d_ff = 2 * d_model if d_ff is None else d_ff
        _inputs.positive(name, d_attn=d_attn, d_value=d_value, d_ff=d_ff)
        _inputs.divides(name, "num_heads", num_heads, "d_attn", d_attn)
        _inputs.divides(name, "num_heads", num_heads, "d_value", d_value)
        _inputs.floating(name, dtype)
        _inputs.probability(name, "dropout", dropout)
        check.one_of(name, "norm", norm, ("pre", "post"))
        self.d_model, self.num_heads, self.norm = d_model, num_heads, norm
        self.d_attn, self.d_value, self.d_ff = d_attn, d_value, d_ff
        factory = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(d_model, **factory)
        self.norm2 = nn.LayerNorm(d_model, **factory)
        self.ssm = DiagonalSSM(d_model, d_state=d_state, causal=causal, backend=backend, **factory)
        self.q_proj = nn.Linear(d_model, d_attn, **factory)
        self.k_proj = nn.Linear(d_model, d_attn, **factory)
        self.v_proj = nn.Linear(d_model, d_value, **factory)
        self.attention_gate = nn.Linear(d_model, d_value, **factory)
        self.output_gate = nn.Linear(d_model, d_model, **factory)
        self.candidate_x = nn.Linear(d_model, d_model, **factory)  # W_h and b_h
        self.candidate_o = nn.Linear(d_value, d_model, bias=False, **factory)  # U_h
        self.attention = CodebookAttention(
            num_heads,
            num_heads,
            d_attn // num_heads,
            value_dim=d_value // num_heads,
            num_codes=num_codes,
            window=window,
            causal=causal,
            local_keys=local_keys,
            key_grad=key_grad,
            activation=activation,
            commitment=commitment,
            backend=backend,
            **factory,
        )
        self.dropout = nn.Dropout(dropout)
        self.ffn = nn.Sequential(
            nn.Linear(d_model, d_ff, **factory),
            nn.SiLU(),
            nn.Dropout(dropout),
            nn.Linear(d_ff, d_model, **factory),
            nn.Dropout(dropout),
        )

    @property
    def codebook(self) -> nn.Module:
        """The `Codebook` of the keys."""
        return self.attention.codebook

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """Run the block.

        Args:
            x: (B, L, d_model), dtype of the layer.
            key_padding_mask: (B, L) bool, True = ignore.
            cu_seqlens: (N+1,) int32, offsets of N documents in one row (B = 1) that don't see each other, see
                `ops.vq_attention`. Default none.

        Returns:
            (B, L, d_model), exactly 0 at masked positions.
        """
        _inputs.sequence("LongVQBlock", "x", x, self.d_model, self.q_proj.weight, key_padding_mask)
        _inputs.packed("LongVQBlock", "x", x, cu_seqlens)
        # Nobody has to fill padding with numbers: NaN there would reach the gradients of the projections as 0 · NaN.
        x = _inputs.zero_padding(x, key_padding_mask)
        if self.norm == "pre":
            y = self._gated_attention(x, self.norm1(x), key_padding_mask, cu_seqlens)
            y = y + self.ffn(self.norm2(y))
        else:
            y = self.norm1(self._gated_attention(x, x, key_padding_mask, cu_seqlens))
            y = self.norm2(y + self.ffn(y))
        return _inputs.zero_padding(y, key_padding_mask)

    def _gated_attention(
        self, x: Tensor, normed: Tensor, key_padding_mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        silu = nn.functional.silu
        z = self.dropout(silu(self.ssm(normed, key_padding_mask, cu_seqlens=cu_seqlens)))
        v = silu(self.v_proj(normed))
        q, k, v = (
            rearrange(wide, "b l (h d) -> b h l d", h=self.num_heads) for wide in (self.q_proj(z), self.k_proj(z), v)
        )
        out = rearrange(self.attention(q, k, v, key_padding_mask, cu_seqlens=cu_seqlens), "b h l d -> b l (h d)")
        gated = silu(self.attention_gate(z)) * out
        u = self.dropout(silu(self.candidate_x(normed) + self.candidate_o(gated)))
        gate = torch.sigmoid(self.output_gate(z))
        return gate * u + (1 - gate) * x

    def extra_repr(self) -> str:
        core = self.attention
        return _inputs.call_repr(
            (self.d_model,),
            num_heads=self.num_heads,
            num_codes=core.num_codes,
            window=core.window,
            d_state=self.ssm.d_state,
            d_attn=self.d_attn,
            d_value=self.d_value,
            d_ff=self.d_ff,
            causal=core.causal,
            dropout=self.dropout.p,
            activation=core.activation,
            norm=self.norm,
            local_keys=core.local_keys,
            key_grad=core.key_grad,
            commitment=core.commitment,
            backend=core.backend,
        )


def _round_up(width: float, multiple: int) -> int:
    return max(1, -int(-width // multiple)) * multiple
