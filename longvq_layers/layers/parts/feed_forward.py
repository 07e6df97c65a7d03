"""The feed-forward block that follows a mixer, and the ways to drop."""

import torch
from torch import Tensor, nn

from longvq_layers import _checks as check
from longvq_layers.layers.common.representation import call_repr
from longvq_layers.layers.parts.pointwise import silu_product

ACTIVATIONS = {"silu": nn.functional.silu, "gelu": nn.functional.gelu, "relu": nn.functional.relu}


class FeatureDropout(nn.Module):
    """Drops whole channels of a sequence: x (B, L, d) loses the same channels at all L positions.

    Args:
        p: probability of dropping a channel, default 0.

    Source: Tompson et al. 2014 (arXiv 1411.4280); "feature dropout" in Mega (arXiv 2209.10655).
    """

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        return x * nn.functional.dropout(x.new_ones(x.shape[0], 1, x.shape[-1]), self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"


DROPOUTS = {"element": nn.Dropout, "feature": FeatureDropout}


def make_dropout(caller: str, kind: str, p: float) -> nn.Module:
    """Dropout of elements or of whole channels of (B, L, d)."""
    check.one_of(caller, "dropout_type", kind, tuple(DROPOUTS))
    return DROPOUTS[kind](p)


class FeedForward(nn.Module):
    """Two linear layers with an activation between them, the second one gated if asked.

        glu=False:  dropout(hidden_dropout(act(x W₁ + b₁)) W₂ + b₂)
        glu=True:   dropout(hidden_dropout(act(x W₁ + b₁) ⊙ (x W₃ + b₃)) W₂ + b₂)

    Args:
        d_model: width of input and output.
        d_ff: hidden width.
        activation: "silu" (default), "gelu" or "relu".
        glu: whether the hidden layer is gated, default False.
        dropout: probability of dropping an output, default 0.0.
        hidden_dropout: probability of dropping a hidden element, default that of `dropout`.
        dropout_type: "element" (default), or "feature" for whole channels of a sequence.
        device, dtype: of the parameters.

    Raises:
        ValueError, TypeError: sizes out of range or unknown options.

    Example:
        >>> FeedForward(8, 32, glu=True)(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])

    Source: Vaswani et al. 2017, section 3.3; Shazeer 2020 (arXiv 2002.05202) for the gate.
    """

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
        """x (..., d_model) -> (..., d_model); with "feature" dropout in training (B, L, d_model)."""
        hidden = self.up(x)
        act = ACTIVATIONS[self.activation]
        if self.glu:
            hidden, gate = hidden.chunk(2, dim=-1)
            hidden = silu_product(hidden, gate) if self.activation == "silu" else act(hidden) * gate
        else:
            hidden = act(hidden)
        return self.dropout(self.down(self.hidden_dropout(hidden)))

    def extra_repr(self) -> str:
        return call_repr(
            (self.d_model, self.d_ff),
            activation=self.activation,
            glu=self.glu,
            dropout=self.dropout.p,
            hidden_dropout=self.hidden_dropout.p,
            dropout_type=self.dropout_type,
        )
