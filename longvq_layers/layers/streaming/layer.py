"""The base class of layers that run growing sequences."""

from typing import ClassVar, Generic, TypeVar

from torch import Tensor

from longvq_layers.layers.common.sequence_layer import SequenceLayer
from longvq_layers.layers.streaming import step_checks
from longvq_layers.ops._state import State

StateT = TypeVar("StateT", bound=State)


class StreamingLayer(SequenceLayer, Generic[StateT]):
    """A causal layer that reads a sequence token by token or in pieces, with a state of constant size.

    A subclass gives `state_class`, `initial_state`, `_check_streams` and `_step`, and extends `check_state` unless the
    operators that it calls check the state.
    """

    state_class: ClassVar[type[State]]

    def initial_state(self, batch: int) -> StateT:
        """The state of `batch` empty sequences, for `step`.

        Raises NotImplementedError where `step` does: a bidirectional layer, or one that needs its whole past.
        """
        raise NotImplementedError

    def step(self, x: Tensor, state: StateT, key_padding_mask: Tensor | None = None) -> tuple[Tensor, StateT]:
        """Run the next token or tokens of growing sequences, with a state of constant size. For inference only.

        Pieces of any length give together what `forward` gives for the whole sequence in eval mode. Masks differ: here
        a masked token takes no position. So prompts of different lengths can be padded, left or right, and each row
        continues at its own length.

        Args:
            x: (B, C), one token per row, or (B, T, C), T ≥ 0 tokens, with the layer's width C and dtype.
            state: from `initial_state` or the step before. **Updated in place**; `state.clone()` keeps it.
            key_padding_mask: (B,) or (B, T) bool, True = not part of the sequence. Default none.

        Returns:
            y with the shape of x, 0 at masked positions, and the state for the next call.

        Raises:
            ValueError, TypeError: wrong shapes, dtypes or devices.
            NotImplementedError: a bidirectional layer, one that needs its whole past, or gradients: call `step` under
                `torch.no_grad()`.
            RuntimeError: in training mode, where dropout, batch norm and codebooks make outputs differ from those of
                `forward` later.
        """
        name = f"{type(self).__name__}.step"
        if isinstance(x, Tensor) and x.dim() == 2:
            y, state = self.step(x.unsqueeze(1), state, step_checks.mask_of_token(name, key_padding_mask))
            return y.squeeze(1), state
        self._check_streams(name)
        x = self._checked_input(name, x, key_padding_mask)
        self._check_mode(name, x)
        self.check_state(name, x, state)
        return self._step(x, state, key_padding_mask)

    def check_state(self, name: str, x: Tensor, state: StateT) -> None:
        """Raise TypeError or ValueError unless `state` belongs to this layer and to the rows of x (B, T, C).

        `name` is the operation in errors.
        """
        step_checks.state_type(name, state, self.state_class)

    def _step(self, x: Tensor, state: StateT, key_padding_mask: Tensor | None) -> tuple[Tensor, StateT]:
        """`step` after all checks: x is (B, T, C) with zeros at masked positions, the mask (B, T) or None."""
        raise NotImplementedError

    def _check_streams(self, name: str) -> None:
        """Raise NotImplementedError unless a state of constant size can hold the past."""
        raise NotImplementedError

    def _check_mode(self, name: str, x: Tensor) -> None:
        step_checks.inference(name, self, x)
