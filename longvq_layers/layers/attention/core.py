"""The base classes of attention between given queries, keys and values: its sizes, and a bias inside the window."""

import torch
from torch import Tensor, nn

from longvq_layers import _checks as check
from longvq_layers.layers.common import input_checks
from longvq_layers.layers.common.factory import Factory


class WindowBias(nn.Module):
    """A module with one learned bias per head and offset inside a window.

    `window_bias` is (H, W) if causal, (H, 2W − 1) if bidirectional, and None if no bias is wanted or W = 0.
    """

    window_bias: nn.Parameter | None
    no_decay_parameters = ("window_bias",)  # for `optimizer_groups`

    def _add_window_bias(self, wanted: bool, num_heads: int, window: int, causal: bool, factory: Factory) -> None:
        shape = (num_heads, window if causal else 2 * window - 1)
        bias = nn.Parameter(torch.zeros(shape, **factory)) if wanted and window else None
        self.register_parameter("window_bias", bias)

    def reset_parameters(self) -> None:
        """Zero the window bias. Other parts have a `reset_parameters` of their own."""
        if self.window_bias is not None:
            nn.init.zeros_(self.window_bias)


class AttentionCore(WindowBias):
    """Attention between given queries, keys and values, without projections."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    window: int
    causal: bool

    def _set_sizes(
        self,
        name: str,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int | None,
        window: int,
        causal: bool,
        window_bias: bool,
        dtype: torch.dtype | None,
    ) -> None:
        """Check the arguments that all cores take, in the name of the module, and keep them."""
        value_dim = head_dim if value_dim is None else value_dim
        check.positive(name, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, value_dim=value_dim)
        check.divides(name, "num_kv_heads", num_kv_heads, "num_heads", num_heads)
        check.window(name, window)
        check.floating(name, dtype)
        check.flags(name, causal=causal, window_bias=window_bias)
        self.num_heads, self.num_kv_heads, self.head_dim, self.value_dim = num_heads, num_kv_heads, head_dim, value_dim
        self.window, self.causal = window, causal

    def _check_queries(self, name: str, q: Tensor, cu_seqlens: Tensor | None) -> None:
        check.tensor(name, "q", q, "B H L D")
        check.size(name, "q", q, (q.shape[0], self.num_heads, q.shape[2], self.head_dim), "B H L D")
        input_checks.packed(name, "q", q, cu_seqlens, axis=2)

    def _wants_window_bias(self) -> bool:
        """The argument `window_bias` of this module. True if W = 0, where the argument makes no difference."""
        return self.window_bias is not None or self.window == 0
