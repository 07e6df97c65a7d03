"""Heads of multi-head attention: their projections, and how they are split and merged."""

from einops import rearrange
from torch import Tensor, nn

from longvq_layers import _checks as check
from longvq_layers.layers.common.factory import Factory


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, L, H·D) -> (B, H, L, D)."""
    return rearrange(x, "b l (h d) -> b h l d", h=num_heads)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, L, D) -> (B, L, H·D)."""
    return rearrange(x, "b h l d -> b l (h d)")


class HeadProjections(nn.Module):
    """A module with the four projections of multi-head attention."""

    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    out_proj: nn.Linear

    def _add_projections(
        self, name: str, embed_dim: int, num_heads: int, num_kv_heads: int, bias: bool, factory: Factory
    ) -> None:
        """Check the sizes in the name of the layer, keep them and make the projections."""
        check.positive(name, embed_dim=embed_dim, num_heads=num_heads, num_kv_heads=num_kv_heads)
        check.divides(name, "num_heads", num_heads, "embed_dim", embed_dim)
        check.divides(name, "num_kv_heads", num_kv_heads, "num_heads", num_heads)
        check.floating(name, factory["dtype"])
        check.flags(name, bias=bias)
        self.embed_dim, self.num_heads, self.num_kv_heads = embed_dim, num_heads, num_kv_heads
        self.head_dim = embed_dim // num_heads
        kv_dim = num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias, **factory)
        self.k_proj = nn.Linear(embed_dim, kv_dim, bias, **factory)
        self.v_proj = nn.Linear(embed_dim, kv_dim, bias, **factory)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias, **factory)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, L, D), keys and values (B, Hkv, L, D) of x (B, L, embed_dim)."""
        q = split_heads(self.q_proj(x), self.num_heads)
        k = split_heads(self.k_proj(x), self.num_kv_heads)
        v = split_heads(self.v_proj(x), self.num_kv_heads)
        return q, k, v

    def _project_output(self, out: Tensor) -> Tensor:
        """(B, H, L, D) -> (B, L, embed_dim)."""
        return self.out_proj(merge_heads(out))
