"""The kernels of `csrc/cuda/vq/assign.cu` against the definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longvq_layers import ops
from tests.strategies import LAYOUTS, layout

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def assert_nearest(codes, keys, codebook):
    """Each code is the nearest up to float32 rounding, and exactly the nearest where no other code is that near."""
    exact = ops.vq_assign(keys.double(), codebook.double(), backend="reference")
    distances = torch.cdist(keys.double(), codebook.double().expand(len(keys), -1, -1, -1)) ** 2
    found, nearest = (distances.gather(-1, z[..., None])[..., 0] for z in (codes, exact))
    size = (keys.double() ** 2).sum(-1) + (codebook.double() ** 2).sum(-1).amax(-1)[:, None]
    assert ((found - nearest).abs() <= 2**-20 * size).all()
    unique = (distances - nearest[..., None] <= 2**-20 * size[..., None]).sum(-1) == 1
    assert torch.equal(codes[unique], exact[unique])


@given(st.data())
@settings(max_examples=60)
def test_nearest(kernels, data):
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    batch, heads = data.draw(st.integers(0, 2)), data.draw(st.integers(1, 2))
    length = data.draw(st.sampled_from([0, 1, 63, 64, 65, 128, 130]))
    head_dim = data.draw(st.sampled_from([1, 3, 64, 65, 130]))
    codes = data.draw(st.sampled_from([1, 2, 31, 32, 33, 64, 65, 150]))
    dtype, scale = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from([1e-3, 1.0, 100.0]))
    keys = layout((torch.randn(batch, heads, length, head_dim) * scale).to(dtype), data.draw(st.sampled_from(LAYOUTS)))
    codebook = torch.randn(heads, codes, head_dim) * scale
    if data.draw(st.booleans()):
        codebook = codebook.to(dtype)
    assert_nearest(kernels.vq_assign(keys, codebook), keys, codebook)


def test_equal_codewords_give_the_lowest_code(kernels):
    keys = torch.randn(1, 1, 100, 16)
    codebook = torch.randn(1, 3, 16).repeat_interleave(40, 1)
    assert (kernels.vq_assign(keys, codebook) % 40 == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_that_are_not_finite_get_code_0(kernels, dtype):
    keys = torch.randn(1, 1, 70, 8).to(dtype)
    keys[0, 0, 3, 2], keys[0, 0, 5, 0], keys[0, 0, 69, 7] = torch.nan, torch.inf, -torch.inf
    codes = kernels.vq_assign(keys, torch.randn(1, 20, 8))
    assert codes[0, 0, [3, 5, 69]].tolist() == [0, 0, 0]


def test_largest_numbers(kernels):
    """Splitting numbers into three terms doesn't overflow."""
    keys = torch.tensor([[[[3.4e38, 0.0], [0.0, -3.4e38], [1e-38, 1e-38]]]])
    codebook = torch.tensor([[[1e-3, 0.0], [0.0, -1e-3]]])
    assert kernels.vq_assign(keys, codebook)[0, 0, :2].tolist() == [0, 1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_of_threads_makes_no_difference(on_host, thread_order, dtype):
    keys, codebook = torch.randn(1, 2, 100, 70).to(dtype), torch.randn(2, 100, 70)
    results = []
    for order in (0, 1, 2, 3):
        thread_order(order)
        results.append(on_host.vq_assign(keys, codebook))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_wrong_arguments(kernels):
    with pytest.raises(RuntimeError, match=r"vq_assign: codebook must be \(H, S, D\) .* got \(1, 3, 8\) float32"):
        kernels.vq_assign(torch.randn(1, 2, 5, 8), torch.randn(1, 3, 8))
    with pytest.raises(RuntimeError, match=r"vq_assign: k must be float32, bfloat16 or float16 .* got .* float64"):
        kernels.vq_assign(torch.randn(1, 1, 5, 8).double(), torch.randn(1, 3, 8))
    with pytest.raises(RuntimeError, match="no CUDA kernel for these sizes"):
        kernels.vq_assign(torch.randn(1, 1, 5, 300), torch.randn(1, 3, 300))
