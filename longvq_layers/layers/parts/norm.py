"""The norms that a block may stand between: layer, root mean square, scale and batch norm, all with padding masks."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from longvq_layers import _checks as check
from longvq_layers.layers.common.context import recomputing
from longvq_layers.layers.common.precision import KeepsFloat32, storage_dtype


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` over the last dimension, called like the other norms; the mask changes nothing."""

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        return super().forward(x)


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` over the last dimension, called like the other norms; the mask changes nothing.

    ε is 1e-6 unless given: that of `nn.RMSNorm` depends on the dtype, and a model should not.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, eps, device=device, dtype=dtype)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        # Under autocast x may be narrower than the weight, for which there is no fused kernel but a warning.
        return nn.functional.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class ScaleNorm(nn.Module):
    """``g · x / √(mean(x²) + ε)`` with one learned number g (started at 1) for all channels.

    Args:
        dim: width of the last dimension.
        eps: ε, default 1e-6.
        device, dtype: of g.

    Source: Nguyen and Salazar 2019, "Transformers without Tears"; the form in Mega (arXiv 2209.10655).
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps
        self.scalar = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set g to 1."""
        nn.init.ones_(self.scalar)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        return nn.functional.rms_norm(x, (self.dim,), eps=self.eps) * self.scalar.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}"


class BatchNorm(KeepsFloat32):
    """Batch normalisation of every channel over all positions that are no padding.

        training:  γ (x − mean) / √(var + ε) + β   over the batch, and running averages of mean and variance
        eval:      the same with the running averages

    In training the statistics of a sequence contain its future and the other sequences: a causal model trained with
    it is causal in eval mode only. Statistics are those of this process. They and the parameters stay float32 (or
    float64) under `.half()` and `.bfloat16()`: a running average in 8 bits would stop at some value.

    Args:
        dim: channels, the last dimension.
        eps: ε, default 1e-5.
        momentum: share of a new batch in the running averages, default 0.1.
        device: where the parameters live.
        dtype: torch.float64 for double parameters, anything else gives float32.

    Source: Ioffe and Szegedy 2015 (arXiv 1502.03167).
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.eps, self.momentum = dim, eps, momentum
        real = {"device": device, "dtype": storage_dtype(dtype)}
        self.weight = nn.Parameter(torch.empty(dim, **real))
        self.bias = nn.Parameter(torch.empty(dim, **real))
        self.register_buffer("running_mean", torch.empty(dim, **real))
        self.register_buffer("running_var", torch.empty(dim, **real))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start again with γ and the variance 1, β and the mean 0."""
        for ones, zeros in ((self.weight, self.bias), (self.running_var, self.running_mean)):
            nn.init.ones_(ones)
            nn.init.zeros_(zeros)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        # x (B, L, dim), in eval mode (..., dim)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.training:
            mean, var = self._statistics(wide, key_padding_mask)
        else:
            mean, var = self.running_mean, self.running_var
        return ((wide - mean) * (var + self.eps).rsqrt() * self.weight + self.bias).to(x.dtype)

    def _statistics(self, x: Tensor, key_padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        if key_padding_mask is None:
            valid = torch.ones_like(x[..., :1])
        else:
            valid = (~key_padding_mask).unsqueeze(-1).to(x.dtype)
        count = valid.sum().clamp(min=1)
        mean = (x * valid).sum((0, 1)) / count
        var = ((x - mean).square() * valid).sum((0, 1)) / count
        if not recomputing():
            with torch.no_grad():
                # Without positions nothing is learned; the variance is that of a population, as in nn.BatchNorm1d.
                share = self.momentum * (valid.sum() > 0).to(self.running_mean.dtype)
                unbiased = var * (count / (count - 1).clamp(min=1))
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), share)
        return mean, var

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}, momentum={self.momentum}"


NORMS: dict[str, Callable[..., nn.Module]] = {
    "layer": LayerNorm,
    "rms": RMSNorm,
    "scale": ScaleNorm,
    "batch": BatchNorm,
}


def make_norm(
    caller: str, kind: str, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """The norm of that name for (..., dim); call it with x and, where there is one, the mask (B, L), True = ignore."""
    check.one_of(caller, "norm_type", kind, tuple(NORMS))
    return NORMS[kind](dim, device=device, dtype=dtype)
