"""Finds the attention modules of a model, puts slots into them, and takes the slots out again."""

import contextlib
import copy
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from longvq_layers import _checks as check
from longvq_layers.replace.adapters.base import Adapter, Record, Site
from longvq_layers.replace.adapters.custom.adapter import CUSTOM
from longvq_layers.replace.adapters.huggingface.adapter import HUGGING_FACE
from longvq_layers.replace.adapters.torch_nn.adapter import TORCH_NN
from longvq_layers.replace.model_inputs import ModelInputs, run_in_eval
from longvq_layers.replace.plan import SwapPlan, device_and_dtype
from longvq_layers.replace.slot.attention_slot import AttentionSlot
from longvq_layers.replace.slot.swapped import SwappedAttention

ADAPTERS: tuple[Adapter, ...] = (CUSTOM, HUGGING_FACE, TORCH_NN)  # the first that knows a module gets it
_REPLACEMENTS = "_longvq_replacement"  # attribute of a replaced model: what is needed to undo it
DENSE_MASKS = "the model keeps making its dense L x L masks, which every call verifies: their memory is quadratic"


class Replacement:
    """What one call of `replace_attention` changed. The model keeps it, so that deep copies carry their own.

    Args:
        records: what each adapter changed, in the order of the changes.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self._records = list(records)

    @property
    def records(self) -> tuple[Record, ...]:
        """The records, in the order of the changes."""
        return tuple(self._records)

    def add(self, record: Record) -> None:
        """Add a later change, so that it is undone with the others."""
        self._records.append(record)

    def register_on(self, model: nn.Module) -> None:
        """Store in `model` that this replacement changed it."""
        model.__dict__.setdefault(_REPLACEMENTS, []).append(self)

    def is_active_on(self, model: nn.Module) -> bool:
        """Whether this replacement changed `model` and was not undone yet."""
        return self in model.__dict__.get(_REPLACEMENTS, [])

    def undo_in(self, model: nn.Module) -> None:
        """Put back everything that this replacement changed in `model`, and nothing else.

        Raises:
            ValueError: it was undone before.
        """
        if not self.is_active_on(model):
            raise ValueError("restore: the report must be of an active replacement, got one that was restored already")
        active = model.__dict__[_REPLACEMENTS]
        active.remove(self)
        if not active:
            del model.__dict__[_REPLACEMENTS]
        undo(self._records)


def restore_attention(model: nn.Module) -> None:
    """Put the original attention back: the same objects as before, bit-identical outputs.

    Works on the model that was replaced, on a model that contains it, and on deep copies.

    Args:
        model: the model given to `replace_attention`, or one that contains it.

    Raises:
        TypeError: model is no module.
        ValueError: nothing in this model is replaced.

    Example:
        >>> import torch
        >>> from longvq_layers import replace_attention
        >>> layer = torch.nn.TransformerEncoderLayer(32, 4, batch_first=True)
        >>> _ = replace_attention(layer, num_codes=16)
        >>> restore_attention(layer)
        >>> type(layer.self_attn)
        <class 'torch.nn.modules.activation.MultiheadAttention'>
    """
    check.module("restore_attention", "model", model)
    replaced = [module for module in model.modules() if _REPLACEMENTS in module.__dict__]
    if not replaced:
        raise ValueError(
            "restore_attention: model must be the one that was given to replace_attention, or one that contains it, "
            "got a model in which nothing is replaced"
        )
    for module in replaced:
        for replacement in reversed(module.__dict__.pop(_REPLACEMENTS)):
            undo(replacement.records)


def replacement_of(model: nn.Module, attention: nn.Module) -> Replacement | None:
    """The replacement that changed this attention module, or None if `model` doesn't know it."""
    for module in model.modules():
        replacements: list[Replacement] = module.__dict__.get(_REPLACEMENTS, [])
        for replacement in replacements:
            for record in replacement.records:
                if any(attention is attached for attached in record.attached):
                    return replacement
    return None


def find_sites(model: nn.Module) -> list[Site]:
    """Every attention module that some adapter knows, in the order of the model."""
    found: dict[str, Site] = {}
    for adapter in ADAPTERS:
        for site in adapter.find(model):
            found.setdefault(site.name, site)
    return [found[name] for name, _ in model.named_modules() if name in found]


def make_slot(plan: SwapPlan, sizes: tuple[int, int, int]) -> SwappedAttention:
    """A swapped attention as planned, with random codes; `sizes` are (H, Hkv, D)."""
    device, dtype = device_and_dtype(plan.site.module)
    options = plan.options
    # Ordinary tensors even in a caller's inference mode, so that they can be trained later. The generator is forked
    # because a new codebook draws random codes, and the caller's generator must stay as it is.
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        slot = SwappedAttention(
            *sizes,
            num_codes=options.num_codes,
            window=options.window,
            local_keys=options.local_keys,
            variance_correction=options.variance_correction,
            rotary=copy.deepcopy(plan.rotary),
            trained_length=plan.trained_length,
            backend=options.backend,
            dtype=dtype,
        )
        return slot.to(device)


def install(
    model: nn.Module,
    sites: Sequence[Site],
    slots: Sequence[AttentionSlot],
    records: list[Record],
    *,
    linear_masks: bool,
) -> None:
    """Put one slot into each site. Each record is added to `records` before it changes anything."""
    for adapter in ADAPTERS:
        chosen = [(site, slot) for site, slot in zip(sites, slots, strict=True) if site.adapter is adapter]
        if chosen:
            record = adapter.plan_record(model, [site for site, _ in chosen], linear_masks=linear_masks)
            records.append(record)
            record.install([slot for _, slot in chosen])


def install_and_verify(
    model: nn.Module,
    plans: Sequence[SwapPlan],
    slots: Sequence[SwappedAttention],
    batches: Sequence[ModelInputs],
) -> tuple[Replacement, list[SwapPlan]]:
    """Put one slot into each planned site, and run the first batch, if there is one. An error undoes all changes.

    The first try lets transformers models make masks of linear size. If this batch needs masks that are more than
    causal and padding, a second try leaves the dense masks, and each call verifies them.

    Returns:
        the replacement, and the plans with a note where masks stay dense.
    """
    sites = [plan.site for plan in plans]
    for linear_masks in (True, False):
        for slot in slots:
            slot.linear_masks = linear_masks
        with undo_on_error() as records:
            install(model, sites, slots, records, linear_masks=linear_masks)
            try:
                run_in_eval(model, batches[:1])
                break
            except NotImplementedError:
                if not linear_masks:
                    raise
                undo(records)
    if not linear_masks or _has_other_replacement(model, sites):
        plans = [plan.with_notes(DENSE_MASKS) if plan.site.adapter.model_makes_masks else plan for plan in plans]
    return Replacement(records), list(plans)


def _has_other_replacement(model: nn.Module, sites: Sequence[Site]) -> bool:
    """Whether the model has an earlier replacement as well. Two replacements can't share masks."""
    ours = {id(site.module) for site in sites}
    mask_makers = [adapter for adapter in ADAPTERS if adapter.model_makes_masks]
    others = (module for module in model.modules() if id(module) not in ours)
    return any(adapter.is_replaced(module) for module in others for adapter in mask_makers)


def undo(records: Sequence[Record]) -> None:
    """Put everything back, the last change first."""
    for record in reversed(records):
        record.undo()


@contextlib.contextmanager
def undo_on_error() -> Iterator[list[Record]]:
    """A list of records that are undone if the block raises."""
    records: list[Record] = []
    try:
        yield records
    except BaseException:
        undo(records)
        raise
