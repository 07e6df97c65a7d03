"""Causal convolution with a long kernel by FFT."""

import torch
from torch import Tensor

_STEP = 256  # compiled programs take transforms of a multiple of this length


def fast_length(n: int) -> int:
    """Smallest 2^a · 3^b · 5^c that is at least n: lengths for which every FFT library has a fast plan."""
    best = 1 << max(0, n - 1).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            # the least power of two that brings `three` to n
            candidate = three << max(0, (-(-n // three) - 1).bit_length())
            best = min(best, candidate)
            three *= 3
        five *= 5
    return best


class _RealTransform(torch.autograd.Function):
    """`torch.fft.rfft(x, n)`. Its own derivative takes a complex transform of full length; here it is a real one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, n: int) -> Tensor:
        return torch.fft.rfft(x, n=n)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, ctx.n = inputs
        ctx.steps = x.shape[-1]

    @staticmethod
    def jvp(ctx, tangent: Tensor, _: None) -> Tensor:
        return torch.fft.rfft(tangent, n=ctx.n)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        # dx_t = Re Σ_k grad_k e^{2πikt/n} over half of the frequencies. irfft adds their mirror images, that is all
        # but frequency 0 and, for even n, n/2 a second time.
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
        kernel = kernel[:, :length].to(precise)  # taps beyond L meet no input
        if length == 0 or kernel.shape[1] == 0 or u.numel() == 0:
            # Zero, and still connected to both arguments for autograd.
            return (u * kernel.sum(1).to(u.dtype)) * 0
        n = length + kernel.shape[1] - 1
        if torch.compiler.is_compiling():
            # Searching for the best length would tie the program to one length of the sequence, and Dynamo traces
            # autograd functions with a deprecation warning.
            n, transform = -(-n // _STEP) * _STEP, torch.fft.rfft
        else:
            n, transform = fast_length(n), _RealTransform.apply
        # Along the last axis: with the channels innermost, forward and backward take 1.3 times as long. The copy at
        # the end costs less than that, and lets go of the padded result.
        spectrum = transform(u.to(precise).transpose(1, 2), n) * transform(kernel, n)
        y = torch.fft.irfft(spectrum, n=n)[..., :length]
        return y.transpose(1, 2).to(u.dtype).contiguous()
