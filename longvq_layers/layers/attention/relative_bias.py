"""Biases of attention scores that depend only on the offset between key and query."""

import math

import torch
from torch import Tensor, nn

from longvq_layers import _checks as check
from longvq_layers.layers.common.factory import Factory
from longvq_layers.layers.common.representation import arguments_repr


class RelativeBias(nn.Module):
    """``bias[i, j] = table[j − i]``. Subclasses give the table (2L − 1,), from offset −(L − 1) to L − 1."""

    def table(self, length: int) -> Tensor:
        """(2 · length − 1,) biases, `length` ≥ 1. The middle of a longer table is the table of a shorter length."""
        raise NotImplementedError

    def forward(self, length: int) -> Tensor:
        """(length, length), row = query, column = key."""
        return self.table(length).unfold(0, length, 1).flip(0)

    def rows(self, query: Tensor, length: int) -> Tensor:
        """(B, length): the row of `forward(length)` at each query position, query (B,) int64."""
        keys = torch.arange(length, device=query.device)
        return self.table(length)[length - 1 + keys - query.unsqueeze(-1)]


class SimpleRelativeBias(RelativeBias):
    """One learned number per offset.

    Args:
        max_positions: M, longest sequence; a longer one raises ValueError.
        device, dtype: of the table.

    Parameters:
        rel_pos_bias (2M − 1,), from key M − 1 positions before the query to M − 1 after it.

    Source: "simple" in the public code of Mega (arXiv 2209.10655); Raffel et al. 2020 without buckets.
    """

    rel_pos_bias: nn.Parameter

    def __init__(
        self, max_positions: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        check.positive("SimpleRelativeBias", max_positions=max_positions)
        self.max_positions = max_positions
        self.rel_pos_bias = nn.Parameter(torch.empty(2 * max_positions - 1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw a new table."""
        nn.init.normal_(self.rel_pos_bias, std=0.02)

    def table(self, length: int) -> Tensor:
        if length > self.max_positions:
            raise ValueError(
                f"SimpleRelativeBias: the length must be at most max_positions = {self.max_positions}, got {length}; "
                "make it with a larger max_positions, attend in chunks, or use a rotary bias"
            )
        return self.rel_pos_bias[self.max_positions - length : self.max_positions + length - 1]

    def extra_repr(self) -> str:
        return arguments_repr(self, SimpleRelativeBias)


class RotaryRelativeBias(RelativeBias):
    """Two learned vectors, the second rotated by the offset: ``table[o] = alpha · R(o) beta``.

    R(o) rotates elements n and n + dim/2 as a pair by the angle o · 10000^(−2n / dim). The result equals the published
    ``(R(i) alpha) · (R(j) beta)``, which depends only on j − i, and exists for any length.

    Args:
        dim: width of both vectors, even.
        device, dtype: of the vectors.

    Parameters:
        alpha, beta (1, dim).

    Source: "rotary" in the public code of Mega (arXiv 2209.10655); Su et al. 2021 (arXiv 2104.09864).
    """

    alpha: nn.Parameter
    beta: nn.Parameter
    no_decay_parameters = ("alpha", "beta")  # for `optimizer_groups`

    def __init__(self, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        check.positive("RotaryRelativeBias", dim=dim)
        if dim % 2:
            raise ValueError(f"RotaryRelativeBias: dim must be even (pairs are rotated), got {dim}")
        self.dim = dim
        self.alpha = nn.Parameter(torch.empty(1, dim, device=device, dtype=dtype))
        self.beta = nn.Parameter(torch.empty(1, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new vectors."""
        nn.init.normal_(self.alpha, std=0.02)
        nn.init.normal_(self.beta, std=0.02)

    def table(self, length: int) -> Tensor:
        wide = torch.promote_types(self.alpha.dtype, torch.float32)  # half types can't represent angles of far offsets
        like: Factory = {"device": self.alpha.device, "dtype": wide}
        half = self.dim // 2
        frequency = (torch.arange(half, **like) * (-math.log(10000) / half)).exp()
        angle = torch.arange(1 - length, length, **like).unsqueeze(-1) * frequency  # (2L − 1, dim / 2)
        a1, a2 = self.alpha.to(wide).chunk(2, dim=-1)
        b1, b2 = self.beta.to(wide).chunk(2, dim=-1)
        even, odd = a1 * b1 + a2 * b2, a2 * b1 - a1 * b2
        return (angle.cos() * even + angle.sin() * odd).sum(-1)

    def extra_repr(self) -> str:
        return arguments_repr(self, RotaryRelativeBias)


RELATIVE_BIASES = ("simple", "rotary")


def make_relative_bias(name: str, kind: str, dim: int, max_positions: int, factory: Factory) -> RelativeBias:
    """The bias named `kind`: "rotary" for queries of width `dim`, or "simple" for at most `max_positions` queries."""
    check.one_of(name, "rel_pos_bias", kind, RELATIVE_BIASES)
    if kind == "simple":
        return SimpleRelativeBias(max_positions, **factory)
    return RotaryRelativeBias(dim, **factory)
