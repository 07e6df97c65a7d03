"""Decoding: one token after 1,024, 16,384 and 131,072 others, against one query over a cache of keys and values."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from longvq_layers import ops
from longvq_layers.benchmarks.attention.problem import Sizes
from longvq_layers.benchmarks.common.timing import Calls

_TOKENS = 4096  # different tokens: enough to use all codes, as a text does
TOLERANCE = 1e-4  # relative to the largest value


class Decoder:
    """Decodes a stream of random tokens that repeats after `_TOKENS`."""

    def __init__(self, sizes: Sizes, backend: str) -> None:
        generator = torch.Generator().manual_seed(0)
        num_heads, head_dim = sizes.num_heads, sizes.head_dim
        self.text = torch.randn(3, 1, num_heads, _TOKENS, head_dim, generator=generator)  # q, k, v
        self.codebook = torch.randn(num_heads, sizes.num_codes, head_dim, generator=generator)
        self.window, self.head_dim, self.backend = sizes.window, head_dim, backend
        self.bias = torch.randn(num_heads, sizes.window, generator=generator)
        # Contiguous tensors, as a model makes them.
        self.tokens = [self.text[..., i : i + 1, :].clone().unbind() for i in range(_TOKENS)]

    def start(self, tokens: int) -> ops.VQAttentionState:
        """The state after so many tokens."""
        state = ops.vq_attention_state(1, self.codebook, window=self.window, value_dim=self.head_dim)
        for start in range(0, tokens, _TOKENS):
            q, k, v = self.text[..., : min(tokens - start, _TOKENS), :].unbind()
            self._attend(q, k, v, state)
        return state

    def step(self, state: ops.VQAttentionState, index: int) -> Tensor:
        """Decode the token at `index`; changes the state."""
        q, k, v = self.tokens[index % _TOKENS]
        return self._attend(q, k, v, state)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, state: ops.VQAttentionState) -> Tensor:
        return ops.vq_attention_step(q, k, v, self.codebook, state, bias=self.bias, backend=self.backend)


def calls(sizes: Sizes, backend: str) -> tuple[Calls, int]:
    """Calls "after N", which decode `sizes.tokens` tokens, and "sdpa", which decodes one; the peer's cache in bytes."""
    decoder = Decoder(sizes, backend)
    check(decoder)

    def after(position: int) -> Callable[[], object]:
        state = decoder.start(position)
        return lambda: [decoder.step(state, index) for index in range(sizes.tokens)]  # each call continues the last

    ours = {f"after {position}": after(position) for position in sizes.positions}
    cache = torch.randn(2, 1, sizes.num_heads, sizes.cache, sizes.head_dim)
    query = decoder.tokens[0][0]
    return {**ours, "sdpa": lambda: sdpa(query, *cache)}, cache.nbytes


def check(decoder: Decoder) -> None:
    """Raises AssertionError if decoding differs from attention over the whole sequence."""
    before, tokens = 2 * decoder.window, decoder.window + 2  # more than a window, before and after
    state = decoder.start(before)
    steps = torch.cat([decoder.step(state, before + index) for index in range(tokens)], dim=2)
    q, k, v = decoder.text[..., : before + tokens, :].unbind()
    whole = ops.vq_attention(
        q, k, v, decoder.codebook, causal=True, window=decoder.window, bias=decoder.bias, backend=decoder.backend
    )
    difference = float((steps - whole[:, :, before:]).abs().max() / whole.abs().max())
    if not difference <= TOLERANCE:  # also for NaN
        raise AssertionError(f"decoding differs from attention over the sequence by {difference:.2g}; it is not timed")
