"""The Mega block: a damped moving average gives the queries and keys of single-head gated attention."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from longvq_layers import _checks as check
from longvq_layers.layers.attention.chunk_step import step_in_chunks
from longvq_layers.layers.attention.gated import GatedAttention
from longvq_layers.layers.blocks.base import NORM_PLACES, ResidualBlock, feed_forward_width
from longvq_layers.layers.common.factory import Factory
from longvq_layers.layers.common.padding import zero_padding
from longvq_layers.layers.common.representation import arguments_repr
from longvq_layers.layers.parts.dropout import Dropout, make_dropout
from longvq_layers.layers.parts.norm import make_norm
from longvq_layers.layers.published.mega import read_published
from longvq_layers.layers.ssm.advance import advance
from longvq_layers.layers.ssm.ema import DampedEMA
from longvq_layers.layers.streaming import step_checks
from longvq_layers.layers.streaming.layer import StreamingLayer
from longvq_layers.layers.streaming.states import MegaState

_NORM_EPS = 1e-5  # for every kind of norm, as published


class _Gates(NamedTuple):
    """The terms that the moving average M gives apart from Z: update gate G, reset gate R, and M W_h + b_h."""

    update: Tensor
    reset: Tensor
    candidate: Tensor


class MegaBlock(ResidualBlock, StreamingLayer[MegaState]):
    """A moving average and gated attention, followed by a feed-forward block.

        M   = dropout(silu(EMA(X')))                                   see `DampedEMA`
        Z   = silu(M W_z + b_z),  Q = Z ⊙ gamma₀ + beta₀,  K = Z ⊙ gamma₁ + beta₁
        V   = hidden_dropout(silu(X' W_v + b_v))
        O   = Attention(Q, K, V)                                       see `GatedAttention`
        R   = silu(M W_r + b_r)                                        reset gate
        G   = sigmoid(M W_u + b_u)                                     update gate
        Ĥ   = dropout(silu(M W_h + (R ⊙ O) U_h + b_h))                 candidate
        Y   = G ⊙ Ĥ + (1 − G) ⊙ X                                      the gate is the residual connection
        norm="pre":   X' = norm₁(X),  out = Y + FFN(norm₂(Y))
        norm="post":  X' = X,  Y ← norm₁(Y),  out = norm₂(Y + FFN(Y))

    With `chunk` a token attends within its chunk only, in linear time. The moving average carries information across
    chunks. The first chunk starts at the first unmasked position of a row or of a packed document.

    Args:
        d_model: width of input and output.
        d_attn: width of Z, Q and K, default d_model / 2 rounded up to an even number.
        d_value: width of V, R and O, default 2 d_model.
        d_ff: hidden width of the feed-forward block, default 2 d_model; 0 = no feed-forward block.
        ema_dim: moving averages per channel, default 16.
        chunk: length of a chunk, default None: attention over all positions.
        causal: only past and present, default False (bidirectional).
        activation: of the attention, "softmax" (default), "laplace" or "relu2".
        rel_pos_bias: "rotary" (default), for any length, or "simple", one number per offset.
        max_positions: longest sequence with the simple bias and no chunk, default 1024.
        norm: "pre" (default) or "post".
        norm_type: "layer" (default), "rms", "scale" or "batch".
        ffn_activation: "silu" (default), "gelu" or "relu".
        glu: whether the hidden layer of the feed-forward block is gated, default False.
        dropout: probability of dropping an element of M, of Ĥ and of the feed-forward block's output, default 0.0.
        attention_dropout: probability of dropping an attention weight, default 0.0.
        hidden_dropout: probability of dropping an element of V and of the feed-forward block's hidden layer, default
            `dropout`.
        dropout_type: "element" (default), or "feature" for whole channels of a sequence. `attention_dropout` always
            drops single weights.
        backend: of the moving average, see `ops.ssm_scan`.
        device, dtype: of the parameters; the moving average stays in float32 or float64.

    Raises:
        ValueError, TypeError: sizes out of range or unknown options; in `forward` a wrong shape, dtype or device, or a
            sequence longer than `max_positions`.

    Example:
        >>> block = MegaBlock(32, chunk=16, causal=True).eval()
        >>> x = torch.randn(2, 100, 32)
        >>> with torch.no_grad():
        ...     state = block.initial_state(2)
        ...     prompt, state = block.step(x[:, :90], state)
        ...     token, state = block.step(x[:, 90], state)
        ...     whole = block(x)
        >>> torch.allclose(prompt, whole[:, :90], atol=1e-5), torch.allclose(token, whole[:, 90], atol=1e-5)
        (True, True)

    Source: Mega (arXiv 2209.10655), section 3; initial values as in its public code.
    """

    no_decay_parameters = ("gamma", "beta")  # for `optimizer_groups`: scales and shifts

    state_class = MegaState
    ema: DampedEMA
    v_proj: nn.Linear
    mx_proj: nn.Linear
    h_proj: nn.Linear
    gamma: nn.Parameter
    beta: nn.Parameter
    attention: GatedAttention
    dropout: Dropout
    hidden_dropout: Dropout

    def __init__(
        self,
        d_model: int,
        *,
        d_attn: int | None = None,
        d_value: int | None = None,
        d_ff: int | None = None,
        ema_dim: int = 16,
        chunk: int | None = None,
        causal: bool = False,
        activation: str = "softmax",
        rel_pos_bias: str = "rotary",
        max_positions: int = 1024,
        norm: str = "pre",
        norm_type: str = "layer",
        ffn_activation: str = "silu",
        glu: bool = False,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        hidden_dropout: float | None = None,
        dropout_type: str = "element",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "MegaBlock"
        check.positive(name, d_model=d_model)
        d_attn = -(-d_model // 4) * 2 if d_attn is None else d_attn
        d_value = 2 * d_model if d_value is None else d_value
        d_ff = feed_forward_width(name, d_ff, 2 * d_model)
        check.positive(name, d_attn=d_attn, d_value=d_value, ema_dim=ema_dim)
        check.floating(name, dtype)
        check.flags(name, causal=causal, glu=glu)
        check.one_of(name, "norm", norm, NORM_PLACES)
        hidden_dropout = dropout if hidden_dropout is None else hidden_dropout
        check.probability(name, "dropout", dropout)
        check.probability(name, "hidden_dropout", hidden_dropout)
        self.d_model, self.d_attn, self.d_value, self.d_ff = d_model, d_attn, d_value, d_ff
        self.norm, self.norm_type, self.dropout_type = norm, norm_type, dropout_type
        self.ffn_activation, self.glu = ffn_activation, glu
        factory: Factory = {"device": device, "dtype": dtype}
        self.norm1 = make_norm(name, norm_type, d_model, **factory)
        self.ema = DampedEMA(d_model, ndim=ema_dim, causal=causal, backend=backend, **factory)
        self.v_proj = nn.Linear(d_model, d_value, **factory)
        self.mx_proj = nn.Linear(d_model, 2 * d_model + d_attn + d_value, **factory)  # W_u, W_z, W_r, W_h
        self.h_proj = nn.Linear(d_value, d_model, **factory)  # U_h
        self.gamma = nn.Parameter(torch.empty(2, d_attn, **factory))
        self.beta = nn.Parameter(torch.empty(2, d_attn, **factory))
        self.attention = GatedAttention(
            d_attn,
            chunk=chunk,
            causal=causal,
            activation=activation,
            rel_pos_bias=rel_pos_bias,
            max_positions=max_positions,
            dropout=attention_dropout,
            **factory,
        )
        self.dropout = make_dropout(name, dropout_type, dropout)
        self.hidden_dropout = make_dropout(name, dropout_type, hidden_dropout)
        self._add_feed_forward(name, d_ff, dropout, hidden_dropout, factory)
        for each in (self.norm1, self.norm2):
            if each is not None:
                each.eps = _NORM_EPS
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new projections, gamma and beta. The other parts have a `reset_parameters` of their own."""
        linear = [self.v_proj, self.mx_proj, self.h_proj]
        if self.ffn is not None:
            linear += [self.ffn.up, self.ffn.down]
        for layer in linear:
            layer.weight.normal_(std=0.02)
            layer.bias.zero_()
        self.gamma.normal_(std=0.02)
        self.beta.zero_()

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """Run the block.

        Args:
            x: (B, L, d_model), dtype of the layer.
            key_padding_mask: (B, L) bool, True = ignore. Masked positions after the first unmasked one take a place in
                a chunk, and the moving average decays over them.
            cu_seqlens: (N+1,) int32, offsets of N documents in one row (B = 1) that don't see each other. Default none.

        Returns:
            (B, L, d_model), exactly 0 at masked positions.
        """
        x = self._checked_input("MegaBlock", x, key_padding_mask, cu_seqlens)
        normed = self._before_mixer(x, key_padding_mask)
        average = self.ema(normed, key_padding_mask, cu_seqlens=cu_seqlens)
        q, k, v, gates = self._project(normed, average)
        o = self.attention(q, k, v, key_padding_mask, cu_seqlens=cu_seqlens)
        return self._finish(x, o, gates, key_padding_mask)

    def initial_state(self, batch: int) -> MegaState:
        """The state of `batch` empty sequences, for `step`; NotImplementedError unless causal with a chunk length."""
        chunk = self._streaming_chunk("MegaBlock.initial_state")
        weight = self.v_proj.weight
        return MegaState(
            ema=self.ema.initial_state(batch, weight.dtype),
            keys=weight.new_zeros(batch, chunk, self.d_attn),
            values=weight.new_zeros(batch, chunk, self.d_value),
            lengths=torch.zeros(batch, dtype=torch.int64, device=weight.device),
        )

    def _step(self, x: Tensor, state: MegaState, key_padding_mask: Tensor | None) -> tuple[Tensor, MegaState]:
        if not x.numel():
            return x, state
        normed = self._before_mixer(x, key_padding_mask)
        average, state.ema = advance(self.ema, normed, state.ema, key_padding_mask)
        q, k, v, gates = self._project(normed, average)
        o = step_in_chunks(self.attention, q, k, v, state, key_padding_mask)
        return self._finish(x, o, gates, key_padding_mask), state

    @classmethod
    def from_published(
        cls,
        state_dict: Mapping[str, Tensor],
        prefix: str = "",
        *,
        chunk: int | None = None,
        activation: str = "softmax",
        norm: str = "pre",
        ffn_activation: str = "silu",
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        hidden_dropout: float | None = None,
        dropout_type: str = "element",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "MegaBlock":
        """A block with the numbers of one layer of the public Mega code (`facebookresearch/mega`, a fork of fairseq).

        Sizes, direction and the kinds of norm and bias follow from the tensors. `chunk`, `activation`, `norm` and
        `ffn_activation` do not: give the values that the model was trained with. The public code takes (L, B, d_model),
        this block (B, L, d_model). The public code starts the first chunk at the first column, even if this is padding.
        So outputs differ for rows with padding on the left.

        Args:
            state_dict: under `prefix` the keys "mega_layer.…" and, unless the layer has no feed-forward block,
                "nffn.…": move.delta, move.alpha, move.beta, move.gamma, move.omega, v_proj, mx_proj, h_proj, gamma,
                beta, norm.norm.…, and rel_pos_bias.rel_pos_bias or rel_pos_bias.alpha and rel_pos_bias.beta; fc1, fc2
                and norm.norm.…. Tensors are copied.
            prefix: text before these keys, such as "encoder.layers.3.". Default none.
            chunk, activation, norm, ffn_activation: as in `MegaBlock`, of the trained layer.
            dropout, attention_dropout, hidden_dropout, dropout_type, backend: of the new block, as in `MegaBlock`.
            device, dtype: of the new block, default those of mega_layer.v_proj.weight.

        Returns:
            The block, in training mode.

        Raises:
            ValueError: missing or unknown keys under `prefix`, or wrong shapes; names them.
            TypeError: a value that isn't a real floating-point tensor.

        Source: fairseq/modules/moving_average_gated_attention.py and normalized_feedforward_network.py of that code.
        """
        sizes, values = read_published(state_dict, prefix, chunk)
        weight = values["v_proj.weight"]
        block = cls(
            **sizes,
            chunk=chunk,
            activation=activation,
            norm=norm,
            ffn_activation=ffn_activation,
            dropout=dropout,
            attention_dropout=attention_dropout,
            hidden_dropout=hidden_dropout,
            dropout_type=dropout_type,
            backend=backend,
            device=weight.device if device is None else device,
            dtype=dtype or weight.dtype,
        )
        block.load_state_dict(values)
        return block

    def _project(self, normed: Tensor, average: Tensor) -> tuple[Tensor, Tensor, Tensor, _Gates]:
        """Q, K, V and the gates, from X' and the moving average EMA(X')."""
        m = self.dropout(silu(average))
        sizes = [self.d_model, self.d_attn + self.d_value, self.d_model]
        update, z_and_reset, candidate = torch.split(self.mx_proj(m), sizes, dim=-1)
        z, reset = torch.split(silu(z_and_reset), [self.d_attn, self.d_value], dim=-1)
        q, k = (z * self.gamma[i] + self.beta[i] for i in range(2))
        v = self.hidden_dropout(silu(self.v_proj(normed)))
        return q, k, v, _Gates(update.sigmoid(), reset, candidate)

    def _finish(self, x: Tensor, o: Tensor, gates: _Gates, key_padding_mask: Tensor | None) -> Tensor:
        """The output of the block, given the attention's output O."""
        h = self.dropout(silu(gates.candidate + self.h_proj(o * gates.reset)))
        y = self._after_mixer(x + gates.update * (h - x), key_padding_mask)
        return zero_padding(self._feed_forward(y, key_padding_mask), key_padding_mask)

    def _width_and_parameter(self) -> tuple[int, Tensor]:
        return self.d_model, self.v_proj.weight

    def _check_streams(self, name: str) -> None:
        self._streaming_chunk(name)

    def _streaming_chunk(self, name: str) -> int:
        """The length of a chunk, or NotImplementedError where the block can't stream."""
        step_checks.causal(name, self.attention.causal)
        if self.attention.chunk is None:
            raise NotImplementedError(
                f"{name}: chunk must be an int to stream, got None: attention over all positions needs every past key, "
                "which no state of constant size holds"
            )
        return self.attention.chunk

    def check_state(self, name: str, x: Tensor, state: MegaState) -> None:
        super().check_state(name, x, state)
        shape = (x.shape[0], self._streaming_chunk(name), self.d_attn)
        check.size(name, "state.keys", state.keys, shape, "B chunk d_attn")
        check.same_device(name, "x", x, state=state.lengths)

    def extra_repr(self) -> str:
        dims = {"ema_dim": self.ema.ndim, "attention_dropout": self.attention.dropout}
        return arguments_repr(self, MegaBlock, self.attention, self.ema, **dims)
