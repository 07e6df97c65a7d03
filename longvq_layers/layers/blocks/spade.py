"""The SPADE block: a state space model for the whole sequence beside attention for the window."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from longvq_layers import _checks as check
from longvq_layers.layers.attention.cross import CrossAttention
from longvq_layers.layers.attention.local import LocalAttention
from longvq_layers.layers.common import input_checks
from longvq_layers.layers.common.padding import zero_padding
from longvq_layers.layers.common.representation import call_repr
from longvq_layers.layers.parts.feed_forward import FeedForward, make_dropout
from longvq_layers.layers.parts.norm import make_norm
from longvq_layers.layers.ssm.advance import advance
from longvq_layers.layers.ssm.diagonal import DiagonalSSM
from longvq_layers.layers.streaming import step_checks
from longvq_layers.layers.streaming.states import SPADEState

COMBINE = ("concat", "add", "stack")


class SPADEBlock(nn.Module):
    """A state space model and sliding-window attention side by side, then a feed-forward block.

        Y_g = SSM(X'),   Y_l = LocalAttention(X')                see `DiagonalSSM` and `LocalAttention`
        combine="concat":  M = W_c [norm(Y_g) ; norm(Y_l)] + b_c
        combine="add":     M = w norm(Y_g) + (1 − w) norm(Y_l)   with one learned w = sigmoid(·), from ½
        combine="stack":   M = LocalAttention(SSM(X'))
        global_ssm=False:  M = LocalAttention(X')
        norm="pre":   X' = norm₁(X),  Y = X + M,  out = Y + FFN(norm₂(Y))
        norm="post":  X' = X,  Y = norm₁(X + M),  out = norm₂(Y + FFN(Y))

    In a model only the bottom block, or every n-th, has an SSM; it gives the blocks above, which see a window each,
    what lies beyond. As in the paper the SSM is bare: no activation and no linear layer follow it but W_c.

    With `cross_attention` the block is one of a decoder: between mixer and feed-forward block Y also attends to the
    encoder's output, ``Y ← Y + Cross(norm₃(Y), memory)``, or ``Y ← norm₃(Y + Cross(Y, memory))`` with post-norm.

    Args:
        d_model: width of input and output.
        num_heads: H, heads of local and cross-attention; d_model is a multiple.
        global_ssm: whether there is an SSM, default True (a bottom block).
        combine: "concat" (default), "add" or "stack"; without SSM nothing is to be combined.
        window: W of the local attention, in positions, default 64.
        d_state: 2N, state of an SSM channel, even, default 64.
        d_ff: hidden width of the feed-forward block, default 4 d_model.
        ffn_activation: "gelu" (default), "silu" or "relu".
        glu: whether the feed-forward block is gated, default False.
        causal: only past and present, default False (bidirectional).
        cross_attention: whether `forward` takes a memory to attend to, default False.
        norm: "pre" (default) or "post".
        norm_type: "layer" (default), "rms", "scale" or "batch", of all norms in the block.
        dropout: probability of dropping an element of M, of Cross and of the feed-forward block's output, default 0.0.
        hidden_dropout: the same for the hidden layer of the feed-forward block, default that of `dropout`.
        dropout_type: "element" (default), or "feature" for whole channels of a sequence.
        backend: of the SSM, default "auto".
        device, dtype: of the parameters; the SSM stays in float32 or float64.

    Raises:
        ValueError, TypeError: sizes out of range or unknown options; in `forward` a wrong shape, dtype or device.

    Example:
        >>> bottom = SPADEBlock(32, 4, window=8, d_state=16)
        >>> above = SPADEBlock(32, 4, window=8, global_ssm=False)
        >>> encoded = above(bottom(torch.randn(2, 100, 32)))
        >>> decoder = SPADEBlock(32, 4, window=8, d_state=16, causal=True, cross_attention=True)
        >>> decoder(torch.randn(2, 20, 32), memory=encoded).shape
        torch.Size([2, 20, 32])

    Source: SPADE (arXiv 2212.08136), section 3.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        global_ssm: bool = True,
        combine: str = "concat",
        window: int = 64,
        d_state: int = 64,
        d_ff: int | None = None,
        ffn_activation: str = "gelu",
        glu: bool = False,
        causal: bool = False,
        cross_attention: bool = False,
        norm: str = "pre",
        norm_type: str = "layer",
        dropout: float = 0.0,
        hidden_dropout: float | None = None,
        dropout_type: str = "element",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "SPADEBlock"
        check.positive(name, d_model=d_model, num_heads=num_heads, window=window, d_state=d_state)
        d_ff = 4 * d_model if d_ff is None else d_ff
        check.positive(name, d_ff=d_ff)
        check.divides(name, "num_heads", num_heads, "d_model", d_model)
        check.floating(name, dtype)
        check.flags(name, global_ssm=global_ssm, glu=glu, causal=causal, cross_attention=cross_attention)
        check.probability(name, "dropout", dropout)
        check.one_of(name, "combine", combine, COMBINE)
        check.one_of(name, "norm", norm, ("pre", "post"))
        self.d_model, self.num_heads, self.combine, self.d_state = d_model, num_heads, combine, d_state
        self.norm, self.norm_type, self.backend = norm, norm_type, backend
        factory = {"device": device, "dtype": dtype}

        def another_norm() -> nn.Module:
            return make_norm(name, norm_type, d_model, **factory)

        self.norm1, self.norm2 = another_norm(), another_norm()
        self.local = LocalAttention(d_model, num_heads, window=window, causal=causal, **factory)
        self.ssm = (
            DiagonalSSM(d_model, d_state=d_state, causal=causal, backend=backend, **factory) if global_ssm else None
        )
        if global_ssm and combine != "stack":
            self.norm_global, self.norm_local = another_norm(), another_norm()
        if global_ssm and combine == "concat":
            self.combine_proj = nn.Linear(2 * d_model, d_model, **factory)  # W_c and b_c
        if global_ssm and combine == "add":
            self.combine_logit = nn.Parameter(torch.zeros((), **factory))
        self.cross = CrossAttention(d_model, num_heads, **factory) if cross_attention else None
        self.norm3 = another_norm() if cross_attention else None
        self.dropout = make_dropout(name, dropout_type, dropout)
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

    def reset_parameters(self) -> None:
        """Let both mixers count the same with combine="add"; the parts have a `reset_parameters` of their own."""
        if self.ssm is not None and self.combine == "add":
            nn.init.zeros_(self.combine_logit)

    @property
    def causal(self) -> bool:
        """Whether a position sees only itself and the past."""
        return self.local.causal

    def forward(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None = None,
        *,
        memory: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Run the block.

        Args:
            x: (B, L, d_model), dtype of the layer.
            key_padding_mask: (B, L) bool, True = ignore.
            memory: (B, M, d_model), the encoder's output, in a block with `cross_attention`; with `cu_seqlens`
                (N, M, d_model), one row for each document.
            memory_key_padding_mask: (B, M) or (N, M) bool, True = ignore. Default none.
            cu_seqlens: (N+1,) int32, offsets of N documents in one row (B = 1) that don't see each other, see
                `ops.vq_attention`. Default none.

        Returns:
            (B, L, d_model), exactly 0 at masked positions.
        """
        name = "SPADEBlock"
        input_checks.sequence(name, "x", x, self.d_model, self.local.q_proj.weight, key_padding_mask)
        input_checks.packed(name, "x", x, cu_seqlens)
        self._check_memory(name, memory, memory_key_padding_mask)

        def cross(y: Tensor) -> Tensor:
            options = {"key_padding_mask": key_padding_mask, "cu_seqlens": cu_seqlens}
            return self.cross(y, memory, memory_key_padding_mask, **options)

        return self._run(
            x,
            key_padding_mask,
            lambda u: self.ssm(u, key_padding_mask, cu_seqlens=cu_seqlens),
            lambda u: self.local(u, key_padding_mask, cu_seqlens=cu_seqlens),
            cross,
        )

    def initial_state(
        self, batch: int, memory: Tensor | None = None, memory_key_padding_mask: Tensor | None = None
    ) -> SPADEState:
        """The state of `batch` empty sequences, for `step`; causal only (NotImplementedError otherwise).

        Args:
            batch: B ≥ 0.
            memory: (B, M, d_model), the encoder's output, in a block with `cross_attention`; projected here, once.
            memory_key_padding_mask: (B, M) bool, True = ignore. Default none.
        """
        name = "SPADEBlock.initial_state"
        step_checks.causal(name, self.causal)
        step_checks.batch(name, batch)
        self._check_memory(name, memory, memory_key_padding_mask)
        ssm = None if self.ssm is None else self.ssm.initial_state(batch, self.local.q_proj.weight.dtype)
        state = SPADEState(self.local.initial_state(batch), ssm)
        if self.cross is not None:
            projected = self.cross.project_memory(name, memory, memory_key_padding_mask, batch)
            state.memory_keys, state.memory_values = projected
            state.memory_key_padding_mask = memory_key_padding_mask
        return state

    def step(self, x: Tensor, state: SPADEState, key_padding_mask: Tensor | None = None) -> tuple[Tensor, SPADEState]:
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
            NotImplementedError: a bidirectional block, or gradients: call it under `torch.no_grad()`.
            RuntimeError: in training mode.
        """
        name = "SPADEBlock.step"
        if isinstance(x, Tensor) and x.dim() == 2:
            y, state = self.step(x.unsqueeze(1), state, step_checks.mask_of_token(name, key_padding_mask))
            return y.squeeze(1), state
        step_checks.causal(name, self.causal)
        input_checks.sequence(name, "x", x, self.d_model, self.local.q_proj.weight, key_padding_mask)
        step_checks.inference(name, self, x)
        step_checks.state_type(name, state, SPADEState)
        self._check_state(name, x, state)

        def ssm(u: Tensor) -> Tensor:
            y, state.ssm = advance(self.ssm, u, state.ssm, key_padding_mask)
            return y

        def cross(y: Tensor) -> Tensor:
            mask = state.memory_key_padding_mask
            allowed = None if mask is None else ~mask[:, None, None]
            return self.cross.attend(y, state.memory_keys, state.memory_values, allowed)

        return self._run(
            x, key_padding_mask, ssm, lambda u: self.local.step(u, state.local, key_padding_mask)[0], cross
        ), state

    def _run(
        self,
        x: Tensor,
        mask: Tensor | None,
        ssm: Callable[[Tensor], Tensor],
        local: Callable[[Tensor], Tensor],
        cross: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """The block, whatever its parts need to know besides their input (B, L, d_model)."""
        # Nobody has to fill padding with numbers: NaN there would reach the gradients of the projections as 0 · NaN.
        x = zero_padding(x, mask)
        if self.norm == "pre":
            y = x + self.dropout(self._mix(self.norm1(x, mask), mask, ssm, local))
            if self.cross is not None:
                y = y + self.dropout(cross(self.norm3(y, mask)))
            y = y + self.ffn(self.norm2(y, mask))
        else:
            y = self.norm1(x + self.dropout(self._mix(x, mask, ssm, local)), mask)
            if self.cross is not None:
                y = self.norm3(y + self.dropout(cross(y)), mask)
            y = self.norm2(y + self.ffn(y), mask)
        return zero_padding(y, mask)

    def _mix(
        self, x: Tensor, mask: Tensor | None, ssm: Callable[[Tensor], Tensor], local: Callable[[Tensor], Tensor]
    ) -> Tensor:
        if self.ssm is None:
            return local(x)
        if self.combine == "stack":
            return local(ssm(x))
        beyond, near = self.norm_global(ssm(x), mask), self.norm_local(local(x), mask)
        if self.combine == "concat":
            return self.combine_proj(torch.cat([beyond, near], dim=-1))
        share = self.combine_logit.sigmoid()
        return share * beyond + (1 - share) * near

    def _check_memory(self, name: str, memory: object, mask: object) -> None:
        if self.cross is None and not (memory is None and mask is None):
            given = "memory" if memory is not None else "memory_key_padding_mask"
            raise ValueError(
                f"{name}: {given} must be None in a block without cross-attention; make it with cross_attention=True"
            )
        if self.cross is not None and memory is None:
            raise ValueError(f"{name}: memory must be given, the encoder's output (B, M, d_model), got None")

    def _check_state(self, name: str, x: Tensor, state: SPADEState) -> None:
        for part, here, there in (("an SSM", self.ssm, state.ssm), ("cross-attention", self.cross, state.memory_keys)):
            if (here is None) != (there is None):
                without = "without" if here is None else "with"
                raise ValueError(
                    f"{name}: state must be one of a block {without} {part}, from this block's initial_state"
                )
        self.local.check_state(name, x, state.local)
        if state.ssm is not None:
            check.size(name, "state.ssm", state.ssm, (x.shape[0], self.d_model, self.d_state // 2), "B d_model N")
        if state.memory_keys is not None:
            head_dim = self.d_model // self.num_heads
            expected = (x.shape[0], self.num_heads, state.memory_keys.shape[2], head_dim)
            check.size(name, "state.memory_keys", state.memory_keys, expected, "B H M D")

    def extra_repr(self) -> str:
        return call_repr(
            (self.d_model, self.num_heads),
            global_ssm=self.ssm is not None,
            combine=self.combine,
            window=self.local.window,
            d_state=self.d_state,
            d_ff=self.ffn.d_ff,
            ffn_activation=self.ffn.activation,
            glu=self.ffn.glu,
            causal=self.causal,
            cross_attention=self.cross is not None,
            norm=self.norm,
            norm_type=self.norm_type,
            dropout=self.dropout.p,
            hidden_dropout=self.ffn.hidden_dropout.p,
            dropout_type=self.ffn.dropout_type,
            backend=self.backend,
        )
