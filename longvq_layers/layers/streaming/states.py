"""What layers keep of growing sequences: states whose size doesn't grow with the length."""

from dataclasses import dataclass, replace

from torch import Tensor

from longvq_layers.ops._state import State
from longvq_layers.ops.vq_state import VQAttentionState


@dataclass(eq=False, repr=False)
class LocalAttentionState(State):
    """The last W − 1 tokens of a batch of sequences, for `LocalAttention.step`, which updates it in place.

    Nothing grows with the length. The newest token comes last; a row that is shorter has its tokens at the end.

    Attributes:
        keys: (B, Hkv, W − 1, D), dtype of the layer.
        values: (B, Hkv, W − 1, D).
        lengths: (B,) int64, number of tokens that each row has seen.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor


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


@dataclass(eq=False, repr=False)
class MegaState(State):
    """The past of a batch of sequences, as `MegaBlock.step` needs it; made by `MegaBlock.initial_state`.

    The attention needs the keys and values of the current chunk only, of which row b holds ``lengths[b] % C``. Nothing
    grows with the length. Keys, values and lengths are updated in place; `clone` makes a branch.

    Attributes:
        ema: (B, d_model, N) state of the moving average, float32 or float64.
        keys: (B, C, d_attn), C = chunk; the dtype of the block.
        values: (B, C, d_value).
        lengths: (B,) int64, number of tokens that each row has seen.
    """

    ema: Tensor
    keys: Tensor
    values: Tensor
    lengths: Tensor


@dataclass(eq=False, repr=False)
class S4DState(State):
    """The past of a batch of sequences, made by `S4DBlock.initial_state`; its size doesn't grow with the length.

    Attributes:
        memory: state of the SSM, (B, d_model, N) complex.
    """

    memory: Tensor


@dataclass(eq=False, repr=False)
class SPADEState(State):
    """The past of a batch of sequences, for `SPADEBlock.step`, which updates it in place. Its size never changes.

    Attributes:
        local: the window of the local attention.
        ssm: (B, d_model, N) complex, state of the SSM; None in a block without.
        memory_keys, memory_values: (B, H, M, D), the encoder's output as the cross-attention needs it; None in a block
            without. They are never changed, so `clone` shares them.
        memory_key_padding_mask: (B, M) bool, True = ignore, or None.
    """

    local: LocalAttentionState
    ssm: Tensor | None = None
    memory_keys: Tensor | None = None
    memory_values: Tensor | None = None
    memory_key_padding_mask: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        """(B,) int64, number of tokens that each row has seen."""
        return self.local.lengths

    def clone(self) -> "SPADEState":
        """A copy that shares no memory but that of the encoder's output, to continue a sequence in two ways."""
        return replace(self, local=self.local.clone(), ssm=None if self.ssm is None else self.ssm.clone())


@dataclass(eq=False, repr=False)
class BackboneState(State):
    """The states of the blocks of a stack, in order. Of constant size, whatever the length of the sequences.

    Attributes:
        layers: one state per block.
    """

    layers: tuple[State, ...]
