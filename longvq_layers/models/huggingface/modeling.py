"""The base class of the Hugging Face models, and the encoder without a head."""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput
from typing_extensions import Self

from longvq_layers import _checks as check
from longvq_layers.layers.codebook.codebook import Codebook
from longvq_layers.layers.streaming.gaps import order_without_gaps, put_back, reorder
from longvq_layers.models.huggingface import cache_name
from longvq_layers.models.huggingface.cache import LongVQCache
from longvq_layers.models.huggingface.configuration import LongVQConfig
from longvq_layers.models.sequence import SequenceEncoder

_Output = TypeVar("_Output", bound=ModelOutput)
_BLOCK_CLASSES = ["LongVQBlock", "MegaBlock", "SPADEBlock", "S4DBlock", "TransformerBlock"]
_CACHE_NAMES = ["cache", "past_key_values"]


class LongVQPreTrainedModel(PreTrainedModel):
    """Initialisation, loading and gradient checkpointing of all Hugging Face models of this library."""

    config: LongVQConfig

    config_class = LongVQConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = _BLOCK_CLASSES
    _skip_keys_device_placement = _CACHE_NAMES

    @classmethod
    def from_pretrained(  # type: ignore[override]  # `Self` instead of a type variable
        cls, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Self | tuple[Self, dict[str, Any]]:
        """As in `PreTrainedModel`, but codebooks and state space models stay float32, whatever `dtype` is."""
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        model._draw({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})
        for module in model.modules():
            if isinstance(module, Codebook):
                module.reread()
        return (model, info) if output_loading_info else model

    def post_init(self) -> None:
        super().post_init()  # type: ignore[no-untyped-call]  # of transformers

    def init_weights(self) -> None:
        """Tie weights. It draws no numbers: every layer has drawn its own when it was made."""
        self.tie_weights()

    def _init_weights(self, module: nn.Module) -> None:
        """Draw the embedding that `resize_token_embeddings` adds, as `SequenceEncoder` does. Leave other modules."""
        if isinstance(module, nn.Embedding) and not getattr(module.weight, "_is_hf_initialized", False):
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)

    @torch.no_grad()
    def _draw(self, missing: set[str]) -> None:
        """Fill the tensors that the checkpoint lacks with the tensors of a new model."""
        if missing:
            own, new = self.state_dict(), type(self)(self.config).state_dict()
            for name in missing:
                own[name].copy_(new[name])

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        function = kwargs.get("gradient_checkpointing_func")
        if getattr(function, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                f"{type(self).__name__}: use_reentrant of gradient checkpointing must be False, got True, under which "
                "the commitment loss would have no gradient"
            )
        super()._set_gradient_checkpointing(*args, **kwargs)

    def _returned(self, output: _Output, return_dict: bool | None) -> _Output | tuple[Any, ...]:
        """The output as it is or as a tuple; `return_dict` defaults to the config's."""
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


