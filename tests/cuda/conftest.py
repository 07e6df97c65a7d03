"""Fixtures that run the CUDA kernels: on the CPU, and also on a GPU if the CUDA library is loaded.

On the CPU the same sources run thread by thread, with barriers, shuffles, tensor core instructions and asynchronous
copies as CUDA defines them (csrc/cuda/on_host). They are built once, and registered as torch.ops.longvq_on_host. These
runs show nothing about speed, and don't replace a run on a GPU.
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
    with contextlib.redirect_stdout(io.StringIO()):  # hides the commands of the compiler
        return str(cuda_library.on_host())


@pytest.fixture(scope="session")
def on_host(library_on_host):
    """`torch.ops.longvq_on_host`."""
    defined = shared_memory.define_on_host(library_on_host)
    yield defined.ops
    defined.close()


class OnGpu:
    """The compiled operators, with tensors copied to the GPU and back."""

    def __getattr__(self, name):
        return lambda *args: self._to_cpu(getattr(torch.ops.longvq, name)(*map(self._to_gpu, args)))

    @staticmethod
    def _to_gpu(x):
        if not isinstance(x, torch.Tensor):
            return x
        x = x.resolve_conj()
        # Keeps the strides, also of expanded tensors, and the offset.
        on_gpu = torch.empty(0, dtype=x.dtype, device="cuda")
        return on_gpu.set_(x.untyped_storage().cuda(), x.storage_offset(), x.shape, x.stride())

    @staticmethod
    def _to_cpu(x):
        return x.cpu() if isinstance(x, torch.Tensor) else tuple(y.cpu() for y in x)


def pytest_generate_tests(metafunc):
    """Tests that use `kernels` run on the host, and also on the GPU if the CUDA library is loaded."""
    if "kernels" in metafunc.fixturenames:
        where = ["on_host"] + (["on_gpu"] if _extension.cuda_is_loaded() else [])
        metafunc.parametrize("kernels", where, indirect=True, scope="session")


@pytest.fixture(scope="session")
def kernels(request):
    return request.getfixturevalue("on_host") if request.param == "on_host" else OnGpu()


@pytest.fixture
def thread_order(library_on_host):
    """Sets the order of threads and blocks on the host: 0 ascending, 1 descending, others seed a random order.

    With an odd number asynchronous copies happen at once, otherwise when the kernel waits for them.
    """
    set_order = ctypes.CDLL(library_on_host).longvq_on_host_set_order
    set_order.argtypes, set_order.restype = [ctypes.c_uint64], None
    yield set_order
    set_order(0)
