"""What a swapped attention was made with, carried by its state dict."""

import json

import torch
from torch import Tensor, nn

_NAMES = ("num_heads", "num_kv_heads", "head_dim", "num_codes", "window", "local_keys")
_NAMES += ("variance_correction", "trained_length")


class CarriesSettings(nn.Module):
    """Part of `SwappedAttention`: its state dict holds its settings, and takes codes of the same settings only."""

    def settings(self) -> dict:
        """What it was made with, as JSON can hold it; a state dict carries it, for `load_replaced`."""
        rotary = None if self.rotary is None else self.rotary.part
        return {**{name: getattr(self, name) for name in _NAMES}, "rotary": rotary, "linear_masks": self.linear_masks}

    def get_extra_state(self) -> Tensor:
        """The settings as text in a tensor, which every format of checkpoints can hold."""
        return torch.tensor(list(json.dumps(self.settings()).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse codes that were made with other settings: ValueError."""
        theirs = settings_in(state)
        if self.rotary is not None and self.rotary.part is None:  # no call has told yet
            self.rotary.part = theirs.get("rotary")
        mine = self.settings()
        differ = {name: (theirs.get(name), value) for name, value in mine.items() if theirs.get(name) != value}
        differ.pop("linear_masks", None)  # says how a model calls it, not what it does
        if differ:
            raise ValueError(
                "longvq attention: the codes to be loaded were made with other settings: "
                + ", ".join(f"{name}={theirs!r}, here {mine!r}" for name, (theirs, mine) in differ.items())
                + "; use load_replaced on a model that isn't replaced yet"
            )


def settings_in(state: Tensor) -> dict:
    """The settings in what `SwappedAttention.get_extra_state` gave.

    Raises:
        ValueError: it is something else.
    """
    try:
        return dict(json.loads(bytes(state.to("cpu", torch.uint8).tolist())))
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError("longvq attention: the settings beside the codes can't be read; was the file cut?") from error
