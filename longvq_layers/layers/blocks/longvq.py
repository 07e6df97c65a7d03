"""The LongVQ block: structured memory from a state space model guides attention over quantised keys."""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longvq_layers import _checks as check
from longvq_layers.layers.attention.codebook_attention import CodebookAttention
from longvq_layers.layers.attention.dense import DenseAttention
from longvq_layers.layers.common import input_checks
from longvq_layers.layers.common.padding import zero_padding
from longvq_layers.layers.common.representation import call_repr
from longvq_layers.layers.parts.feed_forward import ACTIVATIONS, FeedForward, make_dropout
from longvq_layers.layers.parts.norm import make_norm
from longvq_layers.layers.parts.pointwise import gated_residual, silu_product
from longvq_layers.layers.ssm.advance import advance
from longvq_layers.layers.ssm.diagonal import DiagonalSSM
from longvq_layers.layers.ssm.ema import DampedEMA
from longvq_layers.layers.streaming import step_checks
from longvq_layers.layers.streaming.states import LongVQState


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

    The codebook learns in training mode; add `commitment_loss(model)` to the loss and make the optimiser with
    `optimizer_groups`.

    Args:
        d_model: width of input and output.
        num_heads: H, attention heads, default 1 as in the paper.
        num_codes: S, codes per head, default 256; None = no quantisation: softmax attention over all keys in quadratic
            time, see `DenseAttention`, to which local_keys, key_grad and commitment mean nothing.
        window: W, positions in which keys count one by one, default 64; 0 = none.
        window_bias: whether a bias is learned for each offset inside the window, default True.
        ssm: "s4d" (default), `DiagonalSSM`, or "ema", Mega's `DampedEMA`.
        d_state: 2N, state of an S4D channel, even, default 64.
        ema_dim: N, state of an EMA channel, default 16.
        ssm_gate: whether both gates are made from Z as above (default True), else from X'.
        d_attn: width of Q and K over all heads, a multiple of H; default d_model / 2 rounded up to one.
        d_value: width of V, G_a and O over all heads, a multiple of H; default d_model rounded up to one.
        d_ff: hidden width of the feed-forward block, default 2 d_model; 0 = no such block, and no norm₂.
        ffn_activation: "silu" (default), "gelu" or "relu", of the feed-forward block.
        glu: whether the feed-forward block is gated, see `FeedForward`, default False.
        causal: only past and present, default False (bidirectional).
        dropout: probability of dropping an element of Z, of U, and of the feed-forward block's output; default 0.0.
        hidden_dropout: the same for the feed-forward block's hidden layer, default that of `dropout`.
        dropout_type: "element" (default), or "feature" for whole channels of a sequence.
        activation: of the attention, "softmax" (default) or "laplace".
        norm: where, "pre" (default) or "post".
        norm_type: which, "layer" (default), "rms", "scale" or "batch", see `layers/parts/norm.py`.
        local_keys: "quantized" (default) or "exact", see `ops.vq_attention`.
        key_grad: "cluster" (default) or "window", see `ops.vq_attention`.
        commitment: β of the commitment loss, default 1e-4.
        codebook_decay: γ of the codebook's moving averages, default 0.99; see `Codebook`.
        recompute: whether training keeps only what SSM and attention read and write, and computes gates, projections
            of V and the feed-forward block again in the backward: half the memory for about 15% more time. Default
            False. Backward must run in the mode of forward (training), and not under `torch.func` transforms.
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
        d_ff = 2 * d_model if d_ff is None else d_ff
        hidden_dropout = dropout if hidden_dropout is None else hidden_dropout
        check.positive(name, d_attn=d_attn, d_value=d_value, d_state=d_state, ema_dim=ema_dim)
        check.divides(name, "num_heads", num_heads, "d_attn", d_attn)
        check.divides(name, "num_heads", num_heads, "d_value", d_value)
        check.floating(name, dtype)
        check.flags(name, window_bias=window_bias, ssm_gate=ssm_gate, glu=glu, causal=causal, recompute=recompute)
        check.probability(name, "dropout", dropout)
        check.probability(name, "hidden_dropout", hidden_dropout)
        check.one_of(name, "norm", norm, ("pre", "post"))
        check.one_of(name, "ssm", ssm, ("s4d", "ema"))
        check.one_of(name, "ffn_activation", ffn_activation, tuple(ACTIVATIONS))
        check.one_of(name, "activation", activation, ("softmax", "laplace"))
        check.one_of(name, "local_keys", local_keys, ("quantized", "exact"))
        check.one_of(name, "key_grad", key_grad, ("cluster", "window"))
        if num_codes is None and activation != "softmax":
            raise ValueError(f"{name}: activation must be 'softmax' with num_codes=None, got {activation!r}")
        if d_ff is False or d_ff != 0:  # False equals 0
            check.positive(name, d_ff=d_ff)
        self.d_model, self.num_heads, self.num_codes, self.causal = d_model, num_heads, num_codes, causal
        self.window, self.window_bias, self.activation = window, window_bias, activation
        self.d_state, self.ema_dim, self.ssm_gate = d_state, ema_dim, ssm_gate
        self.d_attn, self.d_value = d_attn, d_value
        self.d_ff, self.ffn_activation, self.glu = d_ff, ffn_activation, glu
        self.hidden_dropout, self.dropout_type = hidden_dropout, dropout_type
        self.norm, self.norm_type = norm, norm_type
        self.local_keys, self.key_grad, self.backend = local_keys, key_grad, backend
        self.commitment, self.codebook_decay, self.recompute = commitment, codebook_decay, recompute
        factory = {"device": device, "dtype": dtype}
        core = {"window": window, "causal": causal, "window_bias": window_bias, **factory}
        heads = (num_heads, num_heads, d_attn // num_heads)
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
        if num_codes is None:
            self.attention = DenseAttention(*heads, value_dim=d_value // num_heads, **core)
        else:
            self.attention = CodebookAttention(
                *heads,
                value_dim=d_value // num_heads,
                num_codes=num_codes,
                local_keys=local_keys,
                key_grad=key_grad,
                activation=activation,
                commitment=commitment,
                codebook_decay=codebook_decay,
                backend=backend,
                **core,
            )
        self.dropout = make_dropout(name, dropout_type, dropout)
        if d_ff:
            self.norm2 = make_norm(name, norm_type, d_model, **factory)
            self.ffn = FeedForward(
                d_model,
                d_ff,
                activation=ffn_activation,
                glu=glu,
                dropout=dropout,
                hidden_dropout=hidden_dropout,
                dropout_type=dropout_type,
                **factory,
            )
        else:
            self.norm2 = self.ffn = None

    @property
    def codebook(self) -> nn.Module | None:
        """The `Codebook` of the keys; None without quantisation."""
        return None if self.num_codes is None else self.attention.codebook

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
        input_checks.sequence("LongVQBlock", "x", x, self.d_model, self.q_proj.weight, key_padding_mask)
        input_checks.packed("LongVQBlock", "x", x, cu_seqlens)

        def remember(u: Tensor) -> Tensor:
            return self.ssm(u, key_padding_mask, cu_seqlens=cu_seqlens)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.attention(q, k, v, key_padding_mask, cu_seqlens=cu_seqlens)

        return self._run(x, key_padding_mask, remember, attend)

    def initial_state(self, batch: int) -> LongVQState:
        """The state of `batch` empty sequences, for `step`; what that refuses raises NotImplementedError here too."""
        self._check_streams("LongVQBlock.initial_state")
        memory = self.ssm.initial_state(batch, self.q_proj.weight.dtype)
        return LongVQState(memory, self.attention.initial_state(batch))

    def step(self, x: Tensor, state: LongVQState, key_padding_mask: Tensor | None = None) -> tuple[Tensor, LongVQState]:
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
            NotImplementedError: a bidirectional block, one with num_codes=None, or gradients: call it under
                `torch.no_grad()`.
            RuntimeError: in training mode, where the codebook moves.
        """
        name = "LongVQBlock.step"
        if isinstance(x, Tensor) and x.dim() == 2:
            y, state = self.step(x.unsqueeze(1), state, step_checks.mask_of_token(name, key_padding_mask))
            return y.squeeze(1), state
        self._check_streams(name)
        input_checks.sequence(name, "x", x, self.d_model, self.q_proj.weight, key_padding_mask)
        step_checks.inference(name, self, x)
        step_checks.state_type(name, state, LongVQState)
        step_checks.rows(name, x, state.memory)
        after = state.memory

        def remember(u: Tensor) -> Tensor:
            nonlocal after
            y, after = advance(self.ssm, u, state.memory, key_padding_mask)
            return y

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.attention.step(q, k, v, state.attention, key_padding_mask)

        y = self._run(x, key_padding_mask, remember, attend)
        state.memory.copy_(after)  # last: a call that raises because of its arguments leaves the state as it was
        return y, state

    def _run(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None,
        remember: Callable[[Tensor], Tensor],
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """The equations, given the SSM and the attention as functions: of whole sequences, or of the next piece."""
        # Nobody has to fill padding with numbers: NaN there would reach the gradients of the projections as 0 · NaN.
        x = zero_padding(x, key_padding_mask)
        if self.norm == "pre":
            y = self._gated_attention(x, self.norm1(x, key_padding_mask), remember, attend)
        else:
            y = self.norm1(self._gated_attention(x, x, remember, attend), key_padding_mask)
        if self.ffn is not None:
            y = self._keep_inputs(self._feed_forward, y, key_padding_mask)
        return zero_padding(y, key_padding_mask)

    def _gated_attention(self, x: Tensor, normed: Tensor, remember: Callable, attend: Callable) -> Tensor:
        silu = nn.functional.silu
        memory = remember(normed)
        if self.training and self.dropout.p > 0:  # all its readers must see the same elements dropped
            z, silu_z = self.dropout(silu(memory)), _same
        else:
            z, silu_z = memory, silu
        v = self._keep_inputs(lambda normed: silu(self.v_proj(normed)), normed)
        q, k = self._keep_inputs(self._queries_and_keys, z, silu_z)
        q, k, v = (rearrange(wide, "b l (h d) -> b h l d", h=self.num_heads) for wide in (q, k, v))
        out = rearrange(attend(q, k, v), "b h l d -> b l (h d)")
        return self._keep_inputs(self._gates, z, out, normed, x, silu_z)

    def _queries_and_keys(self, z: Tensor, silu_z: Callable) -> tuple[Tensor, Tensor]:
        z = silu_z(z)
        return self.q_proj(z), self.k_proj(z)

    def _gates(self, z: Tensor, out: Tensor, normed: Tensor, x: Tensor, silu_z: Callable) -> Tensor:
        of_gates = silu_z(z) if self.ssm_gate else normed
        gated = silu_product(self.attention_gate(of_gates), out)
        u = self.dropout(nn.functional.silu(self.candidate_x(normed) + self.candidate_o(gated)))
        return gated_residual(self.output_gate(of_gates), u, x, recompute=self.recompute)

    def _feed_forward(self, y: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        if self.norm == "pre":
            return y + self.ffn(self.norm2(y, key_padding_mask))
        return self.norm2(y + self.ffn(y), key_padding_mask)

    def _keep_inputs(self, part: Callable, *inputs: object) -> Tensor | tuple[Tensor, ...]:
        # Of a part of the block, with `recompute`, only the inputs: they are kept anyway, by what made or reads them.
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(part, *inputs, use_reentrant=False)
        return part(*inputs)

    def _check_streams(self, name: str) -> None:
        step_checks.causal(name, self.causal)
        if self.num_codes is None:
            raise NotImplementedError(
                f"{name}: attention without quantisation (num_codes=None) needs every past key, which no state of "
                "constant size holds; make the block with num_codes"
            )

    def extra_repr(self) -> str:
        return call_repr(
            (self.d_model,),
            num_heads=self.num_heads,
            num_codes=self.num_codes,
            window=self.window,
            window_bias=self.window_bias,
            ssm="ema" if isinstance(self.ssm, DampedEMA) else "s4d",
            d_state=self.d_state,
            ema_dim=self.ema_dim,
            ssm_gate=self.ssm_gate,
            d_attn=self.d_attn,
            d_value=self.d_value,
            d_ff=self.d_ff,
            ffn_activation=self.ffn_activation,
            glu=self.glu,
            causal=self.causal,
            dropout=self.dropout.p,
            hidden_dropout=self.hidden_dropout,
            dropout_type=self.dropout_type,
            activation=self.activation,
            norm=self.norm,
            norm_type=self.norm_type,
            local_keys=self.local_keys,
            key_grad=self.key_grad,
            commitment=self.commitment,
            codebook_decay=self.codebook_decay,
            recompute=self.recompute,
            backend=self.backend,
        )


def _same(x: Tensor) -> Tensor:
    return x


def _round_up(width: float, multiple: int) -> int:
    return max(1, -int(-width // multiple)) * multiple
