"""A Hugging Face classifier of sequences."""

from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from longvq_layers import _checks as check
from longvq_layers.layers.commitment import commitment_loss
from longvq_layers.models.huggingface.configuration import LongVQConfig
from longvq_layers.models.huggingface.modeling import LongVQModel, LongVQModelWithHead
from longvq_layers.models.sequence import POOLINGS, pool


class LongVQForSequenceClassification(LongVQModelWithHead):
    """A `LongVQModel`, the mean over unmasked positions (or the last of them), and a linear layer to `num_labels`.

    Args:
        config: `LongVQConfig` with num_labels (default 2) and problem_type (default: the labels decide).

    Raises:
        ValueError, TypeError: sizes out of range, unknown options.

    Example:
        >>> import torch
        >>> model = LongVQForSequenceClassification(LongVQConfig(hidden_size=32, num_hidden_layers=2, num_labels=3))
        >>> output = model(torch.randint(256, (2, 50)), labels=torch.tensor([0, 2]))
        >>> output.logits.shape, output.loss.shape
        (torch.Size([2, 3]), torch.Size([]))
    """

    # The loss is a mean over the batch, so Trainer should not pass num_items_in_batch.
    accepts_loss_kwargs = False

    def __init__(self, config: LongVQConfig) -> None:
        check.one_of("LongVQForSequenceClassification", "pooling", config.pooling, POOLINGS)
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = LongVQModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels)  # type: ignore[arg-type]  # never None
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """Classify.

        Args:
            labels: (B,) int64 for one label per row; (B, num_labels) float for several labels per row; (B,) float, or
                any dtype with num_labels=1, for regression. In training mode the loss includes the commitment loss of
                the codebooks.
            others: see `LongVQModel`.

        Returns:
            `SequenceClassifierOutput`: loss if there are labels, logits (B, num_labels), hidden_states.
        """
        encoded = self.model(
            input_ids,
            attention_mask,
            inputs_embeds,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        mask = None if attention_mask is None else attention_mask == 0
        logits = self.score(pool(encoded.last_hidden_state, mask, self.config.pooling))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits.float(), config=self.config)
            if self.training:
                loss = loss + commitment_loss(self)
        output = SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=encoded.hidden_states)
        return self._returned(output, return_dict)
