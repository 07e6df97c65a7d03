"""The execution model on the host, `csrc/cuda/on_host`, finds the errors of the wrong kernels in misuses.cpp."""

import ctypes

import pytest


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("two copies to one place", "a copy to the target of an open copy"),
        ("copies one after the other", ""),
        ("copy outside", "a copy to outside of shared memory"),
        ("no block", "a grid without blocks"),
    ],
)
def test_error_of_a_kernel(library_on_host, thread_order, order, kernel, message):
    error_of = ctypes.CDLL(library_on_host).longvq_on_host_error_of
    error_of.restype = ctypes.c_char_p
    thread_order(order)
    assert error_of(kernel.encode()).decode() == message
