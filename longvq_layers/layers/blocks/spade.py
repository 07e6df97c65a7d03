"""The SPADE block: a state space model for the whole sequence beside attention for the window."""

import torch
from torch import Tensor, nn

from longvq_layers import _checks as check
from longvq_layers.layers.attention.cross import CrossAttention
from longvq_layers.layers.attention.local import LocalAttention
from longvq_layers.layers.blocks.base import NORM_PLACES, ResidualBlock
from longvq_layers.layers.common.factory import Factory
from longvq_layers.layers.common.padding import zero_padding
from longvq_layers.layers.common.representation import arguments_repr
from longvq_layers.layers.parts.dropout import Dropout, make_dropout
from longvq_layers.layers.parts.feed_forward import FeedForward
from longvq_layers.layers.parts.norm import Norm, make_norm
from longvq_layers.layers.ssm.advance import advance
from longvq_layers.layers.ssm.diagonal import DiagonalSSM
from longvq_layers.layers.streaming import step_checks
from longvq_layers.layers.streaming.layer import StreamingLayer
from longvq_layers.layers.streaming.states import SPADEState

COMBINE = ("concat", "add", "stack")


class SPADEBlock(ResidualBlock, StreamingLayer[SPADEState]):
    """A state space model and sliding-window attention side by side, then a feed-forward block.

        Y_g = SSM(X'),   Y_l = LocalAttention(X')                see `DiagonalSSM` and `LocalAttention`
        combine="concat":  M = W_c [norm(Y_g) ; norm(Y_l)] + b_c
        combine="add":     M = w norm(Y_g) + (1 − w) norm(Y_l)   with one learned w = sigmoid(·), from ½
        combine="stack":   M = LocalAttention(SSM(X'))
        global_ssm=False:  M = LocalAttention(X')
        norm="pre":   X' = norm₁(X),  Y = X + M,  out = Y + FFN(norm₂(Y))
        norm="post":  X' = X,  Y = norm₁(X + M),  out = norm₂(Y + FFN(Y))

    In a model only the bottom block, or every n-th block, has an SSM. This SSM brings information from beyond the
    window to the blocks above, which have only local attention. As in the paper, no activation follows the SSM, and the
    only linear layer after it is W_c.

    With `cross_attention` the block belongs to a decoder. Between the mixers and the feed-forward block, Y then attends
    to the encoder's output: ``Y ← Y + Cross(norm₃(Y), memory)``, or ``Y ← norm₃(Y + Cross(Y, memory))`` with post-norm.

    Args:
        d_model: width of input and output.
        num_heads: H, heads of local and cross-attention; d_model is a multiple.
        global_ssm: whether there is an SSM, default True (a bottom block).
        combine: "concat" (default), "add" or "stack"; ignored in a block without SSM.
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
        hidden_dropout: the same for the hidden layer of the feed-forward block, default `dropout`.
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

    state_class = SPADEState
    norm2: Norm
    norm3: Norm | None
    norm_global: Norm
    norm_local: Norm
    local: LocalAttention
    ssm: DiagonalSSM | None
    combine_proj: nn.Linear
    combine_logit: nn.Parameter
    cross: CrossAttention | None
    dropout: Dropout
    ffn: FeedForward

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
        check.one_of(name, "norm", norm, NORM_PLACES)
        self.d_model, self.num_heads, self.combine, self.d_state = d_model, num_heads, combine, d_state
        self.norm, self.norm_type, self.backend = norm, norm_type, backend
        self.ffn_activation, self.glu, self.dropout_type = ffn_activation, glu, dropout_type
        factory: Factory = {"device": device, "dtype": dtype}

        def another_norm() -> Norm:
            return make_norm(name, norm_type, d_model, **factory)

        self.norm1, self.norm2 = another_norm(), another_norm()
        self.local = LocalAttention(d_model, num_heads, window=window, causal=causal, **factory)
        self.ssm = None
        if global_ssm:
            self.ssm = DiagonalSSM(d_model, d_state=d_state, causal=causal, backend=backend, **factory)
            if combine != "stack":
                self.norm_global, self.norm_local = another_norm(), another_norm()
            if combine == "concat":
                self.combine_proj = nn.Linear(2 * d_model, d_model, **factory)  # W_c and b_c
            if combine == "add":
                self.combine_logit = nn.Parameter(torch.zeros((), **factory))
        self.cross = CrossAttention(d_model, num_heads, **factory) if cross_attention else None
        self.norm3 = another_norm() if cross_attention else None
        self.dropout = make_dropout(name, dropout_type, dropout)
        self.ffn = self._make_feed_forward(d_ff, dropout, hidden_dropout, factory)

    def reset_parameters(self) -> None:
        """Give both mixers equal weight with combine="add". The parts have a `reset_parameters` of their own."""
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
        x = self._checked_input(name, x, key_padding_mask, cu_seqlens)
        self._check_memory(name, memory, memory_key_padding_mask)
        normed = self._before_mixer(x, key_padding_mask)
        beyond = None if self.ssm is None else self.ssm(normed, key_padding_mask, cu_seqlens=cu_seqlens)
        near = self.local(self._local_input(normed, beyond), key_padding_mask, cu_seqlens=cu_seqlens)
        y = self._add_mixers(x, beyond, near, key_padding_mask)
        if self.cross is not None:
            crossed = self.cross(
                self._cross_input(y, key_padding_mask),
                memory,
                memory_key_padding_mask,
                key_padding_mask=key_padding_mask,
                cu_seqlens=cu_seqlens,
            )
            y = self._add_cross(y, crossed, key_padding_mask)
        return zero_padding(self._feed_forward(y, key_padding_mask), key_padding_mask)

    def initial_state(
        self, batch: int, memory: Tensor | None = None, memory_key_padding_mask: Tensor | None = None
    ) -> SPADEState:
        """The state of `batch` empty sequences, for `step`; causal only (NotImplementedError otherwise).

        Args:
            batch: B ≥ 0.
            memory: (B, M, d_model), the encoder's output, in a block with `cross_attention`. It is projected here, once
                for all steps.
            memory_key_padding_mask: (B, M) bool, True = ignore. Default none.
        """
        name = "SPADEBlock.initial_state"
        self._check_streams(name)
        step_checks.batch(name, batch)
        self._check_memory(name, memory, memory_key_padding_mask)
        ssm = None if self.ssm is None else self.ssm.initial_state(batch, self.local.q_proj.weight.dtype)
        state = SPADEState(self.local.initial_state(batch), ssm)
        if self.cross is not None and memory is not None:
            keys, values = self.cross.project_memory(name, memory, memory_key_padding_mask, batch)
            state.memory_keys, state.memory_values = keys, values
            state.memory_key_padding_mask = memory_key_padding_mask
        return state

    def _step(self, x: Tensor, state: SPADEState, key_padding_mask: Tensor | None) -> tuple[Tensor, SPADEState]:
        normed = self._before_mixer(x, key_padding_mask)
        beyond = None
        if self.ssm is not None and state.ssm is not None:
            beyond, state.ssm = advance(self.ssm, normed, state.ssm, key_padding_mask)
        near, _ = self.local.step(self._local_input(normed, beyond), state.local, key_padding_mask)
        y = self._add_mixers(x, beyond, near, key_padding_mask)
        if self.cross is not None and state.memory_keys is not None and state.memory_values is not None:
            mask = state.memory_key_padding_mask
            allowed = None if mask is None else ~mask[:, None, None]
            query = self._cross_input(y, key_padding_mask)
            crossed = self.cross.attend(query, state.memory_keys, state.memory_values, allowed)
            y = self._add_cross(y, crossed, key_padding_mask)
        return zero_padding(self._feed_forward(y, key_padding_mask), key_padding_mask), state

    def _local_input(self, normed: Tensor, beyond: Tensor | None) -> Tensor:
        """The input of the local attention: SSM(X') with combine="stack", else X'."""
        return normed if beyond is None or self.combine != "stack" else beyond

    def _add_mixers(self, x: Tensor, beyond: Tensor | None, near: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        """Y from X, Y_g = `beyond` (None without SSM) and Y_l = `near`."""
        if beyond is None or self.combine == "stack":
            mixed = near
        else:
            beyond, near = self.norm_global(beyond, key_padding_mask), self.norm_local(near, key_padding_mask)
            if self.combine == "concat":
                mixed = self.combine_proj(torch.cat([beyond, near], dim=-1))
            else:
                share = self.combine_logit.sigmoid()
                mixed = share * beyond + (1 - share) * near
        return self._after_mixer(x + self.dropout(mixed), key_padding_mask)

    def _cross_input(self, y: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        return self.norm3(y, key_padding_mask) if self.norm == "pre" and self.norm3 is not None else y

    def _add_cross(self, y: Tensor, crossed: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        y = y + self.dropout(crossed)
        return self.norm3(y, key_padding_mask) if self.norm == "post" and self.norm3 is not None else y

    def _width_and_parameter(self) -> tuple[int, Tensor]:
        return self.d_model, self.local.q_proj.weight

    def _check_streams(self, name: str) -> None:
        step_checks.causal(name, self.causal)

    def _check_memory(self, name: str, memory: Tensor | None, mask: Tensor | None) -> None:
        if self.cross is None and not (memory is None and mask is None):
            given = "memory" if memory is not None else "memory_key_padding_mask"
            raise ValueError(
                f"{name}: {given} must be None in a block without cross-attention; make it with cross_attention=True"
            )
        if self.cross is not None and memory is None:
            raise ValueError(f"{name}: memory must be given, the encoder's output (B, M, d_model), got None")

    def check_state(self, name: str, x: Tensor, state: SPADEState) -> None:
        super().check_state(name, x, state)
        for part, here, there in (("an SSM", self.ssm, state.ssm), ("cross-attention", self.cross, state.memory_keys)):
            if (here is None) != (there is None):
                wanted, got = ("without", "with") if here is None else ("with", "without")
                raise ValueError(
                    f"{name}: state must be of a block {wanted} {part}, got one of a block {got} it; take it from this "
                    "block's initial_state"
                )
        self.local.check_state(name, x, state.local)
        if state.ssm is not None:
            check.size(name, "state.ssm", state.ssm, (x.shape[0], self.d_model, self.d_state // 2), "B d_model N")
        if state.memory_keys is not None:
            head_dim = self.d_model // self.num_heads
            expected = (x.shape[0], self.num_heads, state.memory_keys.shape[2], head_dim)
            check.size(name, "state.memory_keys", state.memory_keys, expected, "B H M D")

    def extra_repr(self) -> str:
        parts = {"global_ssm": self.ssm is not None, "cross_attention": self.cross is not None}
        return arguments_repr(self, SPADEBlock, self.local, self.ffn, **parts)
