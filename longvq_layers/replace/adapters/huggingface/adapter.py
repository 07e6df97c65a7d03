"""Finds, swaps and puts back the attention modules of transformers models."""

from collections.abc import Sequence

from torch import nn

from longvq_layers.replace.adapters.base import Site
from longvq_layers.replace.adapters.huggingface import record, support
from longvq_layers.replace.adapters.huggingface.rotary import clamped_rotary
from longvq_layers.replace.slot.attention_slot import OriginalAttention
from longvq_layers.replace.slot.clamped_rotary import ClampedRotary


class HuggingFaceAdapter:
    """The `Adapter` of modules that use transformers' attention interface."""

    model_makes_masks = True

    def find(self, model: nn.Module) -> list[Site]:
        """Every module whose forward finds its attention function in transformers' attention interface."""
        return [self._site(name, module) for name, module in model.named_modules() if support.takes_part(module)]

    def is_replaced(self, module: nn.Module) -> bool:
        """Whether this is a transformers attention module whose attention is replaced."""
        return record.is_replaced(module)

    def original_attention(self, module: nn.Module) -> OriginalAttention:
        """The attention function that this module calls without a replacement."""
        scope = support.forward_of(module).__globals__
        name = support.config_of(module)._attn_implementation
        name = "sdpa" if name == support.IMPLEMENTATION else name
        function: OriginalAttention = scope["ALL_ATTENTION_FUNCTIONS"].get_interface(
            name, scope.get("eager_attention_forward")
        )
        return function

    def clamped_rotary(self, model: nn.Module, site: Site, window: int) -> ClampedRotary | str:
        """The site's own rotation, clamped to the window, or why there is none."""
        return clamped_rotary(model, site.name, site.module, window)

    def plan_record(self, model: nn.Module, sites: Sequence[Site], *, linear_masks: bool) -> record.HuggingFaceRecord:
        """The record of these sites."""
        return record.plan_record(model, [site.module for site in sites], linear_masks=linear_masks)

    def _site(self, name: str, module: nn.Module) -> Site:
        kind = type(module).__name__
        return Site(
            name=name,
            module=module,
            adapter=self,
            kind=f"{kind}[{support.config_of(module)._attn_implementation}]",
            new_kind=f"{kind}[{support.IMPLEMENTATION}]",
            causal="yes" if getattr(module, "is_causal", True) else "no",
            sizes=support.sizes(module),
            refusal=support.refusal(name, module),
            has_rotary=support.has_rotary(module),
            trained_length=support.trained_length(module),
            notes=support.notes(module),
        )


HUGGING_FACE = HuggingFaceAdapter()
