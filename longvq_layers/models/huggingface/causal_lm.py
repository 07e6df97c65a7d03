"""A Hugging Face language model that generates in constant memory."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from longvq_layers import _checks as check
from longvq_layers.layers.commitment import commitment_loss
from longvq_layers.models.huggingface import cache_name
from longvq_layers.models.huggingface.cache import LongVQCache
from longvq_layers.models.huggingface.configuration import LongVQConfig
from longvq_layers.models.huggingface.modeling import LongVQModel, LongVQModelWithHead

_IGNORED = -100  # a label without loss


class LongVQForCausalLM(LongVQModelWithHead, GenerationMixin):
    """A `LongVQModel` and a linear layer to the vocabulary, at every position.

    `generate` uses a `LongVQCache`, whose memory doesn't grow, if the blocks have a state of constant size
    (`model.model.streams()`). Other blocks ("transformer", "longvq" with num_codes=None, "mega" without a chunk) run
    over the whole sequence for every token, as with use_cache=False.

    Args:
        config: `LongVQConfig` with causal=True.

    Raises:
        ValueError, TypeError: causal=False, sizes out of range, unknown options.

    Example:
        >>> model = LongVQForCausalLM(LongVQConfig(hidden_size=32, num_hidden_layers=2, causal=True)).eval()
        >>> tokens = torch.randint(256, (2, 50))
        >>> model.generate(tokens, max_new_tokens=10, do_sample=False).shape
        torch.Size([2, 60])
    """

    accepts_loss_kwargs = True  # Trainer may pass num_items_in_batch
    _is_stateful = True  # generate refuses assisted decoding then
    _tied_weights_keys = {"lm_head.weight": "model.encoder.embedding.weight"}  # noqa: RUF012, transformers' interface

    def __init__(self, config: LongVQConfig) -> None:
        if not config.causal:
            raise ValueError("LongVQForCausalLM: config.causal must be True, got False, which shows it the future")
        super().__init__(config)
        self.model = LongVQModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: LongVQCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        cache: LongVQCache | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Predict the next token at every position.

        Args:
            labels: (B, L) int64, the tokens of the input: `forward` shifts them. A label of -100 has no loss. With
                `cu_seqlens` the first token of a document is not predicted. In training mode the loss includes the
                commitment loss of the codebooks.
            logits_to_keep: number of last positions that get logits, or indices (N,) of positions; default 0 = all.
            num_items_in_batch: number of predicted labels over which the loss is averaged, if a step has several
                batches; default the number in this batch.
            others: see `LongVQModel`.

        Returns:
            `CausalLMOutputWithPast`: loss if there are labels, logits (B, L, vocab_size), cache (past_key_values in
            transformers before 5.24), hidden_states.
        """
        encoded = self.model(
            input_ids,
            attention_mask,
            inputs_embeds,
            past_key_values,
            use_cache,
            cu_seqlens,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            cache=cache,
        )
        hidden = encoded.last_hidden_state
        loss = None
        if labels is None:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, kept])
        else:
            if not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
                raise ValueError("LongVQForCausalLM: logits_to_keep must be 0, all positions, with labels")
            check.tensor("LongVQForCausalLM", "labels", labels, "B L")
            check.size("LongVQForCausalLM", "labels", labels, tuple(hidden.shape[:2]), "B L")
            if labels.dtype != torch.int64:
                raise TypeError(f"LongVQForCausalLM: labels must be int64, got {labels.dtype}")
            logits = self.lm_head(hidden)
            loss = self._loss(logits, labels, cu_seqlens, num_items_in_batch)
        past = {cache_name.NAME: getattr(encoded, cache_name.NAME)}
        return self._returned(
            CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=encoded.hidden_states, **past), return_dict
        )

    def _loss(
        self, logits: Tensor, labels: Tensor, cu_seqlens: Tensor | None, num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        if cu_seqlens is not None:
            position = torch.arange(labels.shape[1], device=labels.device)
            labels = labels.masked_fill(torch.isin(position, cu_seqlens.to(labels.device)), _IGNORED)
        own = (labels[:, 1:] != _IGNORED).sum().clamp(min=1)  # at least 1: a batch without predictions has loss 0
        items = own if num_items_in_batch is None else num_items_in_batch
        loss = self.loss_function(
            logits=logits, labels=labels, vocab_size=self.config.vocab_size, num_items_in_batch=items
        )
        if not self.training:
            return loss
        # The commitment loss counts once per step: if a step sums over batches, each batch adds its share.
        return loss + commitment_loss(self) * (own / items)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but RuntimeError in training mode, in which each forward changes the codebooks."""
        if self.training:
            raise RuntimeError(
                "LongVQForCausalLM.generate: the model must be in eval mode, got training mode; call eval() first"
            )
        return super().generate(*args, **cache_name.renamed("LongVQForCausalLM.generate", kwargs))

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: LongVQCache | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        cache: LongVQCache | None = None,
        **kwargs: Any,
    ) -> dict:
        """The keyword arguments with which `generate` calls the model."""
        past = cache_name.given("LongVQForCausalLM.prepare_inputs_for_generation", past_key_values, cache)
        if is_first_iteration and next_sequence_length is not None and next_sequence_length < 1:
            read = 0 if past is None else past.get_seq_length()
            raise ValueError(
                f"LongVQForCausalLM.generate: input_ids must continue after the {read} positions in the cache, got "
                f"{input_ids.shape[1]}; pass the whole sequence, or the new tokens and an attention_mask for the whole"
            )
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **{cache_name.NAME: past},
            **kwargs,
        )
        if past is not None and not is_first_iteration:
            inputs.pop("attention_mask", None)  # new tokens aren't padding, and the cache knows the past
        return inputs

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(  # type: ignore[override]  # its result differs between versions and isn't used
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        name = "LongVQForCausalLM.generate"
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"{name}: cache_implementation must be None, got {generation_config.cache_implementation!r}; the cache "
                "is a LongVQCache"
            )
        if getattr(generation_config, "is_assistant", False):
            raise NotImplementedError(
                f"{name}: the model can't be an assistant, which takes tokens back out of the cache"
            )
        if model_kwargs.get(cache_name.NAME) is not None or generation_config.use_cache is False:
            return
        if self.model.streams():
            model_kwargs[cache_name.NAME] = LongVQCache()
        elif model_kwargs.get("inputs_embeds") is not None:
            raise NotImplementedError(
                f"{name}: inputs_embeds must be None without a cache, which blocks that need their whole past don't "
                "have; pass input_ids"
            )
        else:
            generation_config.use_cache = False  # the whole sequence for every token
