"""Multi-head self-attention over quantised keys, in linear time."""

import torch
from torch import Tensor, nn

from longvq_layers import _checks as check
from longvq_layers import ops
from longvq_layers.layers.attention.codebook_attention import CodebookAttention
from longvq_layers.layers.attention.heads import HeadProjections
from longvq_layers.layers.codebook.codebook import Codebook
from longvq_layers.layers.common.factory import Factory
from longvq_layers.layers.common.padding import zero_padding
from longvq_layers.layers.common.representation import arguments_repr
from longvq_layers.layers.streaming import step_checks
from longvq_layers.layers.streaming.layer import StreamingLayer


class VQAttention(HeadProjections, StreamingLayer[ops.VQAttentionState]):
    """Multi-head self-attention that replaces keys outside a window by their code: O(L·S) instead of O(L²).

        q, k, v = split_heads(x W_q + b_q, x W_k + b_k, x W_v + b_v)
        k̂_j = C_{z_j},  z_j = argmin_s ‖k_j − C_s‖²
        out_i = Σ_j softmax_j(q_i·k̂_j / √D + b_{j−i}) v_j
        y = dropout(concat_heads(out) W_o + b_o)

    The bias b inside the window is learned. The codebook C learns while the module is in training mode. Add
    `commitment_loss(model)` to the loss.

    Args:
        embed_dim: width of input and output; a multiple of num_heads.
        num_heads: H, query heads of width D = embed_dim / H.
        num_kv_heads: Hkv, key-value heads (grouped-query attention), default H.
        num_codes: S, codes per key-value head, default 256.
        window: W, default 64; keys less than W positions away are attended one by one; 0 = none.
        causal: whether a position sees only itself and the past, default False.
        bias: whether the four projections have a bias, default True.
        dropout: probability of dropping an element of the output y, default 0.0. Attention weights have no dropout,
            because attention in linear time never computes them one by one.
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

    state_class = ops.VQAttentionState
    attention: CodebookAttention

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
        name = "VQAttention"
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check.flags(name, causal=causal)
        check.probability(name, "dropout", dropout)
        factory: Factory = {"device": device, "dtype": dtype}
        self._add_projections(name, embed_dim, num_heads, num_kv_heads, bias, factory)
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
    def codebook(self) -> Codebook:
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
        x = self._checked_input("VQAttention", x, key_padding_mask, cu_seqlens)
        q, k, v = self._project(x)
        out = self.attention(q, k, v, key_padding_mask, cu_seqlens=cu_seqlens)
        return zero_padding(self.dropout(self._project_output(out)), key_padding_mask)

    def initial_state(self, batch: int) -> ops.VQAttentionState:
        """The state of `batch` empty sequences, for `step`; causal only (NotImplementedError otherwise)."""
        return self.attention.initial_state(batch)

    def _step(
        self, x: Tensor, state: ops.VQAttentionState, key_padding_mask: Tensor | None
    ) -> tuple[Tensor, ops.VQAttentionState]:
        q, k, v = self._project(x)
        out = self.attention.step(q, k, v, state, key_padding_mask)
        return zero_padding(self._project_output(out), key_padding_mask), state

    def _width_and_parameter(self) -> tuple[int, Tensor]:
        return self.embed_dim, self.q_proj.weight

    def _check_streams(self, name: str) -> None:
        step_checks.causal(name, self.attention.causal)

    def extra_repr(self) -> str:
        has_bias, decay = self.q_proj.bias is not None, self.attention.codebook.decay
        return arguments_repr(self, VQAttention, self.attention, bias=has_bias, codebook_decay=decay)
