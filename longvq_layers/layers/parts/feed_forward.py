"""The feed-forward block that follows a mixer."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from longvq_layers import _checks as check
from longvq_layers.layers.common.representation import arguments_repr
from longvq_layers.layers.parts.dropout import Dropout, make_dropout
from longvq_layers.layers.parts.pointwise import silu_product

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "relu": nn.functional.relu,
}


class FeedForward(nn.Module):
    """Two linear layers with an activation between them, and with `glu` a gate.

        glu=False:  dropout(hidden_dropout(act(x W₁ + b₁)) W₂ + b₂)
        glu=True:   dropout(hidden_dropout(act(x W₁ + b₁) ⊙ (x W₃ + b₃)) W₂ + b₂)

    Args:
        d_model: width of input and output.
        d_ff: hidden width.
        activation: "silu" (default), "gelu" or "relu".
        glu: whether the hidden layer is gated, default False.
        dropout: probability of dropping an output, default 0.0.
        hidden_dropout: probability of dropping a hidden element, default `dropout`.
        dropout_type: "element" (default), or "feature" for whole channels of a sequence.
        device, dtype: of the parameters.

    Raises:
        ValueError, TypeError: sizes out of range or unknown options.

    Example:
        >>> FeedForward(8, 32, glu=True)(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])

    Source: Vaswani et al. 2017, section 3.3; Shazeer 2020 (arXiv 2002.05202) for the gate.
    """

    up: nn.Linear
    down: nn.Linear
    hidden_dropout: Dropout
    dropout: Dropout

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        *,
        activation: str = "silu",
        glu: bool = False,
        dropout: float = 0.0,
        hidden_dropout: float | None = None,
        dropout_type: str = "element",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "FeedForward"
        check.positive(name, d_model=d_model, d_ff=d_ff)
        check.flags(name, glu=glu)
        hidden_dropout = dropout if hidden_dropout is None else hidden_dropout
        check.probability(name, "dropout", dropout)
        check.probability(name, "hidden_dropout", hidden_dropout)
        check.one_of(name, "activation", activation, tuple(ACTIVATIONS))
        self.d_model, self.d_ff, self.activation, self.glu = d_model, d_ff, activation, glu
        self.dropout_type = dropout_type
        self.up = nn.Linear(d_model, 2 * d_ff if glu else d_ff, device=device, dtype=dtype)  # W₁, then W₃
        self.down = nn.Linear(d_ff, d_model, device=device, dtype=dtype)
        self.hidden_dropout = make_dropout(name, dropout_type, hidden_dropout)
        self.dropout = make_dropout(name, dropout_type, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_model) -> (..., d_model); with "feature" dropout in training mode (B, L, d_model)."""
        hidden = self.up(x)
        act = ACTIVATIONS[self.activation]
        if self.glu:
            hidden, gate = hidden.chunk(2, dim=-1)
            hidden = silu_product(hidden, gate) if self.activation == "silu" else act(hidden) * gate
        else:
            hidden = act(hidden)
        return self.dropout(self.down(self.hidden_dropout(hidden)))

    def extra_repr(self) -> str:
        return arguments_repr(self, FeedForward)
