"""Useful arithmetic of attention over quantised keys, the bytes that it must move, and the limits of the machine.

Operations per head with L positions, S codes, a causal window of W keys, key size D and value size E. A multiply-add
counts as 2:

| part | operations |
|---|---|
| assignment | 2 L S D: the products of keys and codewords |
| forward, codes given | 2 L (S + W) (D + E): scores, then values, for each code and each key of the window |
| backward | 2 L (S + W) (3 D + 2 E): scores again, dS to dq, dS to dk; dout to dP, P to dv |

With D = E backward has five products where forward has two. Exponentials and the sums of values by code take time too,
but do not count as useful. The same holds for pairs of a block of queries and its near keys outside the window.
"""

from math import nan

import torch
from torch import Tensor

from longvq_layers.benchmarks.attention.problem import Form, Sizes
from longvq_layers.benchmarks.common.timing import Calls

Work = tuple[float, float]
"""Floating point operations and bytes, NaN for the one that is not counted."""

# Arrays of the size of q that must be read or written at least: k; q, v, out; q, v, out, dout, dq, dk, dv.
_ARRAYS = {"assignment": 1, "forward, codes given": 3, "backward": 7}
PARTS = {  # case -> its parts
    "assign": ("assignment",),
    "forward": ("assignment", "forward, codes given"),
    "forward + backward": ("assignment", "forward, codes given", "backward"),
}

_TILE = 256  # rows; the scores of one head for so many rows fit into an L2 cache
_TILES_PER_CALL = 4  # one tile alone is too short for the clock


def work(parts: tuple[str, ...], sizes: Sizes, form: Form, length: int) -> Work:
    """Operations and bytes (float32) of some parts together."""
    seen = sizes.num_codes + form.window
    operations = {
        "assignment": 2 * length * sizes.num_codes * sizes.head_dim,
        "forward, codes given": 2 * length * seen * 2 * sizes.head_dim,
        "backward": 2 * length * seen * 5 * sizes.head_dim,
    }
    array = 4 * sizes.num_heads * length * sizes.head_dim
    return sizes.num_heads * sum(operations[part] for part in parts), array * sum(_ARRAYS[part] for part in parts)


def peer_flops(case: str, sizes: Sizes, form: Form, length: int) -> float:
    """Operations of dense attention: two products of L² scores forward, five more backward; half of them if causal."""
    products = 2 if case == "forward" else 7
    dense = 2 * products * sizes.num_heads * length**2 * sizes.head_dim
    return dense / 2 if form.causal else dense


def step_work(sizes: Sizes) -> Work:
    """One decoded token: its code, then attention over codes and window. Codebook, sums and values are read."""
    seen = sizes.num_codes + sizes.window
    operations = 2 * sizes.num_codes * sizes.head_dim + 2 * seen * 2 * sizes.head_dim
    return sizes.num_heads * operations, 4 * sizes.num_heads * (sizes.num_codes + seen) * sizes.head_dim


def limits(sizes: Sizes, like: Tensor) -> Calls:
    """Calls that reach the limits of the machine: a large product, scores of tiles that fit the cache, a copy of q."""
    square = torch.randn(sizes.matmul, sizes.matmul)
    rows = torch.randn(sizes.num_heads, _TILE, sizes.head_dim)
    codebook = torch.randn(sizes.num_heads, sizes.head_dim, sizes.num_codes)
    scores = torch.empty(sizes.num_heads, _TILE, sizes.num_codes)
    copy = torch.empty_like(like)

    def tiles() -> None:
        for _ in range(_TILES_PER_CALL):
            torch.bmm(rows, codebook, out=scores)

    return {"matmul": lambda: square @ square, "tiles": tiles, "copy": lambda: copy.copy_(like)}


def work_of_limits(sizes: Sizes, like: Tensor) -> dict[str, Work]:
    """Operations and bytes of each call of `limits`."""
    tiles = 2 * _TILES_PER_CALL * sizes.num_heads * _TILE * sizes.head_dim * sizes.num_codes
    return {"matmul": (2 * sizes.matmul**3, nan), "tiles": (tiles, nan), "copy": (nan, 2 * like.nbytes)}
