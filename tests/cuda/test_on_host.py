"""The machine on the host, `csrc/cuda/on_host`: it finds what is wrong in kernels that are (misuses.cpp)."""

import ctypes

import pytest


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("two copies to one place", "a copy to where another one is on its way"),
        ("copies one after the other", ""),
        ("copy outside", "a copy to where there is no shared memory"),
        ("no block", "a grid without blocks"),
    ],
)
def test_what_it_says_of(library_on_host, thread_order, order, kernel, message):
    said_of = ctypes.CDLL(library_on_host).longvq_on_host_said_of
    said_of.restype = ctypes.c_char_p
    thread_order(order)
    assert said_of(kernel.encode()).decode() == message
