"""The base class of the Hugging Face models, and the encoder without a head."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from longvq_layers import _checks as check
from longvq_layers.layers.codebook.codebook import Codebook
from longvq_layers.layers.streaming.gaps import order_without_gaps, put_back, reorder
from longvq_layers.models.huggingface import cache_name
from longvq_layers.models.huggingface.cache import LongVQCache
from longvq_layers.models.huggingface.configuration import LongVQConfig
from longvq_layers.models.sequence import SequenceEncoder


class LongVQPreTrainedModel(PreTrainedModel):
    """Initialisation, loading and gradient checkpointing of all models here."""

    config_class = LongVQConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("LongVQBlock", "MegaBlock", "SPADEBlock", "S4DBlock", "TransformerBlock")
    _skip_keys_device_placement = ("cache", "past_key_values")

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """As in `PreTrainedModel`; codebooks and state space models keep float32 whatever `dtype` says."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model._draw({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})
        for module in model.modules():
            if isinstance(module, Codebook):
                module.reread()
        return (model, info) if output_loading_info else model

    def init_weights(self) -> None:
        """Tie what is to be tied: every layer has drawn its numbers when it was made, each in its own way."""
        self.tie_weights()

    def _init_weights(self, module: nn.Module) -> None:
        """Draw the embedding that `resize_token_embeddings` adds, as `SequenceEncoder` does; nothing else."""
        if isinstance(module, nn.Embedding) and not getattr(module.weight, "_is_hf_initialized", False):
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)

    @torch.no_grad()
    def _draw(self, missing: set[str]) -> None:
        """Give the tensors that a checkpoint lacked the values that a new model has there."""
        if missing:
            own, new = self.state_dict(), type(self)(self.config).state_dict()
            for name in missing:
                own[name].copy_(new[name])

    def _set_gradient_checkpointing(self, *args, **kwargs) -> None:
        function = kwargs.get("gradient_checkpointing_func")
        if getattr(function, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                f"{type(self).__name__}: gradient checkpointing needs use_reentrant=False, got True, under which the "
                "commitment loss would have no gradient"
            )
        super()._set_gradient_checkpointing(*args, **kwargs)


