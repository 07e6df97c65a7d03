"""The options of a swapped attention, and its settings, which its state dict carries."""

import json
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from longvq_layers.replace.slot.clamped_rotary import ClampedRotary

_NAMES = (
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "num_codes",
    "window",
    "local_keys",
    "variance_correction",
    "trained_length",
)
EXTRA_STATE = "_extra_state"  # the name that torch gives extra state in a state dict


@dataclass(frozen=True)
class SlotOptions:
    """The options that a swapped attention is made with, and their defaults; see `replace_attention`."""

    num_codes: int = 256
    window: int = 64
    local_keys: str = "exact"
    variance_correction: bool = True
    backend: str = "auto"


class CarriesSettings(nn.Module):
    """Part of `SwappedAttention`: its state dict holds its settings. Only codes with equal settings can be loaded."""

    rotary: ClampedRotary | None
    linear_masks: bool

    def settings(self) -> dict[str, object]:
        """Everything `load_replaced` needs to make this module again, as JSON can hold it."""
        rotary = None if self.rotary is None else self.rotary.part
        return {**{name: getattr(self, name) for name in _NAMES}, "rotary": rotary, "linear_masks": self.linear_masks}

    def get_extra_state(self) -> Tensor:
        """The settings as text in a tensor, which every checkpoint format can hold."""
        return torch.tensor(list(json.dumps(self.settings()).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Check that the codes in a state dict were made with these settings.

        Raises:
            ValueError: they were made with others.
        """
        loaded = settings_in(state)
        if self.rotary is not None and self.rotary.part is None:  # no call has detected the columns yet
            part = loaded.get("rotary")
            self.rotary.part = part if isinstance(part, str) else None
        own = self.settings()
        differ = {name: (loaded.get(name), value) for name, value in own.items() if loaded.get(name) != value}
        differ.pop("linear_masks", None)  # changes how a model calls this module, not what the codes mean
        if differ:
            raise ValueError(
                "longvq attention: the codes to be loaded must have been made with this module's settings, got "
                + ", ".join(f"{name}={theirs!r}, here {mine!r}" for name, (theirs, mine) in differ.items())
                + "; use load_replaced on a model that isn't replaced yet"
            )


def settings_in(state: Tensor) -> dict[str, object]:
    """The settings in a tensor that `SwappedAttention.get_extra_state` returned.

    Raises:
        ValueError: the tensor holds something else.
    """
    try:
        return dict(json.loads(bytes(state.to("cpu", torch.uint8).tolist())))
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError("longvq attention: the settings beside the codes can't be read; was the file cut?") from error
