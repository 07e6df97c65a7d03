"""A layer of a transformers cache whose memory doesn't grow."""

import copy

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from longvq_layers.replace.slot.context import SwappedState
from longvq_layers.replace.slot.swapped import SwappedAttention

_HIDDEN = "_longvq_hidden"  # where a mask keeps what `_hidden` found
_KEEPS = "a cache of constant size keeps sums over its past, not the tokens"


class VQCacheLayer(CacheLayerMixin):
    """What one replaced attention keeps of the past: counts and sums of values per code, and the keys in the window.

    It takes the place of an empty `DynamicLayer` by itself, see `take_over`. Beams and batches are reordered as in any
    cache. What was read can't be taken back, so there is no `crop`, and with it no assisted decoding.

    Args:
        attention: the module that attends with it.
    """

    is_sliding = False
    is_croppable = False
    is_compileable = False
    supports_early_init = False

    def __init__(self, attention: SwappedAttention) -> None:
        super().__init__()
        self.attention = attention
        self.state: SwappedState | None = None
        self.positions = 0  # read so far, padding included
        self.expected = False  # whether the attention is about to read what `update` hands through
        self.closed = False  # by a bidirectional call
        self.hidden: Tensor | None = None  # (B,) int64, which positions were padding; None: none
        self.next_hidden: Tensor | None = None  # the same after the call that is going on
        self.known = True  # whether that is so: a compiled graph can't tell

    def __deepcopy__(self, memo: dict) -> "VQCacheLayer":
        # A copy goes on with the same attention, unless that is being copied too.
        twin = memo[id(self)] = VQCacheLayer(memo.get(id(self.attention), self.attention))
        own = {name: value for name, value in self.__dict__.items() if name != "attention"}
        twin.__dict__.update(copy.deepcopy(own, memo))
        return twin

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the state of empty sequences."""
        self.state = self.attention.initial_state(key_states.shape[0], value_states.shape[-1])
        self.is_initialized = True

    @property
    def keys(self) -> Tensor:
        """Refused: a model that reads the keys or values of its cache, or counts them, would find none."""
        raise NotImplementedError(
            f"longvq attention: the model looks for keys in its cache, but {_KEEPS}; call it with use_cache=False, or "
            "restore_attention(model)"
        )

    @keys.setter
    def keys(self, value: None) -> None:
        pass  # what every layer of a cache is initialised with

    values = keys

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """The new keys and values alone: the attention adds them to the state itself.

        Raises:
            RuntimeError: the attention that this was filled by isn't there any more (`restore_attention`).
        """
        if not self.expected:
            raise RuntimeError(
                "longvq attention: the cache was filled by a replaced attention that isn't there any more; start with "
                "a new cache"
            )
        self.expected = False
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return key_states, value_states

    def close(self, positions: int) -> None:
        """Take note of a bidirectional call of so many positions, after which it can't be read."""
        self.state, self.positions, self.closed = None, positions, True

    def check(self, padding: Tensor | None, mask: Tensor | None, new: int) -> Tensor | None:
        """Of padding (B, positions + new), True = ignore, the part of the new positions.

        Args:
            mask: what the padding was read from, the same object for all layers of a forward.

        Raises:
            NotImplementedError: it hides other positions of the past than were hidden when they were read.
        """
        if torch.compiler.is_compiling():
            self.known = False
        if not self.known or (padding is None and self.hidden is None):  # without any mask nothing here grows
            return None if padding is None else padding[:, -new:]
        lengths = self.state.past.lengths
        none = torch.zeros_like(lengths)
        past, self.next_hidden = (none, none) if padding is None else _hidden(padding, mask, self.positions)
        if self.positions and not torch.equal(past, none if self.hidden is None else self.hidden):
            seen = "all" if padding is None else (~padding[:, : self.positions]).sum(1).tolist()
            raise NotImplementedError(
                f"longvq attention: attention_mask: got {seen} tokens of the past, expected the {lengths.tolist()} "
                f"that were read, each where it was: {_KEEPS}, and can't hide or show one later"
            )
        return None if padding is None else padding[:, -new:]

    def advance(self, new: int) -> None:
        """So many new positions were read."""
        self.positions += new
        self.hidden = self.next_hidden

    def get_seq_length(self) -> int:
        """Number of positions read, padding included."""
        return self.positions

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys that a mask for so many new positions covers, and the first of them."""
        return self.positions + query_length, 0

    def get_max_length(self) -> int:
        """-1: there is no longest sequence."""
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.24

    @property
    def nbytes(self) -> int:
        """Memory in bytes; the same at every length."""
        return 0 if self.state is None else self.state.nbytes

    def reset(self) -> None:
        """Empty it."""
        self.state, self.positions, self.is_initialized, self.closed = None, 0, False, False
        self.hidden, self.next_hidden, self.known = None, None, True

    def batch_select_indices(self, indices: Tensor) -> None:
        """Make row i a copy of what row ``indices[i]`` is; rows may be left out and repeated."""
        if self.state is not None:
            indices = indices.to(self.state.past.device)
            self.state = self.state.index_select(indices)
            self.hidden = None if self.hidden is None else self.hidden.index_select(0, indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """The same for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        if self.state is not None:
            self.batch_select_indices(torch.arange(self.state.past.batch).repeat_interleave(repeats))

    def crop(self, *args, **kwargs) -> None:
        """Refused."""
        raise NotImplementedError(
            f"longvq attention: crop: {_KEEPS}, so assisted and contrastive decoding don't work; generate without "
            "assistant_model, or with use_cache=False"
        )

    def activate_past_recording(self) -> None:
        """Refused, like `crop`, for which it prepares."""
        self.crop()

    def offload(self) -> None:
        """Nothing: it is small, and stays where the model is."""

    prefetch = offload


