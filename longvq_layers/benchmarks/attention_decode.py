"""Decoding: one token after 1,024, 16,384 and 131,072 others, against one query over a cache of keys and values."""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from longvq_layers import ops
from longvq_layers.benchmarks.attention_cases import Calls, Sizes

_TOKENS = 64  # different ones
_CHECKED_TOKENS = 40
TOLERANCE = 1e-4  # relative to the largest value


class Decoder:
    """Ours: a stream of random tokens."""

    def __init__(self, sizes: Sizes):
        generator = torch.Generator().manual_seed(0)
        heads, width = sizes.heads, sizes.width
        self.q, self.k, self.v = torch.randn(3, 1, heads, _TOKENS, width, generator=generator).unbind()
        self.codebook = torch.randn(heads, sizes.codes, width, generator=generator)
        self.bias = torch.randn(heads, sizes.window, generator=generator)
        self.window, self.width = sizes.window, width
        # One tensor per token, as a model would have them.
        self.tokens = [tuple(x[:, :, i : i + 1].clone() for x in (self.q, self.k, self.v)) for i in range(_TOKENS)]

    def start(self) -> object:
        return ops.vq_attention_state(1, self.codebook, window=self.window, value_dim=self.width)

    def decode(self, state: object, tokens: int) -> Iterator[Tensor]:
        for i in range(tokens):
            yield ops.vq_attention_step(*self.tokens[i % _TOKENS], self.codebook, state, bias=self.bias)

    def advance(self, state: object, tokens: int) -> None:
        for _ in self.decode(state, tokens):
            pass


def calls(sizes: Sizes) -> tuple[Calls, int]:
    """Calls "after N" of `sizes.tokens` tokens and "sdpa" of one; and the bytes of the peer's cache."""
    decoder = Decoder(sizes)
    check(decoder)
    found, state, done = {}, decoder.start(), 0
    for position in sizes.positions:
        decoder.advance(state, position - done)
        done, at_position = position, copy.deepcopy(state)
        found[f"after {position}"] = lambda state=at_position: decoder.advance(state, sizes.tokens)
    cache = torch.randn(2, 1, sizes.heads, sizes.cache, sizes.width)
    query = decoder.tokens[0][0]
    return {**found, "sdpa": lambda: sdpa(query, *cache)}, cache.nbytes


def check(decoder: Decoder) -> None:
    """Raises AssertionError if decoding differs from attention over the whole sequence."""
    steps = torch.cat(list(decoder.decode(decoder.start(), _CHECKED_TOKENS)), dim=2)
    whole = ops.vq_attention(
        *(x[:, :, :_CHECKED_TOKENS] for x in (decoder.q, decoder.k, decoder.v)),
        decoder.codebook,
        causal=True,
        window=decoder.window,
        bias=decoder.bias,
    )
    difference = float((steps - whole).abs().max() / whole.abs().max())
    if not difference <= TOLERANCE:  # also for NaN
        raise AssertionError(f"decoding differs from attention over the sequence by {difference:.2g}; it is not timed")
