"""Causal convolution with a long kernel by FFT."""

from typing import Any

import torch
from torch import Tensor

_STEP = 256  # under torch.compile the length of a transform is a multiple of this


def fast_length(n: int) -> int:
    """The smallest 2^a · 3^b · 5^c that is at least n. Every FFT library is fast for such lengths."""
    best = 1 << max(0, n - 1).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            # times the smallest power of two with which the product is at least n
            candidate = three << max(0, (-(-n // three) - 1).bit_length())
            best = min(best, candidate)
            three *= 3
        five *= 5
    return best


class _RealTransform(torch.autograd.Function):
    """`torch.fft.rfft(x, n)` with a faster backward: a real transform instead of a complex one of full length."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, n: int) -> Tensor:
        return torch.fft.rfft(x, n=n)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        x, ctx.n = inputs
        ctx.steps = x.shape[-1]

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return torch.fft.rfft(tangent, n=ctx.n)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # dx_t = Re Σ_k grad_k e^{2πikt/n} over the frequencies k ≤ n/2. irfft adds the mirror image of each frequency
        # except 0 and, for even n, n/2. Halving all others makes up for the mirror images.
        halved = grad * 0.5
        halved[..., 0] *= 2
        if ctx.n % 2 == 0:
            halved[..., -1] *= 2
        return torch.fft.irfft(halved, n=ctx.n, norm="forward")[..., : ctx.steps], None


def long_conv(u: Tensor, kernel: Tensor) -> Tensor:
    """(B, L, H) with (H, K) -> (B, L, H), in float32 for half types; differentiable by autograd."""
    length = u.shape[1]
    with torch.autocast(u.device.type, enabled=False):
        precise = torch.promote_types(u.dtype, torch.float32)
        kernel = kernel[:, :length].to(precise)  # taps beyond L are never multiplied by an input
        if length == 0 or kernel.shape[1] == 0 or u.numel() == 0:
            # The result is zero, but depends on both arguments for autograd.
            return (u * kernel.sum(1).to(u.dtype)) * 0
        n = length + kernel.shape[1] - 1
        if torch.compiler.is_compiling():
            # `fast_length` would specialise the compiled program to one sequence length, and Dynamo warns about the
            # autograd function.
            n, transform = -(-n // _STEP) * _STEP, torch.fft.rfft
        else:
            n, transform = fast_length(n), _RealTransform.apply
        # Transform along the last axis: with the channels innermost, forward and backward take 1.3 times as long. The
        # final copy costs less, and frees the padded result.
        spectrum = transform(u.to(precise).transpose(1, 2), n) * transform(kernel, n)
        y = torch.fft.irfft(spectrum, n=n)[..., :length]
        return y.transpose(1, 2).to(u.dtype).contiguous()
