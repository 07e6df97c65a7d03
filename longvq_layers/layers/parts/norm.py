"""The norms of blocks: layer, root mean square, scale and batch norm. All are called with a padding mask."""

import torch
from torch import Tensor, nn

from longvq_layers import _checks as check
from longvq_layers.layers.common.context import recomputing
from longvq_layers.layers.common.precision import KeepsFloat32, storage_factory


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` over the last dimension. The mask has no effect; all norms take one."""

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        return super().forward(x)


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` over the last dimension. The mask has no effect; all norms take one.

    The default ε is 1e-6. The default of `nn.RMSNorm` depends on the dtype, which would make models differ.
    """

    weight: nn.Parameter

    def __init__(
        self,
        dim: int,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, eps, device=device, dtype=dtype)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        # Under autocast x may have a narrower dtype than the weight. PyTorch has no fused kernel for this, and warns.
        return nn.functional.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class ScaleNorm(nn.Module):
    """``g · x / √(mean(x²) + ε)`` with one learned number g (started at 1) for all channels.

    Args:
        dim: width of the last dimension.
        eps: ε, default 1e-6.
        device, dtype: of g.

    Source: Nguyen and Salazar 2019, "Transformers without Tears"; the form in Mega (arXiv 2209.10655).
    """

    scalar: nn.Parameter

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
    """Batch normalisation of every channel over all positions that aren't padding.

        training:  γ (x − mean) / √(var + ε) + β   over the batch, and running averages of mean and variance
        eval:      the same with the running averages

    In training mode the statistics include the future and the other sequences, so a causal model is causal in eval mode
    only. Ranks don't share statistics. Statistics and parameters stay float32 (or float64) under `.half()` and
    `.bfloat16()`: small updates of a bfloat16 average would round to nothing.

    Args:
        dim: channels, the last dimension.
        eps: ε, default 1e-5.
        momentum: share of a new batch in the running averages, default 0.1.
        device: where the parameters live.
        dtype: torch.float64 for double parameters, anything else gives float32.

    Source: Ioffe and Szegedy 2015 (arXiv 1502.03167).
    """

    weight: nn.Parameter
    bias: nn.Parameter
    running_mean: Tensor
    running_var: Tensor

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
        real = storage_factory(device, dtype)
        self.weight = nn.Parameter(torch.empty(dim, **real))
        self.bias = nn.Parameter(torch.empty(dim, **real))
        self.register_buffer("running_mean", torch.empty(dim, **real))
        self.register_buffer("running_var", torch.empty(dim, **real))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set γ and the variance to 1, β and the mean to 0."""
        for ones, zeros in ((self.weight, self.bias), (self.running_var, self.running_mean)):
            nn.init.ones_(ones)
            nn.init.zeros_(zeros)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """x (B, L, dim), in eval mode (..., dim) -> the same shape; the mask is (B, L), True = ignore."""
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
                # A batch without positions changes nothing. The running variance is the unbiased one, as in
                # nn.BatchNorm1d.
                share = self.momentum * (valid.sum() > 0).to(self.running_mean.dtype)
                unbiased = var * (count / (count - 1).clamp(min=1))
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), share)
        return mean, var

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}, momentum={self.momentum}"


Norm = LayerNorm | RMSNorm | ScaleNorm | BatchNorm
NORMS: dict[str, type[Norm]] = {
    "layer": LayerNorm,
    "rms": RMSNorm,
    "scale": ScaleNorm,
    "batch": BatchNorm,
}


def make_norm(
    name: str, kind: str, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Norm:
    """The norm named `kind` for (..., dim). Call it with x and a mask: (B, L), True = ignore, or None.

    `name` is the layer in errors.
    """
    check.one_of(name, "norm_type", kind, tuple(NORMS))
    return NORMS[kind](dim, device=device, dtype=dtype)
