"""Mega's multi-dimensional damped exponential moving average: parameters, scan and step."""

import math

import torch
from torch import Tensor, nn

from longvq_layers import _checks as check
from longvq_layers import ops
from longvq_layers.layers.common.context import no_autocast
from longvq_layers.layers.common.precision import storage_factory
from longvq_layers.layers.common.representation import arguments_repr
from longvq_layers.layers.ssm.scan import ScanLayer, arithmetic_dtype
from longvq_layers.layers.streaming import step_checks
from longvq_layers.ops._dispatch import BACKENDS


class DampedEMA(ScanLayer):
    """One damped moving average per channel and dimension, read out into one number per channel.

        p = sigmoid(delta),   q = 1 − p · sigmoid(alpha)
        x_t = q x_{t−1} + u_t,   y_t = Σ_n p_n beta_n gamma_n / √ndim · x_{t,n} + omega u_t

    This is a convolution with the kernel K_l = Σ_n p_n beta_n gamma_n q_n^l / √ndim. If bidirectional, a second average
    with its own parameters runs from the end to the start, and its outputs are added; both averages include the present
    position. 0 ≤ q ≤ 1 for every parameter value, so the average is stable. No activation follows: blocks apply silu
    themselves. All arithmetic is float32 (float64 for float64 inputs) with autocast off, and `.half()` or `.bfloat16()`
    leave the parameters in float32.

    Args:
        channels: H, independent channels.
        ndim: N, averages per channel, default 16.
        causal: only past and present, default False (bidirectional).
        backend: see `ops.ssm_scan`.
        device: where the parameters live.
        dtype: torch.float64 for double parameters, anything else gives float32.

    Parameters:
        delta, alpha, beta (H, N, 1), gamma (H, N), bidirectional (2H, N, 1) and (2H, N) with the forward direction
        first; omega (H,). Names and shapes are the published ones. `optimizer_groups` doesn't decay any of them.

    Raises:
        ValueError, TypeError: sizes out of range or unknown options; in `forward` a wrong shape or dtype.

    Example:
        >>> ema = DampedEMA(8, ndim=4, causal=True)
        >>> ema(torch.randn(2, 100, 8)).shape
        torch.Size([2, 100, 8])

    Source: Mega (arXiv 2209.10655), section 3.1; initial values and the bidirectional form as in its public code.
    """

    delta: nn.Parameter
    alpha: nn.Parameter
    beta: nn.Parameter
    gamma: nn.Parameter
    omega: nn.Parameter
    no_decay_parameters = ("delta", "alpha", "beta", "gamma", "omega")  # for `optimizer_groups`

    def __init__(
        self,
        channels: int,
        *,
        ndim: int = 16,
        causal: bool = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check.positive("DampedEMA", channels=channels, ndim=ndim)
        check.floating("DampedEMA", dtype)
        check.flags("DampedEMA", causal=causal)
        check.one_of("DampedEMA", "backend", backend, BACKENDS)
        self.channels, self.ndim, self.causal, self.backend = channels, ndim, causal, backend
        real = storage_factory(device, dtype)
        rows = channels if causal else 2 * channels
        self.delta = nn.Parameter(torch.empty(rows, ndim, 1, **real))
        self.alpha = nn.Parameter(torch.empty(rows, ndim, 1, **real))
        self.beta = nn.Parameter(torch.empty(rows, ndim, 1, **real))
        self.gamma = nn.Parameter(torch.empty(rows, ndim, **real))
        self.omega = nn.Parameter(torch.empty(channels, **real))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new values of all parameters."""
        self.delta.normal_(std=0.2)
        self.alpha.normal_(std=0.2)
        self.beta.normal_(std=0.02)
        self.beta[:, 0::2].add_(1)
        self.beta[:, 1::2].sub_(1)
        self.gamma.normal_()
        self.omega.normal_()

    def discrete(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        """The arguments of `ops.ssm_scan`: log q and weight p·beta·gamma/√ndim (directions, H, N), and omega (H,).

        `dtype` is the precision of the arithmetic, float32 or float64.
        """
        with no_autocast(self.delta.device):
            delta, alpha, beta = (x.to(dtype).squeeze(-1) for x in (self.delta, self.alpha, self.beta))
            weight = delta.sigmoid() * beta * self.gamma.to(dtype) / math.sqrt(self.ndim)
            shape = (-1, self.channels, self.ndim)
            return _log_decay(delta, alpha).view(shape), weight.view(shape), self.omega.to(dtype)

    def forward(
        self,
        u: Tensor,
        key_padding_mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        initial_state: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run over whole sequences.

        Args:
            u: (B, L, H), any floating dtype.
            key_padding_mask: (B, L) bool, True = this input counts as 0 and this output is 0. The state keeps
                decaying over padding.
            cu_seqlens: (documents + 1,) int32, offsets of documents in one row (B = 1) that don't see each other, see
                `ops.ssm_scan`. States are then (documents, H, N). Default none.
            initial_state: (B, H, N) real, from an earlier call; causal only. Default zero.
            return_state: also return the state after the last position; causal only. Default False.

        Returns:
            y (B, L, H), dtype of u; with `return_state` also the state (B, H, N), float32 (float64 for float64 u).

        Raises:
            ValueError, TypeError: wrong shapes or dtypes.
            NotImplementedError: a bidirectional average with a state: its outputs depend on the future.
        """
        self._check_forward(u, key_padding_mask, cu_seqlens, initial_state is not None or return_state)
        log_decay, weight, skip = self.discrete(arithmetic_dtype(u.dtype))
        return self._scan(
            u,
            log_decay,
            weight,
            skip,
            key_padding_mask=key_padding_mask,
            cu_seqlens=cu_seqlens,
            initial_state=initial_state,
            return_state=return_state,
        )

    def initial_state(self, batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The zero state (batch, H, N), float64 for inputs of `dtype` float64, else float32."""
        step_checks.batch("DampedEMA.initial_state", batch)
        return torch.zeros(batch, self.channels, self.ndim, dtype=arithmetic_dtype(dtype), device=self.delta.device)

    def step(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Run the next position. Outputs equal those of `forward` up to rounding.

        Args:
            u: (B, H), any floating dtype.
            state: (B, H, N), float64 for float64 `u`, else float32; not modified.

        Returns:
            y (B, H), dtype of u, and the new state (B, H, N).

        Raises:
            ValueError, TypeError: wrong shapes, dtypes or devices.
            NotImplementedError: a bidirectional average.
        """
        step_checks.causal("DampedEMA.step", self.causal)
        check.tensor("DampedEMA.step", "u", u, "B H")
        check.real("DampedEMA.step", "u", u)
        check.size("DampedEMA.step", "u", u, (u.shape[0], self.channels), "B H")
        log_decay, weight, skip = self.discrete(arithmetic_dtype(u.dtype))
        return ops.ssm_step(u, log_decay[0].exp(), weight[0], state, skip=skip, backend=self.backend)

    def extra_repr(self) -> str:
        return arguments_repr(self, DampedEMA)


def _log_decay(delta: Tensor, alpha: Tensor) -> Tensor:
    """log(1 − sigmoid(delta) sigmoid(alpha)), accurate and finite at both ends."""
    lost = delta.sigmoid() * alpha.sigmoid()
    # Slow decay: log1p, because 1 − lost would round to 1. Fast decay: lost rounds to 1, so the rest
    # 1 − p a = (1 − p) + p (1 − a) is summed from the logarithms of its terms.
    slow = torch.where(lost < 0.5, lost, 0.0)
    log_p, log_1p = nn.functional.logsigmoid(delta), nn.functional.logsigmoid(-delta)
    fast = torch.logaddexp(log_1p, log_p + nn.functional.logsigmoid(-alpha))
    return torch.where(lost < 0.5, torch.log1p(-slow), fast)
