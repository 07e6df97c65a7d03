"""The class that a replaced module of a registered class gets: its forward runs the adapter function."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from longvq_layers.replace.adapters.custom import registry
from longvq_layers.replace.adapters.custom.checks import check_attend_arguments, check_output
from longvq_layers.replace.model_inputs import clone_tensors
from longvq_layers.replace.slot.attention_slot import AttentionSlot, slot_of


class SwappedModule(nn.Module):
    """Mixed into the class of a replaced module; `original` is the class that the module had."""

    original: type[nn.Module]

    def forward(self, *args: object, **kwargs: object) -> object:
        """Run the adapter function; in calibration compare it with the original forward."""
        slot, cls = slot_of(self), _known(registry.registered_class(self.original), self.original)
        entry, name = registry.entry_of(cls), f"adapter of {cls.__name__}"
        attend = Attend(slot, name)
        with slot.refusals():
            if not entry.check or not slot.needs_adapter_check():
                return entry.forward(self, attend, *args, **kwargs)
            kept = clone_tensors((args, kwargs))  # the module may change its input in place
            output = entry.forward(self, attend, *args, **kwargs)
            if not slot.is_first_check(any(padding is not None for _, padding in attend.calls)):
                return output

            def run(forward: Callable[..., object], *first: object) -> object:
                args, kwargs = clone_tensors(kept)
                return forward(self, *first, *args, **kwargs)

            check_output(
                name,
                lambda: run(self.original.forward),
                output,
                lambda: run(entry.forward, _attend_to_nothing),
                attend.calls,
            )
            return output

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        # This class is made at run time and has no importable name, so copies and pickles name the original class.
        state = getattr(self, "__getstate__", lambda: self.__dict__)  # every object has it from Python 3.11 on
        return _rebuilt, (self.original,), state()


class Attend:
    """The function `attend` that an adapter calls with queries, keys and values."""

    def __init__(self, slot: AttentionSlot, name: str) -> None:
        self._slot, self._name = slot, name
        self.calls: list[tuple[torch.dtype, Tensor | None]] = []  # dtype of q and padding, of calls to be compared

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool = False,
        key_padding_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        check_attend_arguments(self._name, q, k, v, causal, key_padding_mask, scale, self._slot.sizes)
        if self._slot.needs_adapter_check():
            self.calls.append((q.dtype, key_padding_mask))
        output: Tensor = self._slot(q, k, v, key_padding_mask, causal=causal, scale=scale)
        return output


def swapped_class(original: type[nn.Module]) -> type[nn.Module]:
    """A new class with the adapter's forward in front of `original`."""
    return type(
        f"VQ{original.__name__}", (SwappedModule, original), {"original": original, "__doc__": original.__doc__}
    )


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, before it was replaced if it is replaced."""
    return module.original if isinstance(module, SwappedModule) else type(module)


def swapped_class_of(original: type[nn.Module], cls: type[nn.Module]) -> type[nn.Module]:
    """The swapped class of `original`, which is the registered class `cls` or a subclass of it."""
    return registry.entry_of(cls).swapped if original is cls else swapped_class(original)


def _attend_to_nothing(q: Tensor, k: Tensor, v: Tensor, *args: object, **kwargs: object) -> Tensor:
    return v.new_zeros(*q.shape[:3], v.shape[3])


def _rebuilt(original: type[nn.Module]) -> nn.Module:
    swapped = swapped_class_of(original, _known(registry.registered_base(original), original))
    return swapped.__new__(swapped)


def _known(cls: type[nn.Module] | None, original: type[nn.Module]) -> type[nn.Module]:
    if cls is None:
        raise RuntimeError(
            f"longvq attention: {original.__name__} has no adapter in this process; call register_adapter first"
        )
    return cls
