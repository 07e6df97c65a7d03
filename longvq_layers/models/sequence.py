"""Whole models in plain PyTorch: an embedding, a stack of blocks, a head."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from longvq_layers import _checks as check
from longvq_layers.layers.common.factory import Factory
from longvq_layers.layers.common.padding import zero_padding
from longvq_layers.layers.streaming.states import BackboneState
from longvq_layers.models.backbone import SequenceBackbone

POOLINGS = ("mean", "last")


class SequenceEncoder(nn.Module):
    """An embedding and a stack of blocks: tokens or vectors to hidden states.

    Args:
        num_inputs: size of the vocabulary, for inputs (B, L) of tokens. Give this or `input_dim`.
        input_dim: width of the inputs (B, L, input_dim), for vectors.
        d_model, depth: width and number of the blocks, default 128 and 4.
        block: "longvq" (default), "mega", "spade", "s4d" or "transformer".
        causal: only past and present, default False (bidirectional).
        dropout: probability of dropping an element after the embedding and in the blocks, default 0.0.
        norm_type, gradient_checkpointing, block_options: see `SequenceBackbone`.
        device, dtype: of the parameters.

    Raises:
        ValueError, TypeError: sizes out of range or unknown options; in `forward` a wrong shape or dtype.

    Example:
        >>> SequenceEncoder(num_inputs=256, d_model=32, depth=2)(torch.randint(256, (2, 100))).shape
        torch.Size([2, 100, 32])
    """

    embedding: nn.Embedding | nn.Linear
    dropout: nn.Dropout
    backbone: SequenceBackbone

    def __init__(
        self,
        *,
        num_inputs: int | None = None,
        input_dim: int | None = None,
        d_model: int = 128,
        depth: int = 4,
        block: str = "longvq",
        causal: bool = False,
        dropout: float = 0.0,
        norm_type: str = "layer",
        gradient_checkpointing: bool = False,
        block_options: Mapping[str, object] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "SequenceEncoder"
        if (num_inputs is None) == (input_dim is None):
            raise ValueError(
                f"{name}: give num_inputs for tokens or input_dim for vectors, got num_inputs={num_inputs} and "
                f"input_dim={input_dim}"
            )
        check.positive(name, d_model=d_model)
        check.probability(name, "dropout", dropout)
        self.num_inputs, self.input_dim, self.d_model = num_inputs, input_dim, d_model
        factory: Factory = {"device": device, "dtype": dtype}
        if num_inputs is not None:
            check.positive(name, num_inputs=num_inputs)
            self.embedding = nn.Embedding(num_inputs, d_model, **factory)
            nn.init.normal_(self.embedding.weight, std=d_model**-0.5)  # vectors have length about 1
        elif input_dim is not None:
            check.positive(name, input_dim=input_dim)
            self.embedding = nn.Linear(input_dim, d_model, **factory)
        self.dropout = nn.Dropout(dropout)
        if block_options is None:
            block_options = {}
        if isinstance(block_options, Mapping):  # else the backbone refuses it
            block_options = {"dropout": dropout, **block_options}
        self.backbone = SequenceBackbone(
            d_model,
            depth,
            block=block,
            causal=causal,
            gradient_checkpointing=gradient_checkpointing,
            norm_type=norm_type,
            block_options=block_options,
            **factory,
        )

    def forward(
        self, inputs: Tensor, key_padding_mask: Tensor | None = None, *, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Hidden states (B, L, d_model) of inputs (B, L) or (B, L, input_dim), 0 at masked positions.

        Args:
            inputs: integer tokens below num_inputs, or floating-point vectors.
            key_padding_mask: (B, L) bool, True = ignore.
            cu_seqlens: offsets of documents packed into one row, see the blocks; not with block="transformer".
        """
        x = self.dropout(self._embed(inputs, "B L", key_padding_mask))
        return self.backbone(x, key_padding_mask, cu_seqlens=cu_seqlens)

    def initial_state(self, batch: int) -> BackboneState:
        """The state of `batch` empty sequences, of constant size, for `step`."""
        return self.backbone.initial_state(batch)

    def step(
        self, inputs: Tensor, state: BackboneState, key_padding_mask: Tensor | None = None
    ) -> tuple[Tensor, BackboneState]:
        """Run the next input of each sequence, or the next T inputs.

        Args:
            inputs: as in `forward`, (B, T) or (B, T, input_dim), or without the axis T for one position.
            state, key_padding_mask: see `SequenceBackbone.step`.

        Returns:
            Hidden states (B, T, d_model), or (B, d_model) for one position, and the state for the next call.
        """
        one = isinstance(inputs, Tensor) and inputs.dim() == (1 if self.num_inputs is not None else 2)
        return self.backbone.step(self._embed(inputs, "B" if one else "B T", key_padding_mask), state, key_padding_mask)

    def _embed(self, inputs: Tensor, shape: str, key_padding_mask: Tensor | None) -> Tensor:
        """The embeddings of inputs with the axes `shape`; inputs that are vectors have one more axis."""
        if self.num_inputs is None:
            check.tensor("SequenceEncoder", "inputs", inputs, f"{shape} input_dim")
            return self.embedding(zero_padding(inputs, key_padding_mask))
        check.tensor("SequenceEncoder", "inputs", inputs, shape)
        if inputs.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"SequenceEncoder: inputs must be int64 or int32 tokens, got {inputs.dtype}")
        return self.embedding(inputs)


