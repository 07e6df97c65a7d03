"""The context that a slot gets with each call of its module: positions, cache, and what a missing mask means."""

import threading
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from longvq_layers.replace.slot.state import SwappedState

FarQueryKey = tuple[Tensor, Tensor]  # queries and keys of the pairs outside the window


class StepAttention(Protocol):
    """Attention that continues sequences from a state of constant size."""

    def initial_state(self, batch: int, value_dim: int) -> SwappedState:
        """The state of `batch` empty sequences."""

    @property
    def step(self) -> Callable[..., Tensor]:
        """``step(q, k, v, state, key_padding_mask, far=, scale=)``: the output (B, H, T, E) of the next T tokens.

        `state` is updated in place.
        """


class CacheLayer(Protocol):
    """A layer of a cache that attends with a state of constant size."""

    positions: int  # read so far, padding included

    def close(self, positions: int) -> None:
        """Refuse later calls, after a bidirectional call over `positions` tokens."""

    @property
    def attend(self) -> Callable[..., Tensor]:
        """``attend(q, k, v, padding, mask, far=, scale=)``: the output (B, H, T, E) of the T new positions.

        `padding` is (B, positions + T) bool, True = ignore, or None; `mask` is the mask that it was read from.
        """


class KeyProbe:
    """Receives the keys of one call, in place of the attention."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None


class ForwardContext(NamedTuple):
    """What is known of one forward of an attention module beyond the arguments of its attention function.

    Attributes:
        rotation: (cos, sin) that the module rotates its queries and keys with, or None.
        cache_layer: the cache layer to attend with, or None.
        eager: True if the original is transformers' eager attention, which sees the future in a call without a mask.
        skips_masks: True if transformers makes no mask for the original where the mask would be purely causal. Then
            `is_causal` of the module decides. The implementation "longvq" gets a mask in these calls too.
        cache_was_used: True after an attention within this forward has filled the cache layer.
        probe: receives the keys instead of the attention, or None.
    """

    rotation: tuple[Tensor, Tensor] | None = None
    cache_layer: CacheLayer | None = None
    eager: bool = False
    skips_masks: bool = False
    cache_was_used: bool = False
    probe: KeyProbe | None = None


class HasContexts(Protocol):
    """Holds one context per thread: threads may share a model, but not a cache."""

    contexts: dict[int, ForwardContext]


def store_context(slot: HasContexts, context: ForwardContext) -> None:
    """Set the context of the forward that is running in this thread."""
    slot.contexts[_thread()] = context


def claim_context(slot: HasContexts) -> ForwardContext:
    """Return the context of the forward that is running in this thread, and mark its cache layer as used.

    Raises:
        NotImplementedError: a second attention within one forward, after the first has filled the cache.
    """
    context = slot.contexts.get(_thread(), ForwardContext())
    if context.cache_was_used:
        raise NotImplementedError(
            "longvq attention: use_cache must be False for a module that attends more than once with each key, got a "
            "cache of constant size, which keeps no keys"
        )
    used = context.cache_layer is not None
    store_context(slot, context._replace(cache_layer=None, cache_was_used=used))
    return context


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()
