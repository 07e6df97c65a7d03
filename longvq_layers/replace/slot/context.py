"""What passes between an attention module, its cache and the swapped attention."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from longvq_layers import ops

Far = tuple[Tensor, Tensor]  # queries and keys of pairs outside the window


@dataclass(eq=False)
class SwappedState:
    """The past of a batch of sequences, and the codebook as the scores see it, which stays the same."""

    past: ops.VQAttentionState
    codebook: Tensor

    @property
    def nbytes(self) -> int:
        """Memory of the past, in bytes; the same at every length."""
        return self.past.nbytes

    def index_select(self, rows: Tensor) -> "SwappedState":
        """The state of those rows."""
        return SwappedState(self.past.index_select(rows), self.codebook)


class Call(NamedTuple):
    """What an attention module was called with beyond what its attention function is told.

    Attributes:
        rotation: (cos, sin) that its queries and keys are rotated with, or None.
        cache_layer: the `VQCacheLayer` to attend with, or None.
        eager: whether the original is transformers' eager attention, which sees the future where there is no mask.
        skips_masks: whether transformers makes no mask for the original where it would be causal and nothing else, so
            that the module itself says whether it is. By its name ("longvq") it gets one.
    """

    rotation: tuple[Tensor, Tensor] | None = None
    cache_layer: object | None = None
    eager: bool = False
    skips_masks: bool = False


def tensors_of(output: object) -> list[Tensor]:
    """The tensors among what a module returned: itself, or those of a tuple, a dict or transformers' ModelOutput."""
    if isinstance(output, Mapping):
        output = tuple(output.values())
    values = output if isinstance(output, tuple | list) else (output,)
    return [x for x in values if isinstance(x, Tensor)]


def cloned(x: object, memo: dict | None = None) -> object:
    """Tensors in tuples, lists and dicts as they are now; one tensor, or views of the same memory, stay one."""
    memo = {} if memo is None else memo
    if type(x) in (tuple, list):
        return type(x)(cloned(value, memo) for value in x)
    if type(x) is dict:
        return {key: cloned(value, memo) for key, value in x.items()}
    if not isinstance(x, Tensor):
        return x
    place = (x.data_ptr(), x.shape, x.stride(), x.dtype)
    if place not in memo:
        memo[place] = x.clone()
    return memo[place]
