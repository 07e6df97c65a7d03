"""Multi-head self-attention over quantised keys, in linear time."""

import torch
from einops import rearrange
from torch import Tensor, nn

from longvq_layers import _checks as check
from longvq_layers import ops
from longvq_layers.layers.attention.codebook_attention import CodebookAttention
from longvq_layers.layers.common import input_checks
from longvq_layers.layers.common.padding import zero_padding
from longvq_layers.layers.common.representation import call_repr
from longvq_layers.layers.streaming import step_checks


class VQAttention(nn.Module):
    """Multi-head self-attention whose keys outside a window are known only by their code: O(L·S) instead of O(L²).

        q, k, v = split_heads(x W_q + b_q, x W_k + b_k, x W_v + b_v)
        k̂_j = C_{z_j},  z_j = argmin_s ‖k_j − C_s‖²
        out_i = Σ_j softmax_j(q_i·k̂_j / √D + b_{j−i}) v_j
        y = dropout(concat_heads(out) W_o + b_o)

    A window bias b is learned. The codebook learns while the module is in training mode; add
    `commitment_loss(model)` to the loss.

    Args:
        embed_dim: width of input and output; a multiple of num_heads.
        num_heads: H, query heads of width D = embed_dim / H.
        num_kv_heads: Hkv, key-value heads (grouped-query attention), default H.
        num_codes: S, codes per key-value head, default 256.
        window: W, positions around a query whose keys count one by one, default 64; 0 = none.
        causal: whether a position sees only itself and the past, default False.
        bias: whether the four projections have a bias, default True.
        dropout: probability of dropping an element of the output y, default 0.0. Attention weights have no dropout:
            in linear time they never exist one by one.
        local_keys: "quantized" (default) or "exact" keys inside the window.
        key_grad: "cluster" (default) or "window", how keys outside the window learn, see `ops.vq_attention`.
        activation: "softmax" (default) or "laplace".
        commitment: β of the commitment loss, default 1e-4.
        codebook_decay: γ of the codebook's moving averages, default 0.99; see `Codebook`.
        backend: see `ops.vq_attention`, default "auto".
        device, dtype: of the parameters; the codebook stays in float32 or float64.

    Raises:
        ValueError, TypeError: sizes out of range or unknown options; in `forward` a wrong shape, dtype or device.

    Example:
        >>> layer = VQAttention(64, 4, num_codes=32, window=16, causal=True)
        >>> layer(torch.randn(2, 100, 64)).shape
        torch.Size([2, 100, 64])

        Generation: a prompt, then token by token.

        >>> layer, x = layer.eval(), torch.randn(2, 100, 64)
        >>> with torch.no_grad():
        ...     state = layer.initial_state(2)
        ...     prompt, state = layer.step(x[:, :90], state)
        ...     token, state = layer.step(x[:, 90], state)
        ...     whole = layer(x)
        >>> torch.allclose(prompt, whole[:, :90], atol=1e-5), torch.allclose(token, whole[:, 90], atol=1e-5)
        (True, True)

    Source: LongVQ (arXiv 2404.11163) section 4.2; Transformer-VQ (arXiv 2309.16354).
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        num_codes: int = 256,
        window: int = 64,
        causal: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
        local_keys: str = "quantized",
        key_grad: str = "cluster",
        activation: str = "softmax",
        commitment: float = 1e-4,
        codebook_decay: float = 0.99,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check.positive("VQAttention", embed_dim=embed_dim, num_heads=num_heads, num_kv_heads=num_kv_heads)
        check.divides("VQAttention", "num_heads", num_heads, "embed_dim", embed_dim)
        check.divides("VQAttention", "num_kv_heads", num_kv_heads, "num_heads", num_heads)
        check.floating("VQAttention", dtype)
        check.flags("VQAttention", causal=causal, bias=bias)
        check.probability("VQAttention", "dropout", dropout)
        self.embed_dim, self.num_heads, self.num_kv_heads = embed_dim, num_heads, num_kv_heads
        self.head_dim = embed_dim // num_heads
        kv_dim = num_kv_heads * self.head_dim
        factory = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias, **factory)
        self.k_proj = nn.Linear(embed_dim, kv_dim, bias, **factory)
        self.v_proj = nn.Linear(embed_dim, kv_dim, bias, **factory)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias, **factory)
        self.attention = CodebookAttention(
            num_heads,
            num_kv_heads,
            self.head_dim,
            num_codes=num_codes,
            window=window,
            causal=causal,
            local_keys=local_keys,
            key_grad=key_grad,
            activation=activation,
            commitment=commitment,
            codebook_decay=codebook_decay,
            backend=backend,
            **factory,
        )
        self.dropout = nn.Dropout(dropout)

    @property
    def codebook(self) -> nn.Module:
        """The `Codebook` of the keys."""
        return self.attention.codebook

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """Attend from every position to all others.

        Args:
            x: (B, L, embed_dim), dtype of the layer.
            key_padding_mask: (B, L) bool, True = ignore.
            cu_seqlens: (N+1,) int32, offsets of N documents in one row (B = 1) that don't see each other, see
                `ops.vq_attention`. Default none.

        Returns:
            (B, L, embed_dim); exactly 0 at masked positions, also where the output projection has a bias.
        """
        input_checks.sequence("VQAttention", "x", x, self.embed_dim, self.q_proj.weight, key_padding_mask)
        input_checks.packed("VQAttention", "x", x, cu_seqlens)
        # Nobody has to fill padding with numbers: NaN there would reach the gradients of the projections as 0 · NaN.
        x = zero_padding(x, key_padding_mask)
        q, k, v = self._project(x)
        out = self.attention(q, k, v, key_padding_mask, cu_seqlens=cu_seqlens)
        y = self.dropout(self.out_proj(rearrange(out, "b h l d -> b l (h d)")))
        return zero_padding(y, key_padding_mask)

    def initial_state(self, batch: int) -> ops.VQAttentionState:
        """The state of `batch` empty sequences, for `step`; causal only (NotImplementedError otherwise)."""
        return self.attention.initial_state(batch)

    def step(
        self, x: Tensor, state: ops.VQAttentionState, key_padding_mask: Tensor | None = None
    ) -> tuple[Tensor, ops.VQAttentionState]:
        """The next token or piece of a growing sequence, with a state of constant size. For inference only.

        Pieces of any length give together what `forward` gives for the whole in eval mode. Unlike there, a masked token
        takes no position: prompts of different lengths are padded, left or right, and each row goes on at its own
        length.

        Args:
            x: (B, embed_dim), one token, or (B, T, embed_dim), T ≥ 0 tokens; dtype of the layer.
            state: from `initial_state`; **updated in place**, `state.clone()` keeps it.
            key_padding_mask: (B,) or (B, T) bool, as x without its last axis, True = not part of the sequence.

        Returns:
            y like x, 0 at masked positions, and the same state.

        Raises:
            ValueError, TypeError: wrong shapes, dtypes or devices.
            NotImplementedError: a bidirectional layer, or gradients: call it under `torch.no_grad()`.
            RuntimeError: in training mode, where the codebook moves.
        """
        name = "VQAttention.step"
        if isinstance(x, Tensor) and x.dim() == 2:
            y, state = self.step(x.unsqueeze(1), state, step_checks.mask_of_token(name, key_padding_mask))
            return y.squeeze(1), state
        input_checks.sequence(name, "x", x, self.embed_dim, self.q_proj.weight, key_padding_mask)
        x = zero_padding(x, key_padding_mask)
        out = self.attention.step(*self._project(x), state, key_padding_mask)
        y = self.out_proj(rearrange(out, "b h l d -> b l (h d)"))
        return zero_padding(y, key_padding_mask), state

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values (B, heads, L, D) of x (B, L, embed_dim)."""
        return tuple(
            rearrange(project(x), "b l (h d) -> b h l d", d=self.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )

    def extra_repr(self) -> str:
        core = self.attention
        return call_repr(
            (self.embed_dim, self.num_heads),
            num_kv_heads=self.num_kv_heads,
            num_codes=core.num_codes,
            window=core.window,
            causal=core.causal,
            bias=self.q_proj.bias is not None,
            dropout=self.dropout.p,
            local_keys=core.local_keys,
            key_grad=core.key_grad,
            activation=core.activation,
            commitment=core.commitment,
            codebook_decay=core.codebook.decay,
            backend=core.backend,
        )