class SequenceClassifier(nn.Module):
    """One prediction for a sequence: encoder, mean over unmasked positions (or the last of them), linear head.

    Args:
        encoder: a `SequenceEncoder`.
        num_outputs: number of classes.
        pooling: "mean" (default) or "last", the last unmasked position.

    Raises:
        ValueError, TypeError: sizes out of range or unknown options; in `forward` a wrong shape or dtype.

    Example:
        >>> model = SequenceClassifier(SequenceEncoder(num_inputs=256, d_model=32, depth=2), 10)
        >>> model(torch.randint(256, (2, 100))).shape
        torch.Size([2, 10])
    """

    def __init__(self, encoder: SequenceEncoder, num_outputs: int, *, pooling: str = "mean") -> None:
        super().__init__()
        check.positive("SequenceClassifier", num_outputs=num_outputs)
        check.one_of("SequenceClassifier", "pooling", pooling, POOLINGS)
        self.encoder, self.pooling = encoder, pooling
        self.head = linear_head(encoder, num_outputs)

    def forward(self, inputs: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Logits (B, num_outputs) of inputs (B, L) or (B, L, input_dim); key_padding_mask (B, L), True = ignore."""
        return self.head(pool(self.encoder(inputs, key_padding_mask), key_padding_mask, self.pooling))


class SequenceLM(nn.Module):
    """A prediction at every position, for language models (with a causal encoder) and for tagging.

    Args:
        encoder: a `SequenceEncoder`.
        num_outputs: number of classes; for a language model the size of the vocabulary.

    Raises:
        ValueError, TypeError: sizes out of range; in `forward` a wrong shape or dtype.

    Example:
        >>> model = SequenceLM(SequenceEncoder(num_inputs=256, d_model=32, depth=2, causal=True), 256).eval()
        >>> tokens = torch.randint(256, (2, 100))
        >>> with torch.inference_mode():
        ...     state = model.initial_state(2)
        ...     logits, state = model.step(tokens, state)  # the prompt, then a token at a time, in constant memory
        ...     logits, state = model.step(logits[:, -1].argmax(-1), state)
        >>> logits.shape
        torch.Size([2, 256])
    """

    def __init__(self, encoder: SequenceEncoder, num_outputs: int) -> None:
        super().__init__()
        check.positive("SequenceLM", num_outputs=num_outputs)
        self.encoder = encoder
        self.head = linear_head(encoder, num_outputs)

    def forward(
        self, inputs: Tensor, key_padding_mask: Tensor | None = None, *, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Logits (B, L, num_outputs); arguments as in `SequenceEncoder`."""
        return self.head(self.encoder(inputs, key_padding_mask, cu_seqlens=cu_seqlens))

    def initial_state(self, batch: int) -> BackboneState:
        """The state of `batch` empty sequences, of constant size, for `step`."""
        return self.encoder.initial_state(batch)

    def step(
        self, inputs: Tensor, state: BackboneState, key_padding_mask: Tensor | None = None
    ) -> tuple[Tensor, BackboneState]:
        """Logits at the next input or inputs of each sequence, and the state; see `SequenceEncoder.step`."""
        y, state = self.encoder.step(inputs, state, key_padding_mask)
        return self.head(y), state


def linear_head(encoder: SequenceEncoder, num_outputs: int) -> nn.Linear:
    """A linear layer from the encoder's width to `num_outputs`, with the encoder's device and dtype."""
    like = encoder.embedding.weight
    return nn.Linear(encoder.d_model, num_outputs, device=like.device, dtype=like.dtype)


def pool(hidden: Tensor, key_padding_mask: Tensor | None, how: str) -> Tensor:
    """Pool hidden states (B, L, d), 0 at masked positions, to (B, d).

    `how` is "mean" over the unmasked positions, or the "last" of them. A row without unmasked positions gives 0.
    """
    batch, length, _ = hidden.shape
    if key_padding_mask is None:
        key_padding_mask = torch.zeros(batch, length, dtype=torch.bool, device=hidden.device)
    valid = ~key_padding_mask
    if how == "mean" or not length:
        return hidden.sum(1) / valid.sum(1, keepdim=True).clamp(min=1).to(hidden.dtype)
    last = (valid * torch.arange(length, device=hidden.device)).amax(1)
    return hidden[torch.arange(batch, device=hidden.device), last]
