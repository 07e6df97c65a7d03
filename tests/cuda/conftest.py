"""The CUDA kernels on the CPU: built once, registered behind operators of their own.

The same source, thread by thread, with barriers, shuffles, tensor core instructions and asynchronous copies as CUDA
defines them (csrc/cuda/on_host). It says nothing of speed, and does not replace a run on a GPU.
"""

import contextlib
import ctypes
import io
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
OPERATORS = ("vq_assign", "vq_attention", "vq_attention_backward", "ssm_scan", "ssm_scan_backward")


@pytest.fixture(scope="session")
def library_on_host():
    sys.path.insert(0, str(ROOT / "csrc" / "build_support"))
    import cuda_library

    with contextlib.redirect_stdout(io.StringIO()):  # the commands of the compiler
        return str(cuda_library.on_host())


@pytest.fixture(scope="session")
def on_host(library_on_host):
    """The operators, `torch.ops.longvq_on_host`."""
    torch.ops.load_library(library_on_host)
    library = torch.library.Library("longvq_on_host", "DEF")
    for name in OPERATORS:
        library.define(str(getattr(torch.ops.longvq, name).default._schema).partition("::")[2])
    yield torch.ops.longvq_on_host
    library._destroy()


@pytest.fixture
def thread_order(library_on_host):
    """A function that sets the order in which threads run between barriers: 0 ascending, 1 descending, else a seed."""
    set_order = ctypes.CDLL(library_on_host).longvq_on_host_set_order
    set_order.argtypes, set_order.restype = [ctypes.c_uint64], None
    yield set_order
    set_order(0)
