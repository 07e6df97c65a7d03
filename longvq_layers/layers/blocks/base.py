"""The base class of blocks: norms around a mixer of positions, then a feed-forward block."""

from torch import Tensor

from longvq_layers import _checks as check
from longvq_layers.layers.common.factory import Factory
from longvq_layers.layers.common.sequence_layer import SequenceLayer
from longvq_layers.layers.parts.feed_forward import FeedForward
from longvq_layers.layers.parts.norm import Norm, make_norm

NORM_PLACES = ("pre", "post")


def feed_forward_width(name: str, d_ff: int | None, default: int) -> int:
    """The hidden width of the feed-forward block. The argument `d_ff` may be None (`default`) or 0 (no such block)."""
    if d_ff is None:
        return default
    check.integer(name, "d_ff", d_ff, 0)
    return d_ff


class ResidualBlock(SequenceLayer):
    """A block whose parts have residual connections, with norms before or after them.

        norm="pre":   X' = norm₁(X),  Y = mixer(X'; X),         out = Y + FFN(norm₂(Y))
        norm="post":  X' = X,         Y = norm₁(mixer(X'; X)),  out = norm₂(Y + FFN(Y))

    The mixer includes its own residual connection to X. Subclasses compute it in `forward` and `_step`.
    """

    d_model: int
    norm: str = "pre"
    norm_type: str
    ffn_activation: str
    glu: bool
    dropout_type: str
    norm1: Norm
    norm2: Norm | None
    ffn: FeedForward | None

    def _add_feed_forward(
        self, name: str, d_ff: int, dropout: float, hidden_dropout: float | None, factory: Factory
    ) -> None:
        """Make norm₂ and the feed-forward block, or neither if d_ff is 0. `name` is the block in errors."""
        self.norm2 = self.ffn = None
        if d_ff:
            self.norm2 = make_norm(name, self.norm_type, self.d_model, **factory)
            self.ffn = self._make_feed_forward(d_ff, dropout, hidden_dropout, factory)

    def _make_feed_forward(
        self, d_ff: int, dropout: float, hidden_dropout: float | None, factory: Factory
    ) -> FeedForward:
        return FeedForward(
            self.d_model,
            d_ff,
            activation=self.ffn_activation,
            glu=self.glu,
            dropout=dropout,
            hidden_dropout=hidden_dropout,
            dropout_type=self.dropout_type,
            **factory,
        )

    def _before_mixer(self, x: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        """X' of X (B, L, d_model)."""
        return self.norm1(x, key_padding_mask) if self.norm == "pre" else x

    def _after_mixer(self, y: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        """Y of the mixer's output with its residual connection."""
        return self.norm1(y, key_padding_mask) if self.norm == "post" else y

    def _feed_forward(self, y: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        """The output of the block from Y."""
        if self.ffn is None or self.norm2 is None:
            return y
        if self.norm == "pre":
            return y + self.ffn(self.norm2(y, key_padding_mask))
        return self.norm2(y + self.ffn(y), key_padding_mask)
