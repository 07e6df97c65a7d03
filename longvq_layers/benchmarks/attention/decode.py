"""Decoding: one token after 1,024, 16,384 and 131,072 others, against one query over a cache of keys and values."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from longvq_layers import ops
from longvq_layers.benchmarks.attention_cases import Calls, Sizes

_TOKENS = 4096  # different ones: enough to use all codes, as a text does
TOLERANCE = 1e-4  # relative to the largest value


class Decoder:
    """Ours: a stream of random tokens, the same ones over and over."""

    def __init__(self, sizes: Sizes, backend: str):
        generator = torch.Generator().manual_seed(0)
        heads, width = sizes.heads, sizes.width
        self.text = torch.randn(3, 1, heads, _TOKENS, width, generator=generator)  # q, k, v
        self.codebook = torch.randn(heads, sizes.codes, width, generator=generator)
        self.window, self.width = sizes.window, width
        self.options = {"bias": torch.randn(heads, sizes.window, generator=generator), "backend": backend}
        # Tensors of their own, as a model has them.
        self.tokens = [self.text[..., i : i + 1, :].clone().unbind() for i in range(_TOKENS)]

    def start(self, tokens: int) -> object:
        """The state after some tokens."""
        state = ops.vq_attention_state(1, self.codebook, window=self.window, value_dim=self.width)
        for start in range(0, tokens, _TOKENS):
            piece = self.text[..., : min(tokens - start, _TOKENS), :].unbind()
            ops.vq_attention_step(*piece, self.codebook, state, **self.options)
        return state

    def step(self, state: object, index: int) -> Tensor:
        return ops.vq_attention_step(*self.tokens[index % _TOKENS], self.codebook, state, **self.options)


def calls(sizes: Sizes, backend: str) -> tuple[Calls, int]:
    """Calls "after N" of `sizes.tokens` tokens and "sdpa" of one; and the bytes of the peer's cache."""
    decoder = Decoder(sizes, backend)
    check(decoder)

    def after(position: int):
        state = decoder.start(position)
        return lambda: [decoder.step(state, index) for index in range(sizes.tokens)]  # goes on from call to call

    ours = {f"after {position}": after(position) for position in sizes.positions}
    cache = torch.randn(2, 1, sizes.heads, sizes.cache, sizes.width)
    query = decoder.tokens[0][0]
    return {**ours, "sdpa": lambda: sdpa(query, *cache)}, cache.nbytes


def check(decoder: Decoder) -> None:
    """Raises AssertionError if decoding differs from attention over the whole sequence."""
    before, tokens = 2 * decoder.window, decoder.window + 2  # more than the window, before and after
    state = decoder.start(before)
    steps = torch.cat([decoder.step(state, before + index) for index in range(tokens)], dim=2)
    text = decoder.text[..., : before + tokens, :].unbind()
    whole = ops.vq_attention(*text, decoder.codebook, causal=True, window=decoder.window, **decoder.options)
    difference = float((steps - whole[:, :, before:]).abs().max() / whole.abs().max())
    if not difference <= TOLERANCE:  # also for NaN
        raise AssertionError(f"decoding differs from attention over the sequence by {difference:.2g}; it is not timed")
