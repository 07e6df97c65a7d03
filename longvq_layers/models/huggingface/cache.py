"""The cache of the Hugging Face models: `generate` keeps a state of constant size in it between tokens."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from typing_extensions import Never

from longvq_layers.layers.streaming.states import BackboneState


class LongVQCache(Cache):
    """The past of a batch of sequences, for `cache=` or `past_key_values=`; its memory is the same at every length.

    The first forward fills an empty cache. Later forwards update it in place: to continue one prompt in several ways,
    give each continuation a `copy.deepcopy`. Tokens can't be removed from the state, so there is no `crop`, and no
    assisted decoding.

    Attributes:
        state: `BackboneState`, or None while empty.
        lengths: (B,) int64, number of tokens of each row, padding not counted; None while empty.

    Example:
        >>> from longvq_layers.models.huggingface import LongVQConfig, LongVQForCausalLM
        >>> config = LongVQConfig(hidden_size=32, num_hidden_layers=2, causal=True)
        >>> model, cache = LongVQForCausalLM(config).eval(), LongVQCache()
        >>> prompt = torch.randint(256, (1, 10))
        >>> tokens = model.generate(prompt, cache=cache, max_new_tokens=5, do_sample=False)
        >>> tokens.shape, cache.get_seq_length()  # the last token is not read yet
        (torch.Size([1, 15]), 14)
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.reset()

    def reset(self) -> None:
        """Empty the cache."""
        self.state: BackboneState | None = None
        self.lengths: Tensor | None = None
        self._columns = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of positions read, padding included."""
        return self._columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no longest sequence."""
        return -1

    @property
    def batch_size(self) -> int:
        """B, number of rows; -1 while empty."""
        return -1 if self.lengths is None else self.lengths.shape[0]

    @property
    def nbytes(self) -> int:
        """Memory of the tensors, in bytes; the same at every length."""
        if self.state is None or self.lengths is None:
            return 0
        return self.state.nbytes + self.lengths.nbytes

    @property
    def is_initialized(self) -> bool:
        """Whether it holds a state."""
        return self.state is not None

    @property
    def is_compileable(self) -> bool:
        """False: `generate` should not compile the steps."""
        return False

    @property
    def is_linear(self) -> list[bool]:
        """[False]: `generate` passes only the tokens that the cache has not read, as it does with keys and values."""
        return [False]

    @property
    def is_croppable(self) -> bool:
        """False: see `crop`."""
        return False

    def start(self, state: BackboneState, batch: int, device: torch.device) -> None:
        """Fill the empty cache with the state of `batch` empty sequences."""
        self.state, self.lengths = state, torch.zeros(batch, dtype=torch.int64, device=device)

    def advance(self, state: BackboneState, key_padding_mask: Tensor | None, length: int) -> None:
        """Keep `state`, which has read `length` more positions; key_padding_mask (B, T) says which are padding."""
        self.state = state
        self._columns += length
        if self.lengths is not None:
            self.lengths += length if key_padding_mask is None else (~key_padding_mask).sum(1)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Make row i a copy of row ``indices[i]``; rows may be left out and repeated."""
        if self.state is not None and self.lengths is not None:
            indices = indices.to(self.lengths.device)
            self.state, self.lengths = self.state.index_select(indices), self.lengths.index_select(0, indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """The same for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        if self.state is not None:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Not offered."""
        raise NotImplementedError(
            "LongVQCache.crop: tokens can't be taken back out of a state of constant size, so assisted and contrastive "
            "decoding don't work; keep a copy.deepcopy of the cache from before them, or generate with use_cache=False"
        )

    def activate_past_recording(self) -> None:
        """Not offered: it prepares for `crop`."""
        self.crop()

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Never:
        """Not offered: the cache holds no keys and values."""
        raise NotImplementedError("LongVQCache.update: the cache holds states, not keys and values; see `state`")

    def __len__(self) -> int:
        return 0 if self.state is None else len(self.state.layers)

    def __repr__(self) -> str:
        return f"LongVQCache(batch_size={self.batch_size}, positions={self._columns}, nbytes={self.nbytes})"
