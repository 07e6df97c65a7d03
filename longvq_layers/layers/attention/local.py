"""Multi-head self-attention in a sliding window, exact and in linear time."""

import torch
from torch import Tensor, nn

from longvq_layers import _checks as check
from longvq_layers.layers.attention.core import WindowBias
from longvq_layers.layers.attention.heads import HeadProjections
from longvq_layers.layers.attention.windowed import windowed_attention
from longvq_layers.layers.common.factory import Factory
from longvq_layers.layers.common.padding import zero_padding
from longvq_layers.layers.common.representation import arguments_repr
from longvq_layers.layers.streaming import step_checks
from longvq_layers.layers.streaming.gaps import put_back
from longvq_layers.layers.streaming.layer import StreamingLayer
from longvq_layers.layers.streaming.states import LocalAttentionState
from longvq_layers.ops.torch.tokens import take, tokens_first


class LocalAttention(WindowBias, HeadProjections, StreamingLayer[LocalAttentionState]):
    """Multi-head self-attention within a sliding window: O(L·W) instead of O(L²).

        q, k, v = split_heads(x W_q + b_q, x W_k + b_k, x W_v + b_v)
        out_i = Σ_j softmax_j(q_i·k_j / √D + b_{j−i}) v_j     over 0 ≤ i−j < W if causal, else |i−j| < W
        y = dropout(concat_heads(out) W_o + b_o)

    The softmax over these positions is exact. For attention beyond the window see `VQAttention`.

    Args:
        embed_dim: width of input and output; a multiple of num_heads.
        num_heads: H, query heads of width D = embed_dim / H.
        window: W, default 64. A position sees itself and W − 1 positions before it, also after it if bidirectional.
        causal: whether a position sees only itself and the past, default False.
        num_kv_heads: Hkv, key-value heads (grouped-query attention), default H.
        bias: whether the four projections have a bias, default True.
        window_bias: whether to learn b, one number per head and offset, from zero; default True.
        dropout: probability of dropping an element of the output y, default 0.0.
        device, dtype: of the parameters.

    Raises:
        ValueError, TypeError: sizes out of range or unknown options; in `forward` a wrong shape, dtype or device.

    Example:
        >>> layer = LocalAttention(64, 4, window=16, causal=True).eval()
        >>> x = torch.randn(2, 100, 64)
        >>> with torch.no_grad():
        ...     prompt, state = layer.step(x[:, :90], layer.initial_state(2))
        ...     token, state = layer.step(x[:, 90], state)
        ...     whole = layer(x)
        >>> torch.allclose(prompt, whole[:, :90], atol=1e-5), torch.allclose(token, whole[:, 90], atol=1e-5)
        (True, True)

    Source: Beltagy et al. 2020, Longformer (arXiv 2004.05150), section 3.1; as in SPADE (arXiv 2212.08136).
    """

    state_class = LocalAttentionState

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        window: int = 64,
        causal: bool = False,
        num_kv_heads: int | None = None,
        bias: bool = True,
        window_bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "LocalAttention"
        check.positive(name, window=window)
        check.flags(name, causal=causal, window_bias=window_bias)
        check.probability(name, "dropout", dropout)
        self.window, self.causal = window, causal
        factory: Factory = {"device": device, "dtype": dtype}
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self._add_projections(name, embed_dim, num_heads, num_kv_heads, bias, factory)
        self._add_window_bias(window_bias, num_heads, window, causal, factory)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """Attend from every position to the positions in its window.

        Args:
            x: (B, L, embed_dim), dtype of the layer.
            key_padding_mask: (B, L) bool, True = ignore. Windows count positions, masked ones included.
            cu_seqlens: (N+1,) int32, offsets of N documents in one row (B = 1) that don't see each other, see
                `ops.vq_attention`. Default none.

        Returns:
            (B, L, embed_dim); exactly 0 at masked positions, also where the output projection has a bias.
        """
        x = self._checked_input("LocalAttention", x, key_padding_mask, cu_seqlens)
        q, k, v = self._project(x)
        out = windowed_attention(
            q,
            k,
            v,
            window=self.window,
            causal=self.causal,
            bias=self.window_bias,
            key_padding_mask=key_padding_mask,
            cu_seqlens=cu_seqlens,
        )
        return zero_padding(self.dropout(self._project_output(out)), key_padding_mask)

    def initial_state(self, batch: int) -> LocalAttentionState:
        """The state of `batch` empty sequences, for `step`; causal only (NotImplementedError otherwise)."""
        name = "LocalAttention.initial_state"
        self._check_streams(name)
        step_checks.batch(name, batch)
        weight = self.k_proj.weight
        keys = weight.new_zeros(batch, self.num_kv_heads, self.window - 1, self.head_dim)
        lengths = torch.zeros(batch, dtype=torch.int64, device=weight.device)
        return LocalAttentionState(keys, keys.clone(), lengths)

    def check_state(self, name: str, x: Tensor, state: LocalAttentionState) -> None:
        super().check_state(name, x, state)
        expected = (x.shape[0], self.num_kv_heads, self.window - 1, self.head_dim)
        check.size(name, "state.keys", state.keys, expected, "B Hkv W-1 D")
        check.same_device(name, "x", x, state=state.keys)

    def _step(
        self, x: Tensor, state: LocalAttentionState, key_padding_mask: Tensor | None
    ) -> tuple[Tensor, LocalAttentionState]:
        q, k, v = self._project(x)
        if key_padding_mask is None:
            order = None
            counts = state.lengths.new_tensor(x.shape[1]).expand(x.shape[0])  # (B,) new tokens
        else:
            # Move each row's tokens to the front. No token sees the padding after them.
            counts = (~key_padding_mask).sum(1)
            order = tokens_first(key_padding_mask)  # (B, T)
            q, k, v = (take(x, order) for x in (q, k, v))
        past = self.window - 1
        k, v = (torch.cat([old.to(new.dtype), new], 2) for old, new in ((state.keys, k), (state.values, v)))
        index = torch.arange(past, device=x.device)
        missing = nn.functional.pad(index < past - state.lengths.unsqueeze(1), (0, x.shape[1]))  # (B, past + T)
        out = windowed_attention(
            q, k, v, window=self.window, causal=True, bias=self.window_bias, key_padding_mask=missing, past=past
        )
        if order is not None:
            out = put_back(out, order)
        latest = counts.unsqueeze(1) + index  # (B, W − 1)
        state.keys.copy_(take(k, latest))
        state.values.copy_(take(v, latest))
        state.lengths.add_(counts)
        return zero_padding(self._project_output(out), key_padding_mask), state

    def _width_and_parameter(self) -> tuple[int, Tensor]:
        return self.embed_dim, self.q_proj.weight

    def _check_streams(self, name: str) -> None:
        step_checks.causal(name, self.causal)

    def extra_repr(self) -> str:
        has_bias, has_window_bias = self.q_proj.bias is not None, self.window_bias is not None
        return arguments_repr(self, LocalAttention, bias=has_bias, window_bias=has_window_bias)
