"""The LongVQ block: a state space model gives the queries and keys of attention over quantised keys."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from torch.utils.checkpoint import checkpoint

from longvq_layers import _checks as check
from longvq_layers.layers.attention.codebook_attention import CodebookAttention, check_options
from longvq_layers.layers.attention.dense import DenseAttention
from longvq_layers.layers.attention.heads import merge_heads, split_heads
from longvq_layers.layers.blocks.base import NORM_PLACES, ResidualBlock, feed_forward_width
from longvq_layers.layers.codebook.codebook import Codebook
from longvq_layers.layers.common.factory import Factory
from longvq_layers.layers.common.padding import zero_padding
from longvq_layers.layers.common.representation import arguments_repr
from longvq_layers.layers.parts.dropout import Dropout, make_dropout
from longvq_layers.layers.parts.feed_forward import ACTIVATIONS
from longvq_layers.layers.parts.norm import make_norm
from longvq_layers.layers.parts.pointwise import gated_residual, silu_product
from longvq_layers.layers.ssm.advance import advance
from longvq_layers.layers.ssm.diagonal import DiagonalSSM
from longvq_layers.layers.ssm.ema import DampedEMA
from longvq_layers.layers.streaming import step_checks
from longvq_layers.layers.streaming.layer import StreamingLayer
from longvq_layers.layers.streaming.states import LongVQState

SSMS = ("s4d", "ema")
_T = TypeVar("_T")


class LongVQBlock(ResidualBlock, StreamingLayer[LongVQState]):
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

    The codebook learns in training mode; add `commitment_loss(model)` to the loss and make the optimiser with
    `optimizer_groups`.

    Args:
        d_model: width of input and output.
        num_heads: H, attention heads, default 1 as in the paper.
        num_codes: S, codes per head, default 256. None = softmax attention over all keys in quadratic time, see
            `DenseAttention`; local_keys, key_grad and commitment then have no effect.
        window: W, default 64; keys less than W positions away are attended one by one; 0 = none.
        window_bias: whether a bias is learned for each offset inside the window, default True.
        ssm: "s4d" (default) for `DiagonalSSM`, or "ema" for Mega's `DampedEMA`.
        d_state: 2N, state of an S4D channel, even, default 64.
        ema_dim: N, state of an EMA channel, default 16.
        ssm_gate: whether the two gates are computed from Z as above (default True) or from X'.
        d_attn: width of Q and K over all heads, a multiple of H; default d_model / 2 rounded up to a multiple.
        d_value: width of V, G_a and O over all heads, a multiple of H; default d_model rounded up to a multiple.
        d_ff: hidden width of the feed-forward block, default 2 d_model; 0 = no such block, and no norm₂.
        ffn_activation: "silu" (default), "gelu" or "relu", of the feed-forward block.
        glu: whether the feed-forward block is gated, see `FeedForward`, default False.
        causal: only past and present, default False (bidirectional).
        dropout: probability of dropping an element of Z, of U, and of the feed-forward block's output; default 0.0.
        hidden_dropout: the same for the feed-forward block's hidden layer, default `dropout`.
        dropout_type: "element" (default), or "feature" for whole channels of a sequence.
        activation: of the attention, "softmax" (default) or "laplace".
        norm: place of the norms, "pre" (default) or "post".
        norm_type: kind of the norms, "layer" (default), "rms", "scale" or "batch", see `layers/parts/norm.py`.
        local_keys: "quantized" (default) or "exact", see `ops.vq_attention`.
        key_grad: "cluster" (default) or "window", see `ops.vq_attention`.
        commitment: β of the commitment loss, default 1e-4.
        codebook_decay: γ of the codebook's moving averages, default 0.99; see `Codebook`.
        recompute: whether training saves only the inputs and outputs of SSM and attention. The backward then computes
            gates, projections and the feed-forward block again: half the memory for about 15% more time. Default False.
            The backward must run in training mode, like the forward, and not under `torch.func` transforms.
        backend: of SSM and attention, default "auto".
        device, dtype: of the parameters; SSM and codebook stay in float32 or float64.

    Raises:
        ValueError, TypeError: sizes out of range or unknown options; in `forward` a wrong shape, dtype or device.

    Example:
        >>> block = LongVQBlock(32, num_codes=16, window=8, d_state=16, causal=True)
        >>> x = torch.randn(2, 100, 32)
        >>> block(x).shape
        torch.Size([2, 100, 32])

        Generation: a prompt, then token by token, with a state of constant size.

        >>> with torch.no_grad():
        ...     state = block.eval().initial_state(2)
        ...     prompt, state = block.step(x[:, :90], state)
        ...     token, state = block.step(x[:, 90], state)
        >>> torch.allclose(token, block(x)[:, 90], atol=1e-4)
        True

    Source: LongVQ (arXiv 2404.11163), section 4; gates as in Mega (arXiv 2209.10655), section 3.
    """

    state_class = LongVQState
    ssm: DiagonalSSM | DampedEMA
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    attention_gate: nn.Linear
    output_gate: nn.Linear
    candidate_x: nn.Linear
    candidate_o: nn.Linear
    attention: CodebookAttention | DenseAttention
    dropout: Dropout

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 1,
        num_codes: int | None = 256,
        window: int = 64,
        window_bias: bool = True,
        ssm: str = "s4d",
        d_state: int = 64,
        ema_dim: int = 16,
        ssm_gate: bool = True,
        d_attn: int | None = None,
        d_value: int | None = None,
        d_ff: int | None = None,
        ffn_activation: str = "silu",
        glu: bool = False,
        causal: bool = False,
        dropout: float = 0.0,
        hidden_dropout: float | None = None,
        dropout_type: str = "element",
        activation: str = "softmax",
        norm: str = "pre",
        norm_type: str = "layer",
        local_keys: str = "quantized",
        key_grad: str = "cluster",
        commitment: float = 1e-4,
        codebook_decay: float = 0.99,
        recompute: bool = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "LongVQBlock"
        check.positive(name, d_model=d_model, num_heads=num_heads)
        d_attn = _round_up(d_model / 2, num_heads) if d_attn is None else d_attn
        d_value = _round_up(d_model, num_heads) if d_value is None else d_value
        d_ff = feed_forward_width(name, d_ff, 2 * d_model)
        hidden_dropout = dropout if hidden_dropout is None else hidden_dropout
        check.positive(name, d_attn=d_attn, d_value=d_value, d_state=d_state, ema_dim=ema_dim)
        check.divides(name, "num_heads", num_heads, "d_attn", d_attn)
        check.divides(name, "num_heads", num_heads, "d_value", d_value)
        check.floating(name, dtype)
        check.flags(name, window_bias=window_bias, ssm_gate=ssm_gate, glu=glu, causal=causal, recompute=recompute)
        check.probability(name, "dropout", dropout)
        check.probability(name, "hidden_dropout", hidden_dropout)
        check.one_of(name, "norm", norm, NORM_PLACES)
        check.one_of(name, "ssm", ssm, SSMS)
        check.one_of(name, "ffn_activation", ffn_activation, tuple(ACTIVATIONS))
        check_options(name, local_keys, key_grad, activation)
        if num_codes is None and activation != "softmax":
            raise ValueError(f"{name}: activation must be 'softmax' with num_codes=None, got {activation!r}")
        self.d_model, self.num_heads, self.num_codes, self.causal = d_model, num_heads, num_codes, causal
        self.window, self.window_bias, self.activation = window, window_bias, activation
        self.ssm_kind, self.d_state, self.ema_dim, self.ssm_gate = ssm, d_state, ema_dim, ssm_gate
        self.d_attn, self.d_value = d_attn, d_value
        self.d_ff, self.ffn_activation, self.glu = d_ff, ffn_activation, glu
        self.hidden_dropout, self.dropout_type = hidden_dropout, dropout_type
        self.norm, self.norm_type = norm, norm_type
        self.local_keys, self.key_grad, self.backend = local_keys, key_grad, backend
        self.commitment, self.codebook_decay, self.recompute = commitment, codebook_decay, recompute
        factory: Factory = {"device": device, "dtype": dtype}
        self.norm1 = make_norm(name, norm_type, d_model, **factory)
        if ssm == "ema":
            self.ssm = DampedEMA(d_model, ndim=ema_dim, causal=causal, backend=backend, **factory)
        else:
            self.ssm = DiagonalSSM(d_model, d_state=d_state, causal=causal, backend=backend, **factory)
        self.q_proj = nn.Linear(d_model, d_attn, **factory)
        self.k_proj = nn.Linear(d_model, d_attn, **factory)
        self.v_proj = nn.Linear(d_model, d_value, **factory)
        self.attention_gate = nn.Linear(d_model, d_value, **factory)
        self.output_gate = nn.Linear(d_model, d_model, **factory)
        self.candidate_x = nn.Linear(d_model, d_model, **factory)  # W_h and b_h
        self.candidate_o = nn.Linear(d_value, d_model, bias=False, **factory)  # U_h
        head_dim, value_dim = d_attn // num_heads, d_value // num_heads
        if num_codes is None:
            self.attention = DenseAttention(
                num_heads,
                num_heads,
                head_dim,
                value_dim=value_dim,
                window=window,
                causal=causal,
                window_bias=window_bias,
                **factory,
            )
        else:
            self.attention = CodebookAttention(
                num_heads,
                num_heads,
                head_dim,
                value_dim=value_dim,
                num_codes=num_codes,
                window=window,
                causal=causal,
                local_keys=local_keys,
                key_grad=key_grad,
                activation=activation,
                window_bias=window_bias,
                commitment=commitment,
                codebook_decay=codebook_decay,
                backend=backend,
                **factory,
            )
        self.dropout = make_dropout(name, dropout_type, dropout)
        self._add_feed_forward(name, d_ff, dropout, hidden_dropout, factory)

    @property
    def codebook(self) -> Codebook | None:
        """The `Codebook` of the keys; None without quantisation."""
        return self.attention.codebook if isinstance(self.attention, CodebookAttention) else None

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
        x = self._checked_input("LongVQBlock", x, key_padding_mask, cu_seqlens)
        normed = self._before_mixer(x, key_padding_mask)
        memory = self._memory(self.ssm(normed, key_padding_mask, cu_seqlens=cu_seqlens))
        q, k, v = self._project(memory, normed)
        o = self.attention(q, k, v, key_padding_mask, cu_seqlens=cu_seqlens)
        return self._finish(x, memory, normed, o, key_padding_mask)

    def initial_state(self, batch: int) -> LongVQState:
        """The state of `batch` empty sequences, for `step`.

        Raises NotImplementedError for a bidirectional block and for one with num_codes=None, as `step` does.
        """
        attention = self._streaming_attention("LongVQBlock.initial_state")
        memory = self.ssm.initial_state(batch, self.q_proj.weight.dtype)
        return LongVQState(memory, attention.initial_state(batch))

    def _step(self, x: Tensor, state: LongVQState, key_padding_mask: Tensor | None) -> tuple[Tensor, LongVQState]:
        normed = self._before_mixer(x, key_padding_mask)
        memory, ssm_state = advance(self.ssm, normed, state.memory, key_padding_mask)
        memory = self._memory(memory)
        q, k, v = self._project(memory, normed)
        o = self._streaming_attention("LongVQBlock.step").step(q, k, v, state.attention, key_padding_mask)
        y = self._finish(x, memory, normed, o, key_padding_mask)
        state.memory.copy_(ssm_state)  # last: a call that raises must leave the state as it was
        return y, state

    # The equations of the class, with X' = `normed`. Each part that `recompute` runs again is a separate method. Each
    # part computes Z from `memory`, the output of the SSM. `memory` is saved in any case, so Z itself needs no memory.

    def _memory(self, ssm_output: Tensor) -> Tensor:
        """The input of `_z`: SSM(X'). With dropout it is Z itself, so that all parts drop the same elements."""
        return self.dropout(silu(ssm_output)) if self._drops() else ssm_output

    def _z(self, memory: Tensor) -> Tensor:
        """Z, the structured memory."""
        return memory if self._drops() else silu(memory)

    def _drops(self) -> bool:
        return self.training and self.dropout.p > 0

    def _project(self, memory: Tensor, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Q and K (B, H, L, D), V (B, H, L, E)."""
        v = self._checkpoint(self._values, normed)
        q, k = self._checkpoint(self._queries_and_keys, memory)
        return split_heads(q, self.num_heads), split_heads(k, self.num_heads), split_heads(v, self.num_heads)

    def _queries_and_keys(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        z = self._z(memory)
        return self.q_proj(z), self.k_proj(z)

    def _values(self, normed: Tensor) -> Tensor:
        return silu(self.v_proj(normed))

    def _finish(self, x: Tensor, memory: Tensor, normed: Tensor, o: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        """The output of the block, given the attention's output O (B, H, L, E)."""
        y = self._checkpoint(self._gate, memory, merge_heads(o), normed, x)
        y = self._after_mixer(y, key_padding_mask)
        if self.ffn is not None:
            y = self._checkpoint(self._feed_forward, y, key_padding_mask)
        return zero_padding(y, key_padding_mask)

    def _gate(self, memory: Tensor, o: Tensor, normed: Tensor, x: Tensor) -> Tensor:
        """Y from O (B, L, d_value): both gates, the candidate and the residual connection."""
        gate_input = self._z(memory) if self.ssm_gate else normed
        gated = silu_product(self.attention_gate(gate_input), o)  # G_a ⊙ O
        u = self.dropout(silu(self.candidate_x(normed) + self.candidate_o(gated)))  # U
        return gated_residual(self.output_gate(gate_input), u, x, recompute=self.recompute)  # G_o ⊙ U + (1 − G_o) ⊙ X

    def _checkpoint(self, part: Callable[..., _T], *inputs: Tensor | None) -> _T:
        """Run a part of the block. With `recompute`, save only its inputs, which other operations save in any case."""
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(part, *inputs, use_reentrant=False)
        return part(*inputs)

    def _width_and_parameter(self) -> tuple[int, Tensor]:
        return self.d_model, self.q_proj.weight

    def _check_streams(self, name: str) -> None:
        self._streaming_attention(name)

    def _streaming_attention(self, name: str) -> CodebookAttention:
        """The attention, or NotImplementedError where the block can't stream."""
        step_checks.causal(name, self.causal)
        if not isinstance(self.attention, CodebookAttention):
            raise NotImplementedError(
                f"{name}: num_codes must be an int to stream, got None: attention without quantisation needs every "
                "past key, which no state of constant size holds"
            )
        return self.attention

    def check_state(self, name: str, x: Tensor, state: LongVQState) -> None:
        super().check_state(name, x, state)
        step_checks.rows(name, x, state.memory)

    def extra_repr(self) -> str:
        return arguments_repr(self, LongVQBlock, ssm=self.ssm_kind)


def _round_up(width: float, multiple: int) -> int:
    return max(1, -int(-width // multiple)) * multiple
