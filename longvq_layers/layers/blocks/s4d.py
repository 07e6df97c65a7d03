"""A residual block around `S4DLayer`, for models of state space models alone."""

import torch
from torch import Tensor

from longvq_layers import _checks as check
from longvq_layers.layers.blocks.base import ResidualBlock, feed_forward_width
from longvq_layers.layers.common.factory import Factory
from longvq_layers.layers.common.padding import zero_padding
from longvq_layers.layers.parts.dropout import Dropout, make_dropout
from longvq_layers.layers.parts.norm import make_norm
from longvq_layers.layers.ssm.advance import advance
from longvq_layers.layers.ssm.s4d import S4DLayer
from longvq_layers.layers.streaming import step_checks
from longvq_layers.layers.streaming.layer import StreamingLayer
from longvq_layers.layers.streaming.states import S4DState


class S4DBlock(ResidualBlock, StreamingLayer[S4DState]):
    """Pre-norm residual block of an S4D layer and a feed-forward block.

        Y = X + dropout(S4D(norm₁(X))),   out = Y + FFN(norm₂(Y))

    Args:
        d_model: width of input and output.
        d_state: 2N, state of a channel, even, default 64.
        d_ff: hidden width of the feed-forward block, default 2 d_model; 0 = no feed-forward block.
        causal: only past and present, default False (bidirectional).
        dropout: probability of dropping an element, default 0.0.
        hidden_dropout: the same for the feed-forward block's hidden layer, default `dropout`.
        dropout_type: "element" (default), or "feature" for whole channels of a sequence.
        norm_type: "layer" (default), "rms", "scale" or "batch".
        ffn_activation: "silu" (default), "gelu" or "relu".
        glu: whether the feed-forward block is gated, default False.
        backend: of the SSM, default "auto".
        device, dtype: of the parameters; the SSM stays in float32 or float64.

    Raises:
        ValueError, TypeError: sizes out of range or unknown options; in `forward` a wrong shape, dtype or device.

    Example:
        >>> S4DBlock(16, causal=True)(torch.randn(2, 50, 16)).shape
        torch.Size([2, 50, 16])

    Gradients may pass through `step`, which returns a new state and leaves the given one as it is.

    Source: Gu et al. 2022 (arXiv 2206.11893).
    """

    state_class = S4DState
    mixer: S4DLayer
    dropout: Dropout

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        d_ff: int | None = None,
        causal: bool = False,
        dropout: float = 0.0,
        hidden_dropout: float | None = None,
        dropout_type: str = "element",
        norm_type: str = "layer",
        ffn_activation: str = "silu",
        glu: bool = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "S4DBlock"
        check.positive(name, d_model=d_model)
        check.flags(name, causal=causal)
        d_ff = feed_forward_width(name, d_ff, 2 * d_model)
        factory: Factory = {"device": device, "dtype": dtype}
        self.d_model, self.causal = d_model, causal
        self.norm_type, self.dropout_type, self.ffn_activation, self.glu = norm_type, dropout_type, ffn_activation, glu
        self.norm1 = make_norm(name, norm_type, d_model, **factory)
        self.mixer = S4DLayer(d_model, d_state=d_state, causal=causal, dropout=dropout, backend=backend, **factory)
        self.dropout = make_dropout(name, dropout_type, dropout)
        self._add_feed_forward(name, d_ff, dropout, hidden_dropout, factory)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """x (B, L, d_model) -> the same shape, 0 at masked positions; mask and `cu_seqlens` as in `S4DLayer`."""
        x = self._checked_input("S4DBlock", x, key_padding_mask, cu_seqlens)
        mixed = self.mixer(self._before_mixer(x, key_padding_mask), key_padding_mask, cu_seqlens=cu_seqlens)
        return self._finish(x, mixed, key_padding_mask)

    def initial_state(self, batch: int) -> S4DState:
        """The state of `batch` empty sequences, of constant size, for `step`; NotImplementedError unless causal."""
        self._check_streams("S4DBlock.initial_state")
        return S4DState(self.mixer.initial_state(batch))

    def _step(self, x: Tensor, state: S4DState, key_padding_mask: Tensor | None) -> tuple[Tensor, S4DState]:
        normed = self._before_mixer(x, key_padding_mask)
        mixed, memory = advance(self.mixer, normed, state.memory, key_padding_mask)
        return self._finish(x, mixed, key_padding_mask), S4DState(memory)

    def _finish(self, x: Tensor, mixed: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        y = self._after_mixer(x + self.dropout(mixed), key_padding_mask)
        return zero_padding(self._feed_forward(y, key_padding_mask), key_padding_mask)

    def _width_and_parameter(self) -> tuple[int, Tensor]:
        return self.d_model, self.mixer.out_proj.weight

    def _check_streams(self, name: str) -> None:
        step_checks.causal(name, self.causal)

    def _check_mode(self, name: str, x: Tensor) -> None:
        step_checks.eval_mode(name, self)  # gradients may pass: the state isn't modified

    def check_state(self, name: str, x: Tensor, state: S4DState) -> None:
        super().check_state(name, x, state)
        step_checks.rows(name, x, state.memory)

    def extra_repr(self) -> str:
        return f"{self.d_model}, causal={self.causal}"
