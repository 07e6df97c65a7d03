"""What a transformers attention module was called with beyond what its attention function is told: cache, positions."""

import inspect
import threading

import torch
from torch import Tensor, nn

from longvq_layers.replace.adapters.huggingface import support as refusals
from longvq_layers.replace.slot.clamped_rotary import EMBEDDINGS
from longvq_layers.replace.slot.context import Call
from longvq_layers.replace.slot.recorder import Recorder
from longvq_layers.replace.slot.swapped import SwappedAttention

_NAME = "longvq"
_FILLED = "filled"  # in place of a cache layer that was attended with
_CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")


class NoteCall:
    """Forward pre-hook of a replaced module: notes each call, for `taken`.

    Args:
        module: the module; only what is known of its class is kept.
        eager, skips_masks: of its own attention, as in `Call`.
    """

    def __init__(self, module: nn.Module, *, eager: bool = False, skips_masks: bool = False) -> None:
        self.names = tuple(inspect.signature(inspect.unwrap(type(module).forward)).parameters)[1:]
        self.eager, self.skips_masks = eager, skips_masks
        self.needs_keys = refusals.needs_keys(module) is not None

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Raises NotImplementedError for positions that can't be taken off, ValueError where they are missing."""
        seam = module._modules[_NAME]
        note(seam, Call())  # that of a call that raised, if there was one
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        rotation = given.get(EMBEDDINGS)
        if seam.rotary is not None and seam.rotary.part is None:
            _settle(module, seam, given)
        if seam.rotary is not None and rotation is None:
            raise ValueError(
                f"longvq attention: {EMBEDDINGS}: got None, expected (cos, sin) as codes have no positions"
            )
        layer = None if self.needs_keys else _cache_layer(module, seam, given)
        note(seam, Call(None if seam.rotary is None else rotation, layer, self.eager, self.skips_masks))


def _cache_layer(module: nn.Module, seam: nn.Module, given: dict) -> object | None:
    cache = next((given[name] for name in _CACHES if given.get(name) is not None), None)
    if cache is None or not isinstance(seam, SwappedAttention) or seam.training:
        return None
    if not getattr(module, "is_causal", True):
        return None
    inputs = (x for x in given.values() if isinstance(x, Tensor))
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*module.parameters(), *inputs)):
        return None  # no gradient goes through a state that is updated in place
    from longvq_layers.replace.adapters.huggingface.cache import take_over

    return take_over(cache, getattr(module, "layer_idx", None), seam)


def note(seam: nn.Module, call: Call) -> None:
    """Note the call that is going on in this thread: threads may share a model, but not a cache."""
    seam.calls[_thread()] = call


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def taken(seam: nn.Module) -> Call:
    """The call that is going on in this thread.

    Raises:
        NotImplementedError: a second attention within one call, with a cache that the first has filled already.
    """
    call = seam.calls.get(_thread(), Call())
    if call.cache_layer is _FILLED:
        raise NotImplementedError(
            "longvq attention: this module attends more than once with each key, which a cache of constant size can't "
            "serve; call it with use_cache=False"
        )
    note(seam, call._replace(cache_layer=None if call.cache_layer is None else _FILLED))
    return call


def stays_rotated(seam: nn.Module, why: str) -> bool:
    """Whether codes can stand for rotated keys after all: at the first call of a calibration that leaves it open."""
    if not (isinstance(seam, Recorder) and seam.may_stay_rotated and seam.keys is None):
        return False
    seam.rotary, seam.why_rotated = None, why
    return True


class Probe(nn.Module):
    """Stands where a swapped attention stands, to see the keys of one call."""

    rotary = None

    def __init__(self) -> None:
        super().__init__()
        self.keys: Tensor | None = None
        self.calls: dict[int, Call] = {}


def _settle(module: nn.Module, seam: nn.Module, given: dict) -> None:
    # Run the module with its own positions and with none, and see whether the difference is understood.
    rotation, why = given.get(EMBEDDINGS), "its keys are not what its rotation says"
    if isinstance(rotation, tuple) and len(rotation) == 2 and all(isinstance(x, Tensor) for x in rotation):
        cos, sin = rotation
        rotated, plain = (
            _keys(module, given, rotation),
            _keys(module, given, (torch.ones_like(cos), sin.new_zeros(sin.shape))),
        )
        if torch.equal(rotated, plain) and bool((sin != 0).any()):
            seam.rotary, seam.has_positions = None, False
            return
        if seam.rotary.settle(rotated, plain, cos, sin):
            return
    else:
        why = f"its {EMBEDDINGS} are not (cos, sin)"
    if stays_rotated(seam, why):
        return
    raise NotImplementedError(
        f'longvq attention: far_positions: "rectified" is impossible in {type(module).__name__}: {why}; use "rotated"'
    )


def _keys(module: nn.Module, given: dict, rotation: tuple[Tensor, Tensor]) -> Tensor:
    # The keys that reach the attention function with these positions.
    given = {**given, EMBEDDINGS: rotation, **{name: None for name in _CACHES if name in given}}
    seam, probe = module._modules[_NAME], Probe()
    module._modules[_NAME] = probe
    try:
        with torch.no_grad():
            module.forward(**given)
    finally:
        module._modules[_NAME] = seam
    return probe.keys
