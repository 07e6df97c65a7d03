"""Original and swapped attention side by side, on the same inputs: what distillation compares."""

import contextlib
import copy
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from longvq_layers.replace.slot.context import Call, Far, cloned, tensors_of
from longvq_layers.replace.slot.full_attention import full_attention
from longvq_layers.replace.slot.swapped import SwappedAttention

_SEAM = "longvq"


class Pair(nn.Module):
    """Stands where a swapped attention stands, and attends as the original would, or as the swapped one does.

    Args:
        seam: the swapped attention.

    Attributes:
        original: True (default) attends to every key itself.
        real: (B, L) of the last call, False = padding; None without padding.
    """

    def __init__(self, seam: SwappedAttention) -> None:
        super().__init__()
        self._seam = [seam]  # in a list: not a submodule
        self.rotary, self.linear_masks = seam.rotary, seam.linear_masks
        self.calls: dict[int, Call] = {}
        self.original = True
        self.real: Tensor | None = None

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_padding_mask: Tensor | None = None,
        *,
        far: Far | None = None,
        causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        """As `SwappedAttention.forward`; 0 at padded positions either way."""
        self.real = None if key_padding_mask is None else ~key_padding_mask
        if not self.original:
            return self._seam[0](q, k, v, key_padding_mask, far=far, causal=causal, scale=scale)
        output = full_attention(q, k, v, causal=causal, key_padding_mask=key_padding_mask, scale=scale)
        return output if self.real is None else output.masked_fill(~self.real[:, None, :, None], 0)


class Calls(list):
    """What an attention module was called with and what it gave: (args, kwargs, output) of each call, by hooks."""

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook with kwargs."""
        memo: dict = {}
        self.append((tuple(_kept(x, memo) for x in args), {name: _kept(x, memo) for name, x in kwargs.items()}))

    def after(self, module: nn.Module, args: tuple, output: object) -> None:
        """Forward hook."""
        self[-1] = (*self[-1][:2], _kept(first(output)))


class Pairs:
    """All swapped attention modules of a model as pairs, within a ``with`` block.

    Args:
        model: the model.
        sites: name -> attention module, each with a `SwappedAttention` as its ``longvq``.
    """

    def __init__(self, model: nn.Module, sites: dict[str, nn.Module]) -> None:
        self.model, self.sites = model, sites
        self.seams: dict[str, SwappedAttention] = {name: site._modules[_SEAM] for name, site in sites.items()}
        self._pairs = {name: Pair(seam) for name, seam in self.seams.items()}

    def __enter__(self) -> "Pairs":
        for name, site in self.sites.items():
            site._modules[_SEAM] = self._pairs[name]
        return self

    def __exit__(self, *error: object) -> None:
        for name, site in self.sites.items():
            site._modules[_SEAM] = self.seams[name]

    def run(self, batch: object, *, original: bool) -> tuple[Tensor, dict[str, Calls]]:
        """The model's first output, and the calls of every attention module, with one attention or the other."""
        self._attend_as(original)
        with self._noting() as calls:
            return first(call(self.model, batch)), calls

    def errors(self, calls: dict[str, Calls]) -> dict[str, Tensor]:
        """‖swapped − original‖² / ‖original‖² of each module, run with the inputs that the original had."""
        self._attend_as(False)
        found = {}
        for name, made in calls.items():
            outputs = [first(self.sites[name](*args, **kwargs)) for args, kwargs, _ in made]
            found[name] = self.error(name, outputs, [output for *_, output in made])
        return found

    def error(self, name: str, outputs: list[Tensor], originals: list[Tensor]) -> Tensor:
        """‖swapped − original‖² / ‖original‖², over tokens that aren't padding."""
        real = self._pairs[name].real
        pairs = [(_real_rows(a, real), _real_rows(b, real)) for a, b in zip(outputs, originals, strict=True)]
        difference = sum((a - b).float().square().sum() for a, b in pairs)
        return difference / sum(b.float().square().sum() for _, b in pairs).clamp(min=1e-12)

    def _attend_as(self, original: bool) -> None:
        for pair in self._pairs.values():
            pair.original = original

    @contextlib.contextmanager
    def _noting(self) -> Iterator[dict[str, Calls]]:
        calls = {name: Calls() for name in self.sites}
        handles = []
        for name, site in self.sites.items():
            handles.append(site.register_forward_pre_hook(calls[name].before, with_kwargs=True))
            handles.append(site.register_forward_hook(calls[name].after))
        try:
            yield calls
        finally:
            for handle in handles:
                handle.remove()


def call(model: nn.Module, batch: object) -> object:
    """`model` called with a tensor, a tuple of positional or a dict of keyword arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*map(_copied, batch)) if isinstance(batch, (tuple, list)) else model(batch)


def first(output: object) -> Tensor:
    """The first tensor of what a module returned that may be its output: not a loss before it, nor its tokens."""
    tensors = tensors_of(output)
    return next((x for x in tensors if x.dim() and x.is_floating_point()), tensors[0])


def _copied(value: object) -> object:
    # Some models add what they compute to the dict that they are given.
    return copy.copy(value) if isinstance(value, Mapping) else value


def _kept(value: object, memo: dict | None = None) -> object:
    # A cache of transformers holds the keys of the call already; with it a second call would see them twice. Hidden
    # states may be overwritten by a residual that is added in place; masks, the larger ones, are not.
    if hasattr(value, "get_seq_length"):
        return None
    hidden_states = isinstance(value, Tensor) and value.is_floating_point() and value.dim() < 4
    return cloned(value, memo) if hidden_states else value


def _real_rows(x: Tensor, real: Tensor | None) -> Tensor:
    # x (B, L, C), or (L, B, C), with zeros for padding.
    if real is None or x.dim() != 3:
        return x
    rows = real if x.shape[:2] == real.shape else real.T if x.shape[:2] == real.T.shape else None
    return x if rows is None else x * rows.unsqueeze(-1)
