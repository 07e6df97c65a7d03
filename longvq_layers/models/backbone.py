"""A stack of blocks of one kind."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longvq_layers import _checks as check
from longvq_layers.layers.blocks.longvq import LongVQBlock
from longvq_layers.layers.blocks.mega import MegaBlock
from longvq_layers.layers.blocks.s4d import S4DBlock
from longvq_layers.layers.blocks.spade import SPADEBlock
from longvq_layers.layers.blocks.transformer import TransformerBlock
from longvq_layers.layers.common.padding import zero_padding
from longvq_layers.layers.parts.norm import Norm, make_norm
from longvq_layers.layers.streaming import step_checks
from longvq_layers.layers.streaming.layer import StreamingLayer
from longvq_layers.layers.streaming.states import BackboneState


def _spade(d_model: int, *, layer: int, num_heads: int = 4, global_layers: int = 1, **options: Any) -> nn.Module:
    check.integer("SequenceBackbone", "global_layers", global_layers, 0)
    return SPADEBlock(d_model, num_heads, global_ssm=layer < global_layers, **options)


def _uniform(block: type[nn.Module]) -> Callable[..., nn.Module]:
    return lambda d_model, *, layer, **options: block(d_model, **options)


# Kind of block -> function that makes the layer-th block of a stack, with the layer counted from the input.
BLOCKS: Mapping[str, Callable[..., nn.Module]] = {
    "longvq": _uniform(LongVQBlock),
    "mega": _uniform(MegaBlock),
    "spade": _spade,
    "s4d": _uniform(S4DBlock),
    "transformer": _uniform(TransformerBlock),
}


def _check_options(name: str, options: object, shared: tuple[str, ...]) -> None:
    """`options` is None or a mapping without the arguments that all blocks get from the stack."""
    if options is not None and not isinstance(options, Mapping):
        raise TypeError(f"{name}: block_options must be a mapping from names to values, got {options!r}")
    for option in shared:
        if option in (options or {}):
            raise ValueError(f"{name}: block_options must not contain {option!r}, which all blocks get from the stack")


class SequenceBackbone(nn.Module):
    """`depth` blocks of one kind and a final norm: (B, L, d_model) -> (B, L, d_model).

    Args:
        d_model: width.
        depth: number of blocks.
        block: "longvq" (default), "mega", "spade", "s4d" or "transformer".
        causal: only past and present, default False (bidirectional).
        gradient_checkpointing: whether training saves only the inputs of the blocks and runs each forward again in the
            backward; default False.
        norm_type: of the final norm and of the blocks: "layer" (default), "rms", "scale" or "batch".
        block_options: keyword arguments of the blocks, see `LongVQBlock`, `MegaBlock`, `SPADEBlock` (which takes
            `num_heads`, default 4, and `global_layers`, the number of layers from the input with an SSM, default 1),
            `S4DBlock` and `TransformerBlock`.
        device, dtype: of the parameters.

    Raises:
        ValueError, TypeError: sizes out of range, an unknown block, unknown options of a block.

    Example:
        >>> SequenceBackbone(32, 2, block="longvq", block_options={"num_codes": 16})(torch.randn(2, 50, 32)).shape
        torch.Size([2, 50, 32])
    """

    # Runs a block with activation checkpointing. transformers replaces it by its own function of this name.
    _gradient_checkpointing_func = staticmethod(partial(checkpoint, use_reentrant=False))

    blocks: nn.ModuleList
    norm: Norm

    def __init__(
        self,
        d_model: int,
        depth: int,
        *,
        block: str = "longvq",
        causal: bool = False,
        gradient_checkpointing: bool = False,
        norm_type: str = "layer",
        block_options: Mapping[str, object] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "SequenceBackbone"
        check.positive(name, d_model=d_model, depth=depth)
        check.one_of(name, "block", block, tuple(BLOCKS))
        check.flags(name, causal=causal, gradient_checkpointing=gradient_checkpointing)
        shared = {"causal": causal, "norm_type": norm_type, "device": device, "dtype": dtype}
        _check_options(name, block_options, ("d_model", "layer", *shared))
        self.d_model, self.depth, self.block, self.causal = d_model, depth, block, causal
        self.gradient_checkpointing = gradient_checkpointing
        options = {**(block_options or {}), **shared}
        self.blocks = nn.ModuleList(BLOCKS[block](d_model, layer=layer, **options) for layer in range(depth))
        self.norm = make_norm(name, norm_type, d_model, device=device, dtype=dtype)

    def forward(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        hidden: list[Tensor] | None = None,
    ) -> Tensor:
        """Run the stack.

        Args:
            x: (B, L, d_model).
            key_padding_mask: (B, L) bool, True = ignore.
            cu_seqlens: offsets of documents packed into one row, see the blocks; not with block="transformer".
            hidden: a list to which the input of every block is appended. Default none.

        Returns:
            (B, L, d_model), exactly 0 at masked positions.
        """
        packed = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}
        for block in self.blocks:
            if hidden is not None:
                hidden.append(x)
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(partial(block, **packed), x, key_padding_mask)
            else:
                x = block(x, key_padding_mask, **packed)
        return zero_padding(self.norm(x, key_padding_mask), key_padding_mask)

    def initial_state(self, batch: int) -> BackboneState:
        """The state of `batch` empty sequences, of constant size, for `step`.

        Raises:
            NotImplementedError: a bidirectional stack, or blocks that need their whole past.
        """
        return BackboneState(tuple(block.initial_state(batch) for block in self._streaming_blocks()))

    def step(
        self,
        x: Tensor,
        state: BackboneState,
        key_padding_mask: Tensor | None = None,
        *,
        hidden: list[Tensor] | None = None,
    ) -> tuple[Tensor, BackboneState]:
        """Run the next token (B, d_model) or tokens (B, T, d_model). Outputs equal those of `forward` in eval mode.

        Args:
            x: dtype of the layers.
            state: from `initial_state` or the step before; may be updated in place.
            key_padding_mask: (B,) or (B, T) bool, True = not part of the sequence: takes no position.
            hidden: as in `forward`.

        Returns:
            y with the shape of x, 0 at masked positions, and the state for the next call.

        Raises:
            NotImplementedError: as `initial_state`.
            RuntimeError: in training mode.
            ValueError, TypeError: a state of another kind or depth, wrong shapes or dtypes.
        """
        name = "SequenceBackbone.step"
        blocks = self._streaming_blocks()
        step_checks.state_type(name, state, BackboneState)
        if len(state.layers) != self.depth:
            raise ValueError(f"{name}: state must have {self.depth} layers, as the model, got {len(state.layers)}")
        states = []
        for block, past in zip(blocks, state.layers, strict=True):
            if hidden is not None:
                hidden.append(x)
            x, past = block.step(x, past, key_padding_mask)
            states.append(past)
        return zero_padding(self.norm(x), key_padding_mask), BackboneState(tuple(states))

    def _streaming_blocks(self) -> list[StreamingLayer[Any]]:
        blocks = [block for block in self.blocks if isinstance(block, StreamingLayer)]
        if len(blocks) != self.depth:
            raise NotImplementedError(
                'SequenceBackbone: block must be "longvq", "s4d", "spade", or "mega" with a chunk, to run with a '
                f"state, got {self.block!r}, whose blocks have no state of constant size"
            )
        return blocks

    def extra_repr(self) -> str:
        return f"{self.d_model}, {self.depth}, block={self.block!r}, causal={self.causal}"
