"""A residual block around `S4DLayer`: what a model of state space models alone is made of."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from longvq_layers import _checks as check
from longvq_layers.layers.common import input_checks
from longvq_layers.layers.common.padding import zero_padding
from longvq_layers.layers.parts.feed_forward import FeedForward, make_dropout
from longvq_layers.layers.parts.norm import make_norm
from longvq_layers.layers.ssm.advance import advance
from longvq_layers.layers.ssm.s4d import S4DLayer
from longvq_layers.layers.streaming import step_checks
from longvq_layers.layers.streaming.states import S4DState


class S4DBlock(nn.Module):
    """Pre-norm residual block of an S4D layer and a feed-forward block.

        Y = X + dropout(S4D(norm₁(X))),   out = Y + FFN(norm₂(Y))

    Args:
        d_model: width of input and output.
        d_state: 2N, state of a channel, even, default 64.
        d_ff: hidden width of the feed-forward block, default 2 d_model; 0 = none.
        causal: only past and present, default False (bidirectional).
        dropout: probability of dropping an element, default 0.0.
        hidden_dropout: of the feed-forward block's hidden layer, default that of `dropout`.
        dropout_type: "element" (default) or "feature", whole channels of a sequence.
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

    Source: Gu et al. 2022 (arXiv 2206.11893).
    """

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
        d_ff = 2 * d_model if d_ff is None else d_ff
        factory = {"device": device, "dtype": dtype}
        self.d_model, self.causal = d_model, causal
        self.norm1 = make_norm(name, norm_type, d_model, **factory)
        self.mixer = S4DLayer(d_model, d_state=d_state, causal=causal, dropout=dropout, backend=backend, **factory)
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

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """x (B, L, d_model) -> the same shape, 0 at masked positions; mask and `cu_seqlens` as in `S4DLayer`."""
        input_checks.sequence("S4DBlock", "x", x, self.d_model, self.mixer.out_proj.weight, key_padding_mask)

        def mix(u: Tensor) -> Tensor:
            return self.mixer(u, key_padding_mask, cu_seqlens=cu_seqlens)

        return self._run(x, key_padding_mask, mix)

    def initial_state(self, batch: int) -> S4DState:
        """The state of `batch` empty sequences, of constant size, for `step`; NotImplementedError unless causal."""
        step_checks.causal("S4DBlock.initial_state", self.causal)
        return S4DState(self.mixer.initial_state(batch))

    def step(self, x: Tensor, state: S4DState, key_padding_mask: Tensor | None = None) -> tuple[Tensor, S4DState]:
        """The next token or piece of a growing sequence, with a state of constant size. For inference only.

        Pieces of any length give together what `forward` gives for the whole in eval mode. Unlike there, a masked token
        takes no position: prompts of different lengths are padded, left or right, and each row goes on at its own
        length.

        Args:
            x: (B, d_model), one token, or (B, T, d_model), T ≥ 0 tokens; dtype of the layer.
            state: from `initial_state` or the step before; not modified.
            key_padding_mask: (B,) or (B, T) bool, as x without its last axis, True = not part of the sequence.

        Returns:
            y like x, 0 at masked positions, and the state to go on with.

        Raises:
            ValueError, TypeError: wrong shapes, dtypes or devices.
            NotImplementedError: a bidirectional block.
            RuntimeError: in training mode.
        """
        name = "S4DBlock.step"
        if isinstance(x, Tensor) and x.dim() == 2:
            y, state = self.step(x.unsqueeze(1), state, step_checks.mask_of_token(name, key_padding_mask))
            return y.squeeze(1), state
        step_checks.causal(name, self.causal)
        input_checks.sequence(name, "x", x, self.d_model, self.mixer.out_proj.weight, key_padding_mask)
        step_checks.eval_mode(name, self)  # gradients may pass: the state isn't modified
        if not isinstance(state, S4DState):
            raise TypeError(f"{name}: state must be an S4DState, from initial_state, got {type(state).__name__}")
        step_checks.rows(name, x, state.memory)
        after = state.memory

        def mix(u: Tensor) -> Tensor:
            nonlocal after
            y, after = advance(self.mixer, u, state.memory, key_padding_mask)
            return y

        return self._run(x, key_padding_mask, mix), S4DState(after)

    def _run(self, x: Tensor, key_padding_mask: Tensor | None, mix: Callable[[Tensor], Tensor]) -> Tensor:
        """The equations, given the S4D layer as a function: of whole sequences, or of the next piece."""
        x = zero_padding(x, key_padding_mask)
        y = x + self.dropout(mix(self.norm1(x, key_padding_mask)))
        if self.ffn is not None:
            y = y + self.ffn(self.norm2(y, key_padding_mask))
        return zero_padding(y, key_padding_mask)

    def extra_repr(self) -> str:
        return f"{self.d_model}, causal={self.causal}"
