"""Causal convolution with a long kernel by FFT."""

import torch
from torch import Tensor


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


def long_conv(u: Tensor, kernel: Tensor) -> Tensor:
    """(B, L, H) with (H, K) -> (B, L, H), in float32 for half types; differentiable by autograd."""
    length = u.shape[1]
    with torch.autocast(u.device.type, enabled=False):
        precise = torch.promote_types(u.dtype, torch.float32)
        kernel = kernel[:, :length].to(precise)  # taps beyond L meet no input
        if length == 0 or kernel.shape[1] == 0 or u.numel() == 0:
            # Zero, and still connected to both arguments for autograd.
            return (u * kernel.sum(1).to(u.dtype)) * 0
        n = fast_length(length + kernel.shape[1] - 1)
        spectrum = torch.fft.rfft(u.to(precise), n=n, dim=1) * torch.fft.rfft(kernel, n=n, dim=1).t()
        return torch.fft.irfft(spectrum, n=n, dim=1)[:, :length].to(u.dtype)
