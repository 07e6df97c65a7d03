"""Finds, swaps and puts back the attention modules of transformers models."""

from torch import nn

from longvq_layers.replace.adapters.base import Site
from longvq_layers.replace.adapters.huggingface import record, rotary, support
from longvq_layers.replace.slot.attention_slot import OriginalAttention


class HuggingFaceAdapter:
    """The `Adapter` of modules that use transformers' attention interface."""

    model_makes_masks = True
    is_replaced = staticmethod(record.is_replaced)
    clamped_rotary = staticmethod(rotary.clamped_rotary)
    plan_record = staticmethod(record.plan_record)

    def find(self, model: nn.Module) -> list[Site]:
        """Every module whose forward finds its attention function in transformers' attention interface."""
        return [self._site(name, module) for name, module in model.named_modules() if support.takes_part(module)]

    def original_attention(self, module: nn.Module) -> OriginalAttention:
        """The attention function that this module calls without a replacement."""
        scope = support.forward_of(module).__globals__
        name = support.config_of(module)._attn_implementation
        name = "sdpa" if name == support.IMPLEMENTATION else name
        function: OriginalAttention = scope["ALL_ATTENTION_FUNCTIONS"].get_interface(
            name, scope.get("eager_attention_forward")
        )
        return function

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
