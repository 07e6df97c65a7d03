"""Multi-head self-attention in a sliding window, exact and in linear time."""

import torch
from einops import rearrange
from torch import Tensor, nn

from longvq_layers import _checks as check
from longvq_layers.layers.attention.window_bias import WindowBias
from longvq_layers.layers.attention.windowed import windowed_attention
from longvq_layers.layers.common import input_checks
from longvq_layers.layers.common.padding import zero_padding
from longvq_layers.layers.common.representation import call_repr
from longvq_layers.layers.streaming import step_checks
from longvq_layers.layers.streaming.states import LocalAttentionState


class LocalAttention(WindowBias):
    """Multi-head self-attention that sees the positions of a window and nothing else: O(L·W) instead of O(L²).

        q, k, v = split_heads(x W_q + b_q, x W_k + b_k, x W_v + b_v)
        out_i = Σ_j softmax_j(q_i·k_j / √D + b_{j−i}) v_j     over 0 ≤ i−j < W if causal, else |i−j| < W
        y = dropout(concat_heads(out) W_o + b_o)

    The softmax over these positions is exact. There is no codebook and no far field; for these see `VQAttention`.

    Args:
        embed_dim: width of input and output; a multiple of num_heads.
        num_heads: H, query heads of width D = embed_dim / H.
        window: W, a position sees itself and the W − 1 positions before it, and after it if bidirectional; default 64.
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
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check.positive(name, embed_dim=embed_dim, num_heads=num_heads, num_kv_heads=num_kv_heads, window=window)
        check.divides(name, "num_heads", num_heads, "embed_dim", embed_dim)
        check.divides(name, "num_kv_heads", num_kv_heads, "num_heads", num_heads)
        check.floating(name, dtype)
        check.flags(name, causal=causal, bias=bias, window_bias=window_bias)
        check.probability(name, "dropout", dropout)
        self.embed_dim, self.num_heads, self.num_kv_heads = embed_dim, num_heads, num_kv_heads
        self.head_dim, self.window, self.causal = embed_dim // num_heads, window, causal
        kv_dim = num_kv_heads * self.head_dim
        factory = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias, **factory)
        self.k_proj = nn.Linear(embed_dim, kv_dim, bias, **factory)
        self.v_proj = nn.Linear(embed_dim, kv_dim, bias, **factory)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias, **factory)
        self._add_window_bias(window_bias, num_heads, window, causal, device, dtype)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """Attend from every position to those in its window.

        Args:
            x: (B, L, embed_dim), dtype of the layer.
            key_padding_mask: (B, L) bool, True = ignore. Masked positions keep their place: windows are of positions.
            cu_seqlens: (N+1,) int32, offsets of N documents in one row (B = 1) that don't see each other, see
                `ops.vq_attention`. Default none.

        Returns:
            (B, L, embed_dim); exactly 0 at masked positions, also where the output projection has a bias.
        """
        input_checks.sequence("LocalAttention", "x", x, self.embed_dim, self.q_proj.weight, key_padding_mask)
        input_checks.packed("LocalAttention", "x", x, cu_seqlens)
        # Nobody has to fill padding with numbers: NaN there would reach the gradients of the projections as 0 · NaN.
        x = zero_padding(x, key_padding_mask)
        options = {"key_padding_mask": key_padding_mask, "cu_seqlens": cu_seqlens}
        out = windowed_attention(
            *self._project(x), window=self.window, causal=self.causal, bias=self.window_bias, **options
        )
        return zero_padding(self.dropout(self._merge(out)), key_padding_mask)

    def initial_state(self, batch: int) -> LocalAttentionState:
        """The state of `batch` empty sequences, for `step`; causal only (NotImplementedError otherwise)."""
        step_checks.causal("LocalAttention.initial_state", self.causal)
        step_checks.batch("LocalAttention.initial_state", batch)
        weight = self.k_proj.weight
        keys = weight.new_zeros(batch, self.num_kv_heads, self.window - 1, self.head_dim)
        lengths = torch.zeros(batch, dtype=torch.int64, device=weight.device)
        return LocalAttentionState(keys, keys.clone(), lengths)

    def step(
        self, x: Tensor, state: LocalAttentionState, key_padding_mask: Tensor | None = None
    ) -> tuple[Tensor, LocalAttentionState]:
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
            RuntimeError: in training mode, where dropout would make it another function.
        """
        name = "LocalAttention.step"
        if isinstance(x, Tensor) and x.dim() == 2:
            y, state = self.step(x.unsqueeze(1), state, step_checks.mask_of_token(name, key_padding_mask))
            return y.squeeze(1), state
        step_checks.causal(name, self.causal)
        input_checks.sequence(name, "x", x, self.embed_dim, self.q_proj.weight, key_padding_mask)
        step_checks.inference(name, self, x)
        self.check_state(name, x, state)
        q, k, v = self._project(zero_padding(x, key_padding_mask))
        if key_padding_mask is None:
            counts = state.lengths.new_tensor(x.shape[1]).expand(x.shape[0])
        else:
            # Each row's tokens move to the front; what comes behind them is seen by none of them.
            counts = (~key_padding_mask).sum(1)
            order = key_padding_mask.to(torch.uint8).argsort(dim=1, stable=True)  # (B, T)
            q, k, v = (_take(x, order) for x in (q, k, v))
        past = self.window - 1
        k, v = (torch.cat([old.to(new.dtype), new], 2) for old, new in ((state.keys, k), (state.values, v)))
        index = torch.arange(past, device=x.device)
        missing = nn.functional.pad(index < past - state.lengths.unsqueeze(1), (0, x.shape[1]))  # (B, past + T)
        out = windowed_attention(
            q, k, v, window=self.window, causal=True, bias=self.window_bias, key_padding_mask=missing, past=past
        )
        if key_padding_mask is not None:
            out = _take(out, order.argsort(dim=1))
        latest = counts.unsqueeze(1) + index  # (B, W − 1)
        state.keys.copy_(_take(k, latest))
        state.values.copy_(_take(v, latest))
        state.lengths.add_(counts)
        return zero_padding(self._merge(out), key_padding_mask), state

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values (B, heads, L, D) of x (B, L, embed_dim)."""
        return tuple(
            rearrange(project(x), "b l (h d) -> b h l d", d=self.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )

    def _merge(self, out: Tensor) -> Tensor:
        return self.out_proj(rearrange(out, "b h l d -> b l (h d)"))

    def check_state(self, name: str, x: Tensor, state: object) -> None:
        """`state` is one of this layer for the rows of x (B, T, embed_dim); `name` is who asks."""
        step_checks.state_type(name, state, LocalAttentionState)
        expected = (x.shape[0], self.num_kv_heads, self.window - 1, self.head_dim)
        if tuple(state.keys.shape) != expected:
            raise ValueError(
                f"{name}: state must have keys of shape (B, Hkv, W - 1, D) = {expected}, got {tuple(state.keys.shape)}"
            )
        check.same_device(name, "x", x, state=state.keys)

    def extra_repr(self) -> str:
        return call_repr(
            (self.embed_dim, self.num_heads),
            window=self.window,
            causal=self.causal,
            num_kv_heads=self.num_kv_heads,
            bias=self.q_proj.bias is not None,
            window_bias=self.window_bias is not None,
            dropout=self.dropout.p,
        )


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x (B, H, L, D) at the positions of index (B, M): (B, H, M, D)."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
