"""The bias that attention learns for each offset inside a window."""

import torch
from torch import nn


class WindowBias(nn.Module):
    """A module with `window_bias`, (H, W) causal or (H, 2W − 1), or None if unwanted or without a window."""

    no_decay_parameters = ("window_bias",)  # for `optimizer_groups`

    def _add_window_bias(
        self,
        wanted: bool,
        num_heads: int,
        window: int,
        causal: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        shape = (num_heads, window if causal else 2 * window - 1)
        bias = torch.zeros(shape, device=device, dtype=dtype) if wanted and window else None
        self.register_parameter("window_bias", None if bias is None else nn.Parameter(bias))

    def reset_parameters(self) -> None:
        """Zero the window bias; other parts have a `reset_parameters` of their own."""
        if self.window_bias is not None:
            nn.init.zeros_(self.window_bias)
