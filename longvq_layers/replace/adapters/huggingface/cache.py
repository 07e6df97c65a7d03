"""A layer of a transformers cache whose memory doesn't grow."""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from longvq_layers.replace.slot.context import FarQueryKey, StepAttention
from longvq_layers.replace.slot.state import SwappedState

_HASHES = "_longvq_hidden"  # attribute in which a mask keeps what `_hidden_hashes` computed
_KEEPS = "a cache of constant size keeps sums over its past, not the tokens"


class VQCacheLayer(CacheLayerMixin):
    """What one replaced attention keeps of the past: counts and sums of values per code, and the keys in the window.

    `take_over` puts it in place of an empty `DynamicLayer`. Beams and batches are reordered as in any cache. The layer
    can't remove tokens that were read, so there is no `crop` and no assisted decoding.

    Args:
        attention: the attention that reads and updates it.
    """

    is_sliding = False
    is_croppable = False
    is_compileable = False
    supports_early_init = False

    def __init__(self, attention: StepAttention) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of transformers
        self.attention = attention
        self.state: SwappedState | None = None
        self.positions = 0  # read so far, padding included
        self.expected = False  # True from `take_over` to `update`: the attention is about to read the new keys
        self.closed = False  # True after a bidirectional call
        self.hidden: Tensor | None = None  # (B,) int64, a hash of the padded positions so far; None: no padding
        self.next_hidden: Tensor | None = None  # the hash after the running call
        self.masks_are_known = True  # False once compiled: a compiled graph can't compare masks

    def __deepcopy__(self, memo: dict[int, Any]) -> "VQCacheLayer":
        """A copy uses the same attention or, if a deep copy of the model is running, the copied attention."""
        twin = VQCacheLayer(memo.get(id(self.attention), self.attention))
        memo[id(self)] = twin
        own = {name: value for name, value in self.__dict__.items() if name != "attention"}
        twin.__dict__.update(copy.deepcopy(own, memo))
        return twin

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the state of empty sequences."""
        self.state = self.attention.initial_state(key_states.shape[0], value_states.shape[-1])
        self.is_initialized = True

    @property
    def keys(self) -> Tensor:
        """Raises NotImplementedError: there are no keys for a model to read or count."""
        raise NotImplementedError(
            "longvq attention: use_cache must be False for a model that looks for keys in its cache, got True, but "
            f"{_KEEPS}; call it with use_cache=False, or restore_attention(model)"
        )

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        pass  # the base class initialises every layer with None

    values = keys

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Return the new keys and values alone; `attend` adds them to the state.

        Raises:
            RuntimeError: the attention that filled this layer was restored.
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

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        padding: Tensor | None,
        mask: Tensor | None,
        *,
        far: FarQueryKey | None,
        scale: float | None,
    ) -> Tensor:
        """Attend to the past and the new positions, and add the new ones to the state; see `CacheLayer`."""
        if self.state is None:
            raise RuntimeError("longvq attention: the module must update its cache before it attends")
        new = q.shape[2]
        self._check_past(self.state, padding, mask)
        own = None if padding is None else padding[:, -new:]
        output = self.attention.step(q, k, v, self.state, own, far=far, scale=scale)
        self.positions += new
        self.hidden = self.next_hidden
        return output

    def close(self, positions: int) -> None:
        """Refuse all later calls, because a bidirectional call over `positions` tokens has filled the cache."""
        self.state, self.positions, self.closed = None, positions, True

    def _check_past(self, state: SwappedState, padding: Tensor | None, mask: Tensor | None) -> None:
        """padding (B, positions + new) must hide the same past positions as when the past was read."""
        if torch.compiler.is_compiling():
            self.masks_are_known = False
        if not self.masks_are_known or (padding is None and self.hidden is None):  # without masks nothing grows here
            return
        lengths = state.past.lengths
        none = torch.zeros_like(lengths)
        past, self.next_hidden = (none, none) if padding is None else _hidden_hashes(padding, mask, self.positions)
        if self.positions and not torch.equal(past, none if self.hidden is None else self.hidden):
            seen = "all" if padding is None else (~padding[:, : self.positions]).sum(1).tolist()
            raise NotImplementedError(
                f"longvq attention: attention_mask must show the {lengths.tolist()} tokens of the past that were read, "
                f"each where it was, got {seen} tokens: {_KEEPS}, and can't hide or show one later"
            )

    def get_seq_length(self) -> int:
        """Number of positions read, padding included."""
        return self.positions

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys that a mask for `query_length` new positions covers, and the first of them."""
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
        """Empty the layer."""
        self.state, self.positions, self.is_initialized, self.closed = None, 0, False, False
        self.hidden, self.next_hidden, self.masks_are_known = None, None, True

    def batch_select_indices(self, indices: Tensor) -> None:
        """Make row i a copy of row ``indices[i]``; rows may be left out and repeated."""
        if self.state is not None:
            indices = indices.to(self.state.past.device)
            self.state = self.state.index_select(indices)
            self.hidden = None if self.hidden is None else self.hidden.index_select(0, indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """`batch_select_indices`, for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        if self.state is not None:
            self.batch_select_indices(torch.arange(self.state.past.batch).repeat_interleave(repeats))

    def crop(self, *args: object, **kwargs: object) -> None:
        """Raises NotImplementedError."""
        raise NotImplementedError(
            f"longvq attention: crop is not offered, because {_KEEPS}, so assisted and contrastive decoding don't "
            "work; generate without assistant_model, or with use_cache=False"
        )

    def activate_past_recording(self) -> None:
        """Raises NotImplementedError, because it prepares for `crop`."""
        self.crop()

    def offload(self) -> None:
        """Does nothing: the layer is small and stays where the model is."""

    prefetch = offload


def _hidden_hashes(padding: Tensor, mask: Tensor | None, positions: int) -> tuple[Tensor, Tensor]:
    """Hashes (B,) of the hidden positions of padding (B, L): among the first `positions`, and among all.

    A hash is a sum of one number per hidden position. Its size doesn't grow. It depends on which positions are hidden,
    not only on how many. All layers of a forward get the same `mask` object, so a mask of two axes stores the hashes
    for all layers. A dense mask stores none: it may belong to the user, who may change it.
    """
    known: tuple[object, Tensor, Tensor] | None = getattr(mask, _HASHES, None)
    if known is None or known[0] != (positions, padding.shape):
        number = torch.arange(1, padding.shape[1] + 1, device=padding.device) * 0x5851F42D4C957F2D  # wraps around
        number = (number ^ (number >> 29)) * 0x14057B7EF767814F
        hidden = torch.where(padding, number, 0)
        known = ((positions, padding.shape), hidden[:, :positions].sum(1), hidden.sum(1))
        if mask is not None and mask.dim() == 2:
            setattr(mask, _HASHES, known)
    return known[1:]


def take_over(cache: object, index: object, attention: StepAttention) -> VQCacheLayer | None:
    """The layer of `cache` that `attention` must use for its call; replaces an empty layer of the cache.

    Returns:
        None if the cache must stay as it is, because it was filled before the replacement or is of another kind.
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
            "longvq attention: past_key_values must be a new cache, got one that was filled by a bidirectional call, "
            f"but {_KEEPS}; start with a new cache, or call the model with use_cache=False"
        )
    if layer.attention is not attention:
        if layer.positions:
            raise RuntimeError(
                "longvq attention: the cache was filled by another replaced attention; start with a new cache"
            )
        layer = cache.layers[index] = VQCacheLayer(attention)
    layer.expected = True
    return layer
