"""Putting swapped attention into a model and taking it out again, whichever adapters that takes."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from longvq_layers.replace.adapters.base import Site
from longvq_layers.replace.adapters.custom import adapter as custom
from longvq_layers.replace.adapters.huggingface import adapter as huggingface
from longvq_layers.replace.adapters.torch_nn import adapter as torch_nn

_ADAPTERS = (custom, huggingface, torch_nn)  # a module belongs to the first that knows it
_RECORD = "_longvq_replacement"  # where a replaced model keeps what is needed to undo it


def find_sites(model: nn.Module) -> list[Site]:
    """Every attention module that some adapter knows, in the order of the model."""
    found: dict[str, Site] = {}
    for adapter in _ADAPTERS:
        for site in adapter.find(model):
            found.setdefault(site.name, site)
    return [found[name] for name, _ in model.named_modules() if name in found]


def restore_attention(model: nn.Module) -> None:
    """Put the original attention back: the same objects as before, bit-identical outputs.

    Works on the model that was replaced, on a model that contains it, and on deep copies.

    Args:
        model: the model given to `replace_attention`, or one that contains it.

    Raises:
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
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore_attention: model: got {type(model).__name__}, expected a torch.nn.Module")
    replaced = [module for module in model.modules() if _RECORD in module.__dict__]
    if not replaced:
        raise ValueError(
            "restore_attention: model: nothing is replaced here; pass the model that was given to replace_attention, "
            "or one that contains it"
        )
    for module in replaced:
        undo(module.__dict__.pop(_RECORD))


@dataclass(eq=False)
class Replacement:
    """What one call of `replace_attention` changed; lives in the model, so that deep copies carry their own."""

    records: list = field(default_factory=list)

    def undo(self) -> None:
        """Put everything back that this call changed, and nothing else."""
        undo(self.records)

    def stand_in(self, model: nn.Module) -> None:
        """Note in `model` that this is what changed it."""
        model.__dict__.setdefault(_RECORD, []).append(self)

    def stands_in(self, model: nn.Module) -> bool:
        """Whether it is what changed `model`, and not undone yet."""
        return self in model.__dict__.get(_RECORD, [])

    def undo_in(self, model: nn.Module) -> None:
        """`undo`, once.

        Raises:
            ValueError: it was undone before.
        """
        if not self.stands_in(model):
            raise ValueError("restore: this replacement was restored already")
        standing = model.__dict__[_RECORD]
        standing.remove(self)
        if not standing:
            del model.__dict__[_RECORD]
        self.undo()


def replacement_of(model: nn.Module, site: nn.Module) -> Replacement | None:
    """What changed that attention module, if `model` or a part of it knows."""
    for module in model.modules():
        for replacement in module.__dict__.get(_RECORD, []):
            for record in replacement.records:
                if any(site is attached for attached in getattr(record, "attached", [])):
                    return replacement
    return None


def install(model: nn.Module, sites: list[Site], seams: list, records: list, *, masks: bool) -> None:
    """Put one seam into each site; what is needed to undo it is added to `records` before anything is changed."""
    for adapter in _ADAPTERS:
        pairs = [(site, seam) for site, seam in zip(sites, seams, strict=True) if site.adapter is adapter]
        if pairs:
            records.append(adapter.Installed())  # known before it changes anything, so that an error can be undone
            records[-1].install(model, [site for site, _ in pairs], [seam for _, seam in pairs], masks=masks)


def undo(records: list) -> None:
    """Put everything back, the last change first."""
    for record in reversed(records):
        record.undo()


@contextlib.contextmanager
def undo_on_error() -> Iterator[list]:
    """A list of records that are undone if the block raises."""
    records: list = []
    try:
        yield records
    except BaseException:
        undo(records)
        raise
