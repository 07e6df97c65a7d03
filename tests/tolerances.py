"""The bounds of comparisons by dtype, with reasons. Every comparison of the suite uses them."""

import torch
from torch import Tensor

# Relative to the largest magnitude of the expected tensor.
BOUND = {
    # Sums of up to a few hundred terms in another order.
    torch.float64: 1e-10,
    # The same in float32: a few hundred roundings of 2^-24 ≈ 6e-8, amplified by exp.
    torch.float32: 2e-5,
    # Computed in float32, rounded once to 8 bits; gradients also use the rounded output.
    torch.bfloat16: 2e-2,
    # The same with 11 bits.
    torch.float16: 3e-3,
}


def assert_close(actual: Tensor, expected: Tensor, what: str, dtype: torch.dtype | None = None) -> None:
    """``actual`` equals ``expected`` within the bound of ``dtype`` (default: that of ``actual``), and is finite."""
    actual, expected = actual.detach(), expected.detach()
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert torch.isfinite(torch.view_as_real(actual) if actual.is_complex() else actual).all(), f"{what} is not finite"
    if not expected.numel():
        return
    dtype = dtype or actual.real.dtype
    expected = expected.to(torch.complex128 if expected.is_complex() else torch.float64)
    error = float((actual.to(expected.dtype) - expected).abs().max())
    bound = BOUND[dtype] * (1 + float(expected.abs().max()))
    assert error <= bound, f"{what}: error {error:.3g} > {bound:.3g}"
