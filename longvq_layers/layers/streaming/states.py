"""What a `LongVQBlock` keeps of a growing sequence."""

from dataclasses import dataclass

from torch import Tensor

from longvq_layers.ops._state import State
from longvq_layers.ops.vq_state import VQAttentionState


@dataclass(eq=False, repr=False)
class LongVQState(State):
    """The past of a batch of sequences, made by `LongVQBlock.initial_state`; its size doesn't grow with the length.

    The tensors are updated in place by `LongVQBlock.step`; `clone` makes a branch.

    Attributes:
        memory: state of the state space model, (B, d_model, N), complex for "s4d" and real for "ema".
        attention: state of the attention over quantised keys.
    """

    memory: Tensor
    attention: VQAttentionState