def _hidden(padding: Tensor, mask: Tensor, positions: int) -> tuple[Tensor, Tensor]:
    """Which positions of padding (B, L) are hidden, of the first so many and of all: (B,) sums of a number for each.

    So what has to be kept doesn't grow, and another position shows as well as another number of them. Made once for
    all layers of a forward, which get the same `mask` (of two axes: a dense one may be the user's, and change).
    """
    known = getattr(mask, _HIDDEN, None)
    if known is None or known[0] != (positions, padding.shape):
        number = torch.arange(1, padding.shape[1] + 1, device=padding.device) * 0x5851F42D4C957F2D  # wraps around
        number = (number ^ (number >> 29)) * 0x14057B7EF767814F
        hidden = torch.where(padding, number, 0)
        known = ((positions, padding.shape), hidden[:, :positions].sum(1), hidden.sum(1))
        if mask.dim() == 2:
            setattr(mask, _HIDDEN, known)
    return known[1:]


def take_over(cache: object, index: object, attention: SwappedAttention) -> VQCacheLayer | None:
    """The layer of `cache` that `attention` is to use for its call, put there in the place of an empty one.

    Returns:
        None where the cache has to stay as it is: filled before the replacement, or of another kind.
    """
    cache = getattr(cache, "self_attention_cache", cache)  # of an EncoderDecoderCache
    if not isinstance(cache, Cache) or not isinstance(index, int):
        return None
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= index:
            cache.layers.append(cache.layer_class_to_replicate())
    if index >= len(cache.layers):
        return None
    layer = cache.layers[index]
    if type(layer) is DynamicLayer and layer.get_seq_length() == 0:
        layer = cache.layers[index] = VQCacheLayer(attention)
    if not isinstance(layer, VQCacheLayer):
        return None
    if layer.closed:
        raise NotImplementedError(
            f"longvq attention: the cache was filled by a bidirectional call, but {_KEEPS}; start with a new cache, or "
            "call the model with use_cache=False"
        )
    if layer.attention is not attention:
        if layer.positions:
            raise RuntimeError(
                "longvq attention: the cache was filled by another replaced attention; start with a new cache"
            )
        layer = cache.layers[index] = VQCacheLayer(attention)
    layer.expected = True
    return layer
