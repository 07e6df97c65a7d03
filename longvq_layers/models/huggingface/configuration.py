"""The configuration of the Hugging Face models."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig


class LongVQConfig(PreTrainedConfig):
    """The configuration of `LongVQModel` and of the models with a head.

    Args:
        vocab_size: number of tokens, default 256 (bytes).
        hidden_size: width of the blocks, default 128.
        num_hidden_layers: number of blocks, default 4.
        block: "longvq" (default) or another kind of `longvq_layers.models.BLOCKS`.
        block_options: keyword arguments of the blocks, such as {"num_codes": 64}, see `SequenceBackbone`. Only values
            that JSON can hold. Default none.
        causal: only past and present, default False (bidirectional); `LongVQForCausalLM` needs True.
        dropout: probability of dropping an element after the embedding and in the blocks, default 0.0.
        norm_type: "layer" (default), "rms", "scale" or "batch".
        pooling: of the classifier, "mean" (default) over the unmasked positions, or the "last" of them.
        tie_word_embeddings: whether the head of `LongVQForCausalLM` is the embedding, default False.
        pad_token_id, bos_token_id, eos_token_id: default None. `attention_mask` alone says which positions are padding,
            not the pad token.
        kwargs: arguments of every configuration, such as num_labels, problem_type and dtype.

    Example:
        >>> config = LongVQConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, block_options={"num_codes": 16})
        >>> LongVQConfig.from_dict(config.to_dict()).block_options
        {'num_codes': 16}
    """

    model_type = "longvq_layers"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012, Trainer adds lists to it

    def __init__(
        self,
        vocab_size: int = 256,
        hidden_size: int = 128,
        num_hidden_layers: int = 4,
        block: str = "longvq",
        block_options: Mapping[str, object] | None = None,
        causal: bool = False,
        dropout: float = 0.0,
        norm_type: str = "layer",
        pooling: str = "mean",
        tie_word_embeddings: bool = False,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.block, self.block_options = block, dict(block_options or {})
        self.causal, self.dropout, self.norm_type, self.pooling = causal, dropout, norm_type, pooling
        super().__init__(**kwargs)
        # After the base class, which may set its own defaults.
        self.tie_word_embeddings = tie_word_embeddings
        self.pad_token_id, self.bos_token_id, self.eos_token_id = pad_token_id, bos_token_id, eos_token_id