class LongVQModel(LongVQPreTrainedModel):
    """Tokens to hidden states: a `SequenceEncoder` as a Hugging Face model.

    Args:
        config: `LongVQConfig`.

    Raises:
        ValueError, TypeError: sizes out of range, unknown options.

    Example:
        >>> model = LongVQModel(LongVQConfig(hidden_size=32, num_hidden_layers=2))
        >>> model(torch.randint(256, (2, 50))).last_hidden_state.shape
        torch.Size([2, 50, 32])
    """

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

    def get_input_embeddings(self) -> nn.Embedding:
        return self.encoder.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.encoder.embedding = value
        self.encoder.num_inputs = value.num_embeddings

    def streams(self) -> bool:
        """Whether the past fits into a state of constant size: `use_cache=True` works, and `generate` uses it."""
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
    ) -> BaseModelOutputWithPast | tuple:
        """Run the encoder.

        Args:
            input_ids: (B, L) int64 or int32; or
            inputs_embeds: (B, L, hidden_size), dtype of the model.
            attention_mask: (B, L), 1 = keep, 0 = padding, on either side and, causal, between tokens; with a cache it
                may also cover the past, (B, past + L). Default all 1.
            past_key_values, cache: two names of what came before, updated in place. Inference only: eval mode, no
                gradients.
            use_cache: return a cache; default only when one is given.
            cu_seqlens: (documents + 1,) int32, offsets of documents packed into one row (B = 1).
            output_hidden_states: also return the embeddings and what every block made of them, the last one normed;
                default that of the config.
            output_attentions: must not be True: attention weights are never formed.
            return_dict: False for a tuple; default that of the config.

        Returns:
            `BaseModelOutputWithPast`: last_hidden_state (B, L, hidden_size), 0 at padding; cache (past_key_values in
            transformers before 5.24); hidden_states.

        Raises:
            ValueError, TypeError: wrong shapes or dtypes, or a mask that says other things about the past than before.
            NotImplementedError: a cache with blocks that need all their past, or gradients with a cache.
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
        batch, length, _ = x.shape
        cache = self._cache(cache_name.given(name, past_key_values, cache), use_cache, cu_seqlens, batch)
        mask = _key_padding_mask(name, attention_mask, x, cache)
        collect = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden: list[Tensor] | None = [] if collect else None
        if cache is None:
            y = self._forward(x, mask, cu_seqlens, hidden)
        else:
            y, state = self.encoder.backbone.step(x, cache.state, mask, hidden=hidden)
            cache.advance(state, mask, length)
        output = BaseModelOutputWithPast(
            last_hidden_state=y, hidden_states=None if hidden is None else (*hidden, y), **{cache_name.NAME: cache}
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _forward(
        self, x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, hidden: list[Tensor] | None
    ) -> Tensor:
        # Causal, padding takes no position, also between tokens: as with a cache.
        gaps = None if mask is None or cu_seqlens is not None or not self.config.causal else order_without_gaps(mask)
        if gaps is not None:
            x, mask = reorder(x, gaps), mask.gather(1, gaps)
        y = self.encoder.backbone(self.encoder.dropout(x), mask, cu_seqlens=cu_seqlens, hidden=hidden)
        if gaps is not None:
            y = put_back(y, gaps)
            if hidden is not None:
                hidden[:] = [put_back(state, gaps) for state in hidden]
        return y

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        name = type(self).__name__
        if input_ids is None:
            check.tensor(name, "inputs_embeds", inputs_embeds, "B L hidden_size")
            return inputs_embeds
        check.tensor(name, "input_ids", input_ids, "B L")
        if input_ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name}: input_ids must be int64 or int32, got {input_ids.dtype}")
        return self.encoder.embedding(input_ids)

    def _cache(
        self, cache: LongVQCache | None, use_cache: bool | None, cu_seqlens: Tensor | None, batch: int
    ) -> LongVQCache | None:
        """The cache to go on with, filled with a first state where it is empty; None without one."""
        name = type(self).__name__
        if cache is None and not use_cache:
            return None
        if cu_seqlens is not None:
            raise NotImplementedError(f"{name}: cu_seqlens can't be used with a cache, whose rows are the documents")
        if cache is None:
            cache = LongVQCache()
        if not isinstance(cache, LongVQCache):
            raise TypeError(f"{name}: cache must be a LongVQCache, got {type(cache).__name__}")
        if use_cache is False:
            raise ValueError(f"{name}: use_cache must not be False with a cache, which is updated in place")
        if self.training:
            raise RuntimeError(f"{name}: a cache needs eval mode, for in training mode the codebook moves; call eval()")
        if cache.state is None:
            cache.state = self.encoder.initial_state(batch)
            cache.lengths = torch.zeros(batch, dtype=torch.int64, device=self.encoder.embedding.weight.device)
        if cache.batch_size != batch:
            raise ValueError(
                f"{name}: cache must have the {batch} rows of the input, got {cache.batch_size}; for several "
                "beams or return sequences call its batch_repeat_interleave first"
            )
        return cache


def _key_padding_mask(name: str, attention_mask: Tensor | None, x: Tensor, cache: LongVQCache | None) -> Tensor | None:
    """(B, L) bool, True = ignore, of the positions of x (B, L, ...), from a mask that may cover the past as well."""
    if attention_mask is None:
        return None
    batch, length, _ = x.shape
    past = 0 if cache is None else cache.get_seq_length()
    check.tensor(name, "attention_mask", attention_mask, "B L")
    if attention_mask.shape not in ((batch, length), (batch, past + length)):
        shapes = f"({batch}, {length})" + (f" or, with the past, ({batch}, {past + length})" if past else "")
        raise ValueError(f"{name}: attention_mask must have shape (B, L) = {shapes}, got {tuple(attention_mask.shape)}")
    if past and attention_mask.shape[1] > length and not torch.compiler.is_compiling():
        read = (attention_mask[:, :past] != 0).sum(1)
        if not torch.equal(read, cache.lengths):
            raise ValueError(
                f"{name}: attention_mask must agree with what the cache has read, {cache.lengths.tolist()} "
                f"tokens a row, got {read.tolist()} in its first {past} columns; tokens can't be taken back"
            )
    return attention_mask[:, attention_mask.shape[1] - length :] == 0
