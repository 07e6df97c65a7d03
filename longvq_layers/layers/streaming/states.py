"""The states of layers over growing sequences. No state grows with the length; `clone` makes an independent copy."""

from dataclasses import dataclass, replace

from torch import Tensor

from longvq_layers.ops._state import State
from longvq_layers.ops.vq_state import VQAttentionState


@dataclass(eq=False, repr=False)
class LocalAttentionState(State):
    """The last W − 1 tokens of a batch of sequences; `LocalAttention.step` updates them in place.

    The newest token is the last. A row with fewer tokens has them at the end.

    Attributes:
        keys: (B, Hkv, W − 1, D), dtype of the layer.
        values: (B, Hkv, W − 1, D), dtype of the layer.
        lengths: (B,) int64, number of tokens that each row has seen.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor


@dataclass(eq=False, repr=False)
class LongVQState(State):
    """The past of a batch of sequences; `LongVQBlock.step` updates it in place.

    Attributes:
        memory: (B, d_model, N) state of the SSM, complex for "s4d" and real for "ema".
        attention: state of the attention over quantised keys.
    """

    memory: Tensor
    attention: VQAttentionState


@dataclass(eq=False, repr=False)
class MegaState(State):
    """The past of a batch of sequences; `MegaBlock.step` updates keys, values and lengths in place.

    Attention needs the keys and values of the current chunk only. Row b holds the first ``lengths[b] % C`` of them.

    Attributes:
        ema: (B, d_model, N) state of the moving average, float32 or float64.
        keys: (B, C, d_attn), C = chunk, dtype of the block.
        values: (B, C, d_value), dtype of the block.
        lengths: (B,) int64, number of tokens that each row has seen.
    """

    ema: Tensor
    keys: Tensor
    values: Tensor
    lengths: Tensor


@dataclass(eq=False, repr=False)
class S4DState(State):
    """The past of a batch of sequences; `S4DBlock.step` leaves it as it is and returns a new one.

    Attributes:
        memory: (B, d_model, N) complex, state of the SSM.
    """

    memory: Tensor


@dataclass(eq=False, repr=False)
class SPADEState(State):
    """The past of a batch of sequences; `SPADEBlock.step` updates it in place.

    Attributes:
        local: state of the local attention.
        ssm: (B, d_model, N) complex, state of the SSM; None in a block without SSM.
        memory_keys, memory_values: (B, H, M, D), keys and values of the encoder's output; None in a block without
            cross-attention. They never change, so `clone` shares them.
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
        """A copy to continue a sequence in two ways. It shares only the encoder's output."""
        return replace(self, local=self.local.clone(), ssm=None if self.ssm is None else self.ssm.clone())


@dataclass(eq=False, repr=False)
class BackboneState(State):
    """The states of the blocks of a `SequenceBackbone`.

    Attributes:
        layers: one state per block, in order.
    """

    layers: tuple[State, ...]
