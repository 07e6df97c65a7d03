"""The CUDA kernels on the CPU: built once, registered behind operators of their own; and on a GPU that has them.

The same source, thread by thread, with barriers, shuffles, tensor core instructions and asynchronous copies as CUDA
defines them (csrc/cuda/on_host). It says nothing of speed, and does not replace a run on a GPU.
"""

import contextlib
import ctypes
import io

import cuda_library
import pytest
import shared_memory
import torch

from longvq_layers import _extension


@pytest.fixture(scope="session")
def library_on_host():
    with contextlib.redirect_stdout(io.StringIO()):  # the commands of the compiler
        return str(cuda_library.on_host())


@pytest.fixture(scope="session")
def on_host(library_on_host):
    """The operators on the host, `torch.ops.longvq_on_host`."""
    defined = shared_memory.define_on_host(library_on_host)
    yield defined.ops
    defined.close()


class OnGpu:
    """The compiled operators with tensors sent to the GPU and back."""

    def __getattr__(self, name):
        return lambda *args: self._back(getattr(torch.ops.longvq, name)(*map(self._there, args)))

    @staticmethod
    def _there(x):
        if not isinstance(x, torch.Tensor):
            return x
        x = x.resolve_conj()  # with its strides, also those of expanded tensors, and its offset
        there = torch.empty(0, dtype=x.dtype, device="cuda")
        return there.set_(x.untyped_storage().cuda(), x.storage_offset(), x.shape, x.stride())

    @staticmethod
    def _back(x):
        return x.cpu() if isinstance(x, torch.Tensor) else tuple(y.cpu() for y in x)


def pytest_generate_tests(metafunc):
    """Tests of `kernels` run on the host, and on the GPU too where it has the kernels."""
    if "kernels" in metafunc.fixturenames:
        where = ["on_host"] + (["on_gpu"] if _extension.cuda_is_loaded() else [])
        metafunc.parametrize("kernels", where, indirect=True, scope="session")


@pytest.fixture(scope="session")
def kernels(request):
    return request.getfixturevalue("on_host") if request.param == "on_host" else OnGpu()


@pytest.fixture
def thread_order(library_on_host):
    """A function that sets the order in which threads run between barriers: 0 ascending, 1 descending, else a seed.

    Odd ones make asynchronous copies at once, even ones when they are waited for.
    """
    set_order = ctypes.CDLL(library_on_host).longvq_on_host_set_order
    set_order.argtypes, set_order.restype = [ctypes.c_uint64], None
    yield set_order
    set_order(0)