class LongVQModel(LongVQPreTrainedModel):
    """A `SequenceEncoder` as a Hugging Face model: tokens to hidden states.

    Args:
        config: `LongVQConfig`.

    Raises:
        ValueError, TypeError: sizes out of range, unknown options.

    Example:
        >>> model = LongVQModel(LongVQConfig(hidden_size=32, num_hidden_layers=2))
        >>> model(torch.randint(256, (2, 50))).last_hidden_state.shape
        torch.Size([2, 50, 32])
    """

    encoder: SequenceEncoder

    def __init__(self, config: LongVQConfig) -> None:
        super().__init__(config)
        self.encoder = SequenceEncoder(
            num_inputs=config.vocab_size,
            d_model=config.hidden_size,
            depth=config.num_hidden_layers,
            block=config.block,
            causal=config.causal,
            dropout=config.dropout,
            norm_type=config.norm_type,
            block_options=config.block_options,
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:  # type: ignore[override]  # no other module will do
        self.encoder.embedding = value
        self.encoder.num_inputs = value.num_embeddings

    def streams(self) -> bool:
        """Whether a state of constant size can hold the past, so that `use_cache=True` works and `generate` uses it."""
        try:
            self.encoder.initial_state(0)
        except NotImplementedError:
            return False
        return True

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: LongVQCache | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        cache: LongVQCache | None = None,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Run the encoder.

        Args:
            input_ids: (B, L) int64 or int32; or
            inputs_embeds: (B, L, hidden_size), dtype of the model.
            attention_mask: (B, L), 1 = keep, 0 = padding, on either side and, causal, between tokens; with a cache it
                may also cover the past, (B, past + L). Default all 1.
            past_key_values, cache: two names of the cache of the past, updated in place. Inference only: eval mode, no
                gradients.
            use_cache: whether to return a cache; default only if a cache is given.
            cu_seqlens: (documents + 1,) int32, offsets of documents packed into one row (B = 1).
            output_hidden_states: whether to return the inputs of all blocks and the final hidden states as well;
                default the config's.
            output_attentions: must not be True: attention weights are never formed.
            return_dict: False for a tuple; default the config's.

        Returns:
            `BaseModelOutputWithPast`: last_hidden_state (B, L, hidden_size), 0 at padding; cache (past_key_values in
            transformers before 5.24); hidden_states.

        Raises:
            ValueError, TypeError: wrong shapes or dtypes, or a mask that contradicts the cache about the past.
            NotImplementedError: a cache with blocks that need their whole past, or gradients with a cache.
            RuntimeError: a cache in training mode.
        """
        name = type(self).__name__
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                f"{name}: give either input_ids or inputs_embeds, got {'none' if input_ids is None else 'both'}"
            )
        if output_attentions:
            raise NotImplementedError(f"{name}: output_attentions must be False: attention weights are never formed")
        x = self._embed(input_ids, inputs_embeds)
        past = self._cache(cache_name.given(name, past_key_values, cache), use_cache, cu_seqlens, x.shape[0])
        mask = _key_padding_mask(name, attention_mask, x, past)
        collect = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden: list[Tensor] | None = [] if collect else None
        if past is None or past.state is None:
            y = self._forward(x, mask, cu_seqlens, hidden)
        else:
            y, state = self.encoder.backbone.step(x, past.state, mask, hidden=hidden)
            past.advance(state, mask, x.shape[1])
        hidden_states = None if hidden is None else (*hidden, y)
        named: dict[str, Any] = {cache_name.NAME: past}
        return self._returned(
            BaseModelOutputWithPast(last_hidden_state=y, hidden_states=hidden_states, **named), return_dict
        )

    def _forward(
        self, x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, hidden: list[Tensor] | None
    ) -> Tensor:
        order = None
        if self.config.causal and mask is not None and cu_seqlens is None:
            # Padding takes no position, even between tokens, as in generation with a cache.
            order = order_without_gaps(mask)
            if order is not None:
                x, mask = reorder(x, order), mask.gather(1, order)
        y = self.encoder.backbone(self.encoder.dropout(x), mask, cu_seqlens=cu_seqlens, hidden=hidden)
        if order is not None:
            y = put_back(y, order)
            if hidden is not None:
                hidden[:] = [put_back(state, order) for state in hidden]
        return y

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        name = type(self).__name__
        if inputs_embeds is not None:
            check.tensor(name, "inputs_embeds", inputs_embeds, "B L hidden_size")
            return inputs_embeds
        assert input_ids is not None  # `forward` has checked that one is given
        check.tensor(name, "input_ids", input_ids, "B L")
        if input_ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name}: input_ids must be int64 or int32, got {input_ids.dtype}")
        return self.encoder.embedding(input_ids)

    def _cache(
        self, cache: Cache | None, use_cache: bool | None, cu_seqlens: Tensor | None, batch: int
    ) -> LongVQCache | None:
        """The cache of this forward, with the state of empty sequences if it was empty; None without a cache."""
        name = type(self).__name__
        if cache is None and not use_cache:
            return None
        if cu_seqlens is not None:
            raise NotImplementedError(f"{name}: cu_seqlens must be None with a cache, whose rows are the documents")
        if cache is None:
            cache = LongVQCache()
        if not isinstance(cache, LongVQCache):
            raise TypeError(f"{name}: cache must be a LongVQCache, got {type(cache).__name__}")
        if use_cache is False:
            raise ValueError(f"{name}: use_cache must not be False with a cache, which is updated in place")
        if self.training:
            raise RuntimeError(
                f"{name}: with a cache the model must be in eval mode, got training mode, where the codebook moves; "
                "call eval()"
            )
        if cache.state is None:
            cache.start(self.encoder.initial_state(batch), batch, self.encoder.embedding.weight.device)
        if cache.batch_size != batch:
            raise ValueError(
                f"{name}: cache must have the {batch} rows of the input, got {cache.batch_size}; for several "
                "beams or return sequences call its batch_repeat_interleave first"
            )
        return cache


class LongVQModelWithHead(LongVQPreTrainedModel):
    """A `LongVQModel` with a head. The embeddings are those of the `LongVQModel`."""

    model: LongVQModel

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:  # type: ignore[override]  # no other module will do
        self.model.set_input_embeddings(value)


def _key_padding_mask(name: str, attention_mask: Tensor | None, x: Tensor, cache: LongVQCache | None) -> Tensor | None:
    """The mask (B, L) bool, True = ignore, of the positions of x (B, L, ...).

    `attention_mask` may cover the past as well.
    """
    if attention_mask is None:
        return None
    batch, length, _ = x.shape
    past = 0 if cache is None else cache.get_seq_length()
    check.tensor(name, "attention_mask", attention_mask, "B L")
    if attention_mask.shape not in ((batch, length), (batch, past + length)):
        shapes = f"({batch}, {length})" + (f" or, with the past, ({batch}, {past + length})" if past else "")
        raise ValueError(f"{name}: attention_mask must have shape (B, L) = {shapes}, got {tuple(attention_mask.shape)}")
    covers_past = attention_mask.shape[1] > length
    if covers_past and cache is not None and cache.lengths is not None and not torch.compiler.is_compiling():
        read = (attention_mask[:, :past] != 0).sum(1)
        if not torch.equal(read, cache.lengths):
            raise ValueError(
                f"{name}: attention_mask must agree with what the cache has read, {cache.lengths.tolist()} "
                f"tokens a row, got {read.tolist()} in its first {past} columns; tokens can't be taken back"
            )
    return attention_mask[:, attention_mask.shape[1] - length :] == 0
