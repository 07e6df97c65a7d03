"""Finds, swaps and puts back torch.nn.MultiheadAttention."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from longvq_layers.replace.adapters.base import CROSS_ATTENTION, DROPOUT_NOTE, Site, own_forward
from longvq_layers.replace.adapters.torch_nn.attention import VQMultiheadAttention
from longvq_layers.replace.slot.attention_slot import AttentionSlot, fill_slot, remove_slot

_NESTED = "_longvq_use_nested_tensor"  # attribute in which a changed nn.TransformerEncoder keeps its own value


@dataclass(frozen=True, eq=False)
class TorchRecord:
    """The modules whose class is changed, and the encoders that must not make nested tensors until `undo`."""

    attached: tuple[nn.MultiheadAttention, ...]
    encoders: tuple[nn.TransformerEncoder, ...]

    def install(self, slots: Sequence[AttentionSlot]) -> None:
        """Give each module its slot and our forward; parameters, hooks, dtype, device and mode stay."""
        for module, slot in zip(self.attached, slots, strict=True):
            fill_slot(module, slot)
            module.__class__ = VQMultiheadAttention
        for encoder in self.encoders:
            encoder.__dict__.setdefault(_NESTED, encoder.use_nested_tensor)
            encoder.use_nested_tensor = False  # else evaluation with padding hands nested tensors to its layers

    def undo(self) -> None:
        """Put everything back."""
        for module in self.attached:
            module.__class__ = nn.MultiheadAttention
            remove_slot(module)
        for encoder in self.encoders:
            if _NESTED in encoder.__dict__ and not any(map(TORCH_NN.is_replaced, encoder.modules())):
                encoder.use_nested_tensor = encoder.__dict__.pop(_NESTED)


class TorchAdapter:
    """The `Adapter` of nn.MultiheadAttention."""

    model_makes_masks = False

    def find(self, model: nn.Module) -> list[Site]:
        """Every nn.MultiheadAttention of the model."""
        parents = {id(child): module for module in model.modules() for child in module.children()}
        return [
            self._site(name, module, parents.get(id(module)))
            for name, module in model.named_modules()
            if isinstance(module, nn.MultiheadAttention)
        ]

    def is_replaced(self, module: nn.Module) -> bool:
        """Whether this is an nn.MultiheadAttention whose attention is replaced."""
        return isinstance(module, VQMultiheadAttention)

    def original_attention(self, module: nn.Module) -> None:
        """None: the slot computes attention to every key from the projections."""

    def clamped_rotary(self, model: nn.Module, site: Site, window: int) -> str:
        """Always a reason: nn.MultiheadAttention has no positions."""
        return "nn.MultiheadAttention has no rotary positions"

    def plan_record(self, model: nn.Module, sites: Sequence[Site], *, linear_masks: bool) -> TorchRecord:
        """The record of these sites; `linear_masks` has no effect, because masks come with each call."""
        attached = [site.module for site in sites if isinstance(site.module, nn.MultiheadAttention)]
        replaced = {id(module) for module in attached}
        encoders = [
            module
            for module in model.modules()
            if isinstance(module, nn.TransformerEncoder)
            and any(id(child) in replaced or self.is_replaced(child) for child in module.modules())
        ]
        return TorchRecord(tuple(attached), tuple(encoders))

    def _site(self, name: str, module: nn.MultiheadAttention, parent: nn.Module | None) -> Site:
        return Site(
            name=name,
            module=module,
            adapter=self,
            kind=type(module).__name__,
            new_kind=VQMultiheadAttention.__name__,
            causal="per call",
            sizes=(module.num_heads, module.num_heads, module.head_dim),
            refusal=_refusal(module, parent),
            notes=(DROPOUT_NOTE,) if module.dropout > 0 else (),
        )


TORCH_NN = TorchAdapter()


def _refusal(module: nn.MultiheadAttention, parent: nn.Module | None) -> str | None:
    if type(module) not in (nn.MultiheadAttention, VQMultiheadAttention):
        return f"{type(module).__name__} is a subclass of nn.MultiheadAttention with a forward of its own"
    if isinstance(parent, nn.TransformerDecoderLayer) and module is parent.multihead_attn:
        return CROSS_ATTENTION
    if module.kdim != module.embed_dim:
        return f"cross-attention: kdim {module.kdim} differs from embed_dim {module.embed_dim}"
    if (reason := own_forward(module)) is not None:
        return reason
    if module.bias_k is not None:
        return "add_bias_kv=True: an extra learned key without a position"
    if module.add_zero_attn:
        return "add_zero_attn=True: an extra zero key without a position"
    return None
