"""Registers adapter functions; finds, swaps and puts back modules of the registered classes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from longvq_layers import _checks as check
from longvq_layers.replace.adapters.base import Site, own_forward
from longvq_layers.replace.adapters.custom import registry
from longvq_layers.replace.adapters.custom.forward import (
    SwappedModule,
    original_class,
    swapped_class,
    swapped_class_of,
)
from longvq_layers.replace.slot.attention_slot import SLOT, AttentionSlot, fill_slot, remove_slot


def register_adapter(
    cls: type[nn.Module],
    adapter: Callable[..., object],
    *,
    sizes: Callable[[nn.Module], tuple[int, int, int]] | None = None,
    check: bool = True,
) -> None:
    """Let `replace_attention` replace attention modules of class `cls`, in every model.

    Args:
        cls: the class. Subclasses that inherit its forward are replaced too.
        adapter: ``adapter(module, attend, *args, **kwargs)`` replaces ``module(*args, **kwargs)``. It computes q
            (B, H, L, D), k (B, Hkv, L, D) and v (B, Hkv, L, E) as the module does, and calls ``attend(q, k, v,
            causal=False, key_padding_mask=None, scale=None)``, which returns the attention output (B, H, L, E). From
            this output it computes the result of the module, and returns it. key_padding_mask is (B, L) bool, True =
            ignore; scale None means D ** -0.5.
        sizes: ``sizes(module)`` is (H, Hkv, D). Only needed for models that start without calibration. Default none.
        check: True (default) makes calibration compare the first tensor that the adapter returns, with attention to
            every key, with the first tensor that the module itself returns. A difference raises ValueError, because a
            wrong mask, scale or projection would go unnoticed otherwise. The comparison runs both once more without
            padding and once more with padding. With padding, the output must begin with batch and length in some order,
            or with both in one axis; other outputs aren't compared. False for a module that attends to fewer keys on
            purpose.

    Raises:
        TypeError: cls isn't a class of modules, adapter or sizes can't be called, check isn't a bool.

    Example:
        >>> import torch
        >>> class MyAttention(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.qkv, self.out = torch.nn.Linear(32, 96), torch.nn.Linear(32, 32)
        ...     def forward(self, x):
        ...         q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        ...         y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        ...         return self.out(y.transpose(1, 2).flatten(2))
        >>> def adapter(module, attend, x):
        ...     q, k, v = module.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        ...     return module.out(attend(q, k, v).transpose(1, 2).flatten(2))
        >>> register_adapter(MyAttention, adapter)
        >>> from longvq_layers import replace_attention
        >>> model, x = torch.nn.Sequential(MyAttention(), MyAttention()).eval(), torch.randn(2, 100, 32)
        >>> len(replace_attention(model, num_codes=16, window=8, calibration=[x]).replaced)
        2
    """
    _check_arguments(cls, adapter, sizes, check)
    registry.register(cls, registry.Registered(adapter, sizes, check, swapped_class(cls)))


def _check_arguments(cls: object, adapter: object, sizes: object, compare: object) -> None:
    name = "register_adapter"
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"{name}: cls must be a class of torch.nn.Module, got {cls!r}")
    check.function(name, "adapter", adapter, optional=False)
    check.function(name, "sizes", sizes)
    check.flags(name, check=compare)


@dataclass(frozen=True, eq=False)
class CustomRecord:
    """The modules whose class is changed."""

    attached: tuple[nn.Module, ...]

    def install(self, slots: Sequence[AttentionSlot]) -> None:
        """Give each module its slot and the adapter's forward."""
        for module, slot in zip(self.attached, slots, strict=True):
            cls = registry.registered_class(type(module))
            if cls is not None:
                fill_slot(module, slot)
                module.__class__ = swapped_class_of(type(module), cls)

    def undo(self) -> None:
        """Put everything back."""
        for module in self.attached:
            module.__class__ = original_class(module)
            remove_slot(module)


class CustomAdapter:
    """The `Adapter` of registered classes."""

    model_makes_masks = False

    def find(self, model: nn.Module) -> list[Site]:
        """Every module of a registered class."""
        sites = []
        for name, module in model.named_modules():
            cls = registry.registered_class(original_class(module))
            if cls is not None:
                sites.append(self._site(name, module, registry.entry_of(cls)))
        return sites

    def is_replaced(self, module: nn.Module) -> bool:
        """Whether this is a module of a registered class whose attention is replaced."""
        return isinstance(module, SwappedModule)

    def original_attention(self, module: nn.Module) -> None:
        """None: the slot computes attention to every key from queries, keys and values."""

    def clamped_rotary(self, model: nn.Module, site: Site, window: int) -> str:
        """Always a reason: the adapter function gives queries and keys only with their positions."""
        return "a registered adapter gives queries and keys with their positions"

    def plan_record(self, model: nn.Module, sites: Sequence[Site], *, linear_masks: bool) -> CustomRecord:
        """The record of these sites; `linear_masks` has no effect, because masks come with each call."""
        return CustomRecord(tuple(site.module for site in sites))

    def _site(self, name: str, module: nn.Module, entry: registry.Registered) -> Site:
        kind = type(module).__name__
        return Site(
            name=name,
            module=module,
            adapter=self,
            kind=kind,
            new_kind=f"{kind}[{SLOT}]",
            causal="per call",
            sizes=None if entry.sizes is None else _checked_sizes(kind, entry.sizes(module)),
            refusal=own_forward(module),
        )


CUSTOM = CustomAdapter()


def _checked_sizes(kind: str, sizes: object) -> tuple[int, int, int]:
    if not (isinstance(sizes, tuple | list) and len(sizes) == 3 and all(type(n) is int and n > 0 for n in sizes)):
        raise ValueError(f"register_adapter: sizes must return (H, Hkv, D), three ints, got {sizes!r} for a {kind}")
    heads, kv_heads, head_dim = sizes
    return heads, kv_heads, head_dim
