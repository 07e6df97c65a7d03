"""Useful arithmetic of attention over quantised keys, and the bytes that have to be moved.

Per head, with L positions, S codes, a causal window of W keys, key width D and value width E; a multiply-add is 2:

| part | operations |
|---|---|
| assignment | 2 L S D: the products of keys and codewords |
| forward, codes given | 2 L (S + W) (D + E): scores, then values, for each code and each key of the window |
| backward | 2 L (S + W) (3 D + 2 E): scores again, dS to dq, dS to dk; dout to dP, P to dv |

With D = E backward has five products where forward has two. Not counted, though it takes time: exponentials, the sums
of values by code, keys of a block of the window that a query does not see.
"""

from longvq_layers.benchmarks.attention_cases import Form, Sizes

# Arrays of the size of q that have to be read or written at least: k; q, v, out; q, v, out, dout, dq, dk, dv.
_ARRAYS = {"assignment": 1, "forward, codes given": 3, "backward": 7}
PARTS = {
    "assign": ("assignment",),
    "forward": ("assignment", "forward, codes given"),
    "forward + backward": ("assignment", "forward, codes given", "backward"),
}


def work(parts: tuple[str, ...], sizes: Sizes, form: Form, length: int) -> tuple[float, float]:
    """Operations and bytes (float32) of some parts together."""
    seen = sizes.codes + form.window
    operations = {
        "assignment": 2 * length * sizes.codes * sizes.width,
        "forward, codes given": 2 * length * seen * 2 * sizes.width,
        "backward": 2 * length * seen * 5 * sizes.width,
    }
    array = 4 * sizes.heads * length * sizes.width
    return sizes.heads * sum(operations[part] for part in parts), array * sum(_ARRAYS[part] for part in parts)


def peer_flops(case: str, sizes: Sizes, form: Form, length: int) -> float:
    """Of the dense form: two products of L² scores forward, five more backward; half of it if causal."""
    products = 2 if case == "forward" else 7
    dense = 2 * products * sizes.heads * length**2 * sizes.width
    return dense / 2 if form.causal else dense


def step_work(sizes: Sizes) -> tuple[float, float]:
    """One decoded token: its code, then attention over codes and window. Codebook, sums and values are read."""
    seen = sizes.codes + sizes.window
    operations = 2 * sizes.codes * sizes.width + 2 * seen * 2 * sizes.width
    return sizes.heads * operations, 4 * sizes.heads * (sizes.codes + seen) * sizes.width
