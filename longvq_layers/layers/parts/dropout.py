"""Dropout of single elements or of whole channels."""

from torch import Tensor, nn

from longvq_layers import _checks as check


class FeatureDropout(nn.Module):
    """Drops whole channels of a sequence: the same channels of x (B, L, d) become 0 at all L positions.

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


Dropout = nn.Dropout | FeatureDropout
DROPOUTS: dict[str, type[Dropout]] = {"element": nn.Dropout, "feature": FeatureDropout}


def make_dropout(name: str, kind: str, p: float) -> Dropout:
    """The dropout named `kind`, "element" or "feature", for (B, L, d); `name` is the layer in errors."""
    check.one_of(name, "dropout_type", kind, tuple(DROPOUTS))
    return DROPOUTS[kind](p)
