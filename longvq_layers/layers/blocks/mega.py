"""The Mega block: a damped moving average guides single-head gated attention, full or in chunks."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from longvq_layers import _checks as check
from longvq_layers.layers.attention.chunk_step import attention_step
from longvq_layers.layers.attention.gated import GatedAttention
from longvq_layers.layers.common import input_checks
from longvq_layers.layers.common.padding import zero_padding
from longvq_layers.layers.common.representation import call_repr
from longvq_layers.layers.parts.feed_forward import FeedForward, make_dropout
from longvq_layers.layers.parts.norm import make_norm
from longvq_layers.layers.published import mega as published_mega
from longvq_layers.layers.ssm.advance import advance
from longvq_layers.layers.ssm.ema import DampedEMA
from longvq_layers.layers.streaming import step_checks
from longvq_layers.layers.streaming.states import MegaState

_NORM_EPS = 1e-5  # of every norm type, as published


class MegaBlock(nn.Module):
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

    With `chunk` a token attends within its chunk only, in linear time; the moving average carries what is older. Chunks
    are counted from the first unmasked position of a row and from the start of a packed document.

    Args:
        d_model: width of input and output.
        d_attn: width of Z, Q and K, default d_model / 2 rounded up to an even number.
        d_value: width of V, R and O, default 2 d_model.
        d_ff: hidden width of the feed-forward block, default 2 d_model; 0 = no feed-forward block.
        ema_dim: moving averages per channel, default 16.
        chunk: length of a chunk, default None: attention over all positions.
        causal: only past and present, default False (bidirectional).
        activation: of the attention, "softmax" (default), "laplace" or "relu2".
        rel_pos_bias: "rotary" (default), which serves any length, or "simple", one number per offset.
        max_positions: longest sequence with the simple bias and no chunk, default 1024.
        norm: "pre" (default) or "post".
        norm_type: "layer" (default), "rms", "scale" or "batch".
        ffn_activation: "silu" (default), "gelu" or "relu".
        glu: whether the hidden layer of the feed-forward block is gated, default False.
        dropout: probability of dropping an element of M, of Ĥ and of the feed-forward block's output, default 0.0.
        attention_dropout: probability of dropping an attention weight, default 0.0.
        hidden_dropout: probability of dropping an element of V and of the feed-forward block's hidden layer, default
            that of `dropout`.
        dropout_type: "element" (default), or "feature" for whole channels of a sequence; not of attention weights.
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

    no_decay_parameters = ("gamma", "beta")  # for `optimizer_groups`: scales and shifts, no matrices

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
        d_ff = 2 * d_model if d_ff is None else d_ff
        check.positive(name, d_attn=d_attn, d_value=d_value, ema_dim=ema_dim)
        if d_ff != 0:
            check.positive(name, d_ff=d_ff)
        check.floating(name, dtype)
        check.flags(name, causal=causal, glu=glu)
        check.one_of(name, "norm", norm, ("pre", "post"))
        hidden_dropout = dropout if hidden_dropout is None else hidden_dropout
        for option, p in (("dropout", dropout), ("hidden_dropout", hidden_dropout)):
            check.probability(name, option, p)
        self.d_model, self.d_attn, self.d_value, self.d_ff = d_model, d_attn, d_value, int(d_ff)
        self.norm, self.norm_type, self.dropout_type = norm, norm_type, dropout_type
        self.ffn_activation, self.glu = ffn_activation, glu
        factory = {"device": device, "dtype": dtype}
        self.norm1 = _norm(norm_type, d_model, **factory)
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
        self.norm2 = _norm(norm_type, d_model, **factory) if d_ff else None
        self.ffn = None
        if d_ff:
            options = {"dropout": dropout, "hidden_dropout": hidden_dropout, "dropout_type": dropout_type}
            self.ffn = FeedForward(d_model, d_ff, activation=ffn_activation, glu=glu, **options, **factory)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the projections, gamma and beta anew; the other parts have a `reset_parameters` of their own."""
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
            key_padding_mask: (B, L) bool, True = ignore. Masked positions after the first unmasked one take their place
                in a chunk, and the moving average goes on decaying over them.
            cu_seqlens: (N+1,) int32, offsets of N documents in one row (B = 1) that don't see each other. Default none.

        Returns:
            (B, L, d_model), exactly 0 at masked positions.
        """
        input_checks.sequence("MegaBlock", "x", x, self.d_model, self.v_proj.weight, key_padding_mask)
        input_checks.packed("MegaBlock", "x", x, cu_seqlens)
        # Nobody has to fill padding with numbers: NaN there would reach the gradients of the projections as 0 · NaN.
        x = zero_padding(x, key_padding_mask)
        normed = self.norm1(x, key_padding_mask) if self.norm == "pre" else x
        m = self.ema(normed, key_padding_mask, cu_seqlens=cu_seqlens)
        q, k, v, gates = self._project(normed, m)
        out = self.attention(q, k, v, key_padding_mask, cu_seqlens=cu_seqlens)
        return self._finish(x, out, gates, key_padding_mask)

    def initial_state(self, batch: int) -> MegaState:
        """The state of `batch` empty sequences, for `step`; NotImplementedError unless causal with a chunk length."""
        self._check_streams("MegaBlock.initial_state")
        weight = self.v_proj.weight
        like = {"device": weight.device, "dtype": weight.dtype}
        return MegaState(
            ema=self.ema.initial_state(batch, weight.dtype),
            keys=torch.zeros(batch, self.attention.chunk, self.d_attn, **like),
            values=torch.zeros(batch, self.attention.chunk, self.d_value, **like),
            lengths=torch.zeros(batch, dtype=torch.int64, device=weight.device),
        )

    def step(self, x: Tensor, state: MegaState, key_padding_mask: Tensor | None = None) -> tuple[Tensor, MegaState]:
        """The next token or piece of a growing sequence, with a state of constant size. For inference only.

        Pieces of any length give together what `forward` gives for the whole in eval mode. Unlike there, a masked token
        takes no position: prompts of different lengths are padded, left or right, and each row goes on at its own
        length.

        Args:
            x: (B, d_model), one token, or (B, T, d_model), T ≥ 0 tokens; dtype of the layer.
            state: from `initial_state`; **updated in place**, `state.clone()` keeps it.
            key_padding_mask: (B,) or (B, T) bool, as x without its last axis, True = not part of the sequence.

        Returns:
            y like x, 0 at masked positions, and the same state.

        Raises:
            ValueError, TypeError: wrong shapes, dtypes or devices.
            NotImplementedError: a bidirectional block, one without chunks, or gradients: call it under
                `torch.no_grad()`.
            RuntimeError: in training mode, where dropout and batch norm differ from what `forward` gives later.
        """
        name = "MegaBlock.step"
        if isinstance(x, Tensor) and x.dim() == 2:
            y, state = self.step(x.unsqueeze(1), state, step_checks.mask_of_token(name, key_padding_mask))
            return y.squeeze(1), state
        self._check_streams(name)
        input_checks.sequence(name, "x", x, self.d_model, self.v_proj.weight, key_padding_mask)
        step_checks.inference(name, self, x)
        step_checks.state_type(name, state, MegaState)
        check.size(name, "state.keys", state.keys, (x.shape[0], self.attention.chunk, self.d_attn), "B chunk d_attn")
        check.same_device(name, "x", x, state=state.lengths)
        x = zero_padding(x, key_padding_mask)
        if not x.numel():
            return x, state
        normed = self.norm1(x, key_padding_mask) if self.norm == "pre" else x
        m, state.ema = advance(self.ema, normed, state.ema, key_padding_mask)
        q, k, v, gates = self._project(normed, m)
        out = attention_step(self.attention, q, k, v, state, key_padding_mask)
        return self._finish(x, out, gates, key_padding_mask), state

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
        """A block with the numbers of one layer of the public Mega code (`facebookresearch/mega`, a fairseq).

        Sizes, direction, the kind of norm and of bias follow from the tensors; what leaves no trace in them, `chunk`,
        `activation`, `norm` and `ffn_activation`, has to be told and must be what the model was trained with. That code
        takes (L, B, d_model), this one (B, L, d_model). There chunks are counted from the first column, padding or not,
        which differs from here for rows with padding on the left.

        Args:
            state_dict: under `prefix` the keys "mega_layer.…" and, unless the layer has no feed-forward block,
                "nffn.…": move.delta, move.alpha, move.beta, move.gamma, move.omega, v_proj, mx_proj, h_proj, gamma,
                beta, norm.norm.…, and rel_pos_bias.rel_pos_bias or rel_pos_bias.alpha and rel_pos_bias.beta; fc1, fc2
                and norm.norm.…. Not modified, nothing is shared.
            prefix: what stands before these keys, such as "encoder.layers.3.". Default none.
            chunk, activation, norm, ffn_activation: as in `MegaBlock`, of the trained layer.
            dropout, attention_dropout, hidden_dropout, dropout_type, backend: of the new block, as in `MegaBlock`.
            device, dtype: of the new block, default those of mega_layer.v_proj.weight.

        Returns:
            The block, in training mode.

        Raises:
            ValueError: missing or unknown keys under `prefix`, wrong shapes; names them.
            TypeError: a value that is no real floating-point tensor.

        Source: fairseq/modules/moving_average_gated_attention.py and normalized_feedforward_network.py there.
        """
        sizes, values = published_mega.read_published(state_dict, prefix, chunk)
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

    def _project(self, normed: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Q, K, V, and from the moving average update gate, reset gate and the candidate's part."""
        silu = nn.functional.silu
        wide = self.mx_proj(self.dropout(silu(m)))
        update, zr, candidate = wide.split([self.d_model, self.d_attn + self.d_value, self.d_model], dim=-1)
        z, reset = silu(zr).split([self.d_attn, self.d_value], dim=-1)
        q, k = (z * self.gamma[i] + self.beta[i] for i in range(2))
        v = self.hidden_dropout(silu(self.v_proj(normed)))
        return q, k, v, (update.sigmoid(), reset, candidate)

    def _finish(
        self, x: Tensor, out: Tensor, gates: tuple[Tensor, Tensor, Tensor], key_padding_mask: Tensor | None
    ) -> Tensor:
        update, reset, candidate = gates
        h = self.dropout(nn.functional.silu(candidate + self.h_proj(out * reset)))
        y = x + update * (h - x)
        if self.norm == "post":
            y = self.norm1(y, key_padding_mask)
        if self.ffn is not None and self.norm == "pre":
            y = y + self.ffn(self.norm2(y, key_padding_mask))
        elif self.ffn is not None:
            y = self.norm2(y + self.ffn(y), key_padding_mask)
        return zero_padding(y, key_padding_mask)

    def _check_streams(self, name: str) -> None:
        step_checks.causal(name, self.attention.causal)
        if self.attention.chunk is None:
            raise NotImplementedError(
                f"{name}: attention over all positions (chunk=None) needs every key of the past, which no state of "
                "constant size holds; make the block with a chunk length"
            )

    def extra_repr(self) -> str:
        core = self.attention
        return call_repr(
            (self.d_model,),
            d_attn=self.d_attn,
            d_value=self.d_value,
            d_ff=self.d_ff,
            ema_dim=self.ema.ndim,
            chunk=core.chunk,
            causal=core.causal,
            activation=core.activation,
            rel_pos_bias=core.rel_pos_bias,
            max_positions=core.max_positions,
            norm=self.norm,
            norm_type=self.norm_type,
            ffn_activation=self.ffn_activation,
            glu=self.glu,
            dropout=self.dropout.p,
            attention_dropout=core.dropout,
            hidden_dropout=self.hidden_dropout.p,
            dropout_type=self.dropout_type,
            backend=self.ema.backend,
        )


def _norm(kind: str, dim: int, **factory: object) -> nn.Module:
    norm = make_norm("MegaBlock", kind, dim, **factory)
    norm.eps = _NORM_EPS
    return norm
