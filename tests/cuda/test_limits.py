"""The limits in `ops/_cuda_limits.py` are the limits of the CUDA kernels."""

import ctypes
from collections import defaultdict
from types import SimpleNamespace

import pytest
import shared_memory
import torch

from longvq_layers import _extension
from longvq_layers.ops import _cuda_limits, _dispatch
from tests.ops.vq.operator_calls import attention_arguments

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """The properties of a GPU with 163 KB of shared memory, as on sm_80."""
    properties = SimpleNamespace(shared_memory_per_block_optin=163 << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return properties


@pytest.fixture
def planned(on_host, library_on_host):
    """The operators on the host, with launches that are recorded instead of run."""
    library = ctypes.CDLL(library_on_host)
    library.longvq_on_host_begin_plan()
    yield on_host
    library.longvq_on_host_end_plan()


def test_shared_bytes_are_those_of_the_kernels(on_host, library_on_host):
    largest = defaultdict(dict)
    for launch in shared_memory.launches(on_host, library_on_host):
        of_op = largest[launch.op]
        of_op[launch.case] = max(launch.bytes, of_op.get(launch.case, 0))
    assert largest == _cuda_limits.SHARED_BYTES
    assert max(max(of_op.values()) for of_op in largest.values()) <= 163 << 10  # on sm_80


ATTENTION = {
    "rows": 1,
    "heads": 1,
    "length": 1,
    "head_dim": 16,
    "value_dim": 16,
    "dtype": torch.float32,
    "documents": None,
}


def attention(namespace, activation="softmax", **sizes):
    """The reason why the limits decline these sizes, and whether the kernels accept them."""
    s = SimpleNamespace(**{**ATTENTION, **sizes})
    q = torch.empty(s.rows, s.heads, s.length, s.head_dim, dtype=s.dtype)
    v = torch.empty(s.rows, s.heads, s.length, s.value_dim, dtype=s.dtype)
    offsets = None if s.documents is None else torch.zeros(s.documents + 1, dtype=torch.int32)
    codes = torch.zeros(s.rows, s.heads, s.length, dtype=torch.int64)
    codebook = torch.empty(s.heads, 1, s.head_dim)
    args = attention_arguments(q, q, v, codebook, codes, cu_seqlens=offsets, causal=True, activation=activation)

    def call():
        namespace.vq_attention_backward(v, *namespace.vq_attention(*args), *args)

    return _cuda_limits.attention(q, v, None, offsets, activation), accepts(call)


def accepts(call):
    try:
        call()
    except RuntimeError as error:
        assert "CUDA kernel" in str(error)
        return False
    return True


@pytest.mark.parametrize(
    ("most", "more", "reason"),
    [
        ({"head_dim": 128}, {"head_dim": 129}, "D must be at most 128 for the CUDA kernels, got 129"),
        ({"activation": "laplace", "dtype": torch.bfloat16}, {"activation": "laplace", "dtype": torch.half}, "range"),
        (
            {"rows": 65_535, "head_dim": 1, "value_dim": 1},
            {"rows": 65_536, "head_dim": 1, "value_dim": 1},
            "got 65,536",
        ),
        (
            {"documents": 65_535},
            {"documents": 65_536},
            "segments of rows or documents must be at most 65,535 for the CUDA kernels, got 65,536",
        ),
        ({"documents": 65_534, "length": 1024}, {"documents": 65_535, "length": 1024}, "got 65,536"),
        (
            {"heads": 257, "value_dim": 255},
            {"heads": 512, "value_dim": 128},
            "H * E must be at most 65,535 for the CUDA kernels, got 65,536",
        ),
    ],
)
def test_attention(planned, most, more, reason):
    assert attention(planned, **most) == (None, True)
    why, took = attention(planned, **more)
    assert reason in why and not took


@pytest.mark.parametrize(
    ("most", "more", "reason"),
    [
        ((1, 1, 1, 256), (1, 1, 1, 257), "D must be at most 256 for the CUDA kernels, got 257"),
        ((65_535, 1, 1, 1), (65_536, 1, 1, 1), "B must be at most 65,535 for the CUDA kernels, got 65,536"),
        ((1, 65_535, 1, 1), (1, 65_536, 1, 1), "H must be at most 65,535 for the CUDA kernels, got 65,536"),
    ],
)
def test_assign(planned, most, more, reason):
    def both(sizes):
        k, codebook = torch.empty(sizes), torch.empty(sizes[1], 1, sizes[3])
        return _cuda_limits.assign(k), accepts(lambda: planned.vq_assign(k, codebook))

    assert both(most) == (None, True)
    why, took = both(more)
    assert reason in why and not took


@pytest.mark.parametrize(
    ("most", "more", "reason"),
    [
        ((1, 32, None), (1, 33, None), "N must be at most 32 for the CUDA kernels, got 33"),
        ((65_535, 1, None), (65_536, 1, None), "got 65,536"),
        ((1, 1, 65_535), (1, 1, 65_536), "got 65,536"),
    ],
)
def test_scan(planned, most, more, reason):
    def both(rows, modes, documents):
        u, decay = torch.empty(rows, 1, 1), torch.empty(1, modes)
        offsets = None if documents is None else torch.zeros(documents + 1, dtype=torch.int32)
        args = (u, decay, decay, None, None, None, offsets, False)
        grad_state = torch.empty(documents or rows, 1, modes)

        def call():
            planned.ssm_scan(*args)
            planned.ssm_scan_backward(u, grad_state, *args, True, True)

        return _cuda_limits.scan(u, modes, offsets), accepts(call)

    assert both(*most) == (None, True)
    why, took = both(*more)
    assert reason in why and not took


def test_a_gpu_with_less_shared_memory(gpu):
    gpu.shared_memory_per_block_optin = 99 << 10
    wide, narrow = torch.empty(1, 1, 1, 128), torch.empty(1, 1, 1, 64)
    message = "need 138,240 bytes of shared memory for these sizes, this GPU has 101,376"
    assert message in _cuda_limits.attention(wide, wide, None, None, "softmax")
    assert _cuda_limits.attention(wide.bfloat16(), wide, None, None, "softmax") is None
    assert "138,240" not in _cuda_limits.attention(narrow, wide, None, None, "softmax")
    assert _cuda_limits.attention(narrow, narrow, None, None, "softmax") is None
    assert "124,928" in _cuda_limits.scan(torch.empty(1, 1, 1, dtype=torch.bfloat16), 17, None)
    assert _cuda_limits.scan(torch.empty(1, 1, 1, dtype=torch.bfloat16), 16, None) is None


def test_declined_calls_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(_extension, "_cuda_library", object())
    with pytest.raises(NotImplementedError, match="can't serve this call: it is too wide"):
        _dispatch.choose("vq_attention", "native", CUDA, (torch.float32,), lambda: "it is too wide")
    monkeypatch.setattr(_dispatch, "UNPROVEN", ())
    assert _dispatch.choose("vq_attention", "auto", CUDA, (torch.float32,), lambda: "it is too wide") == "torch"
    assert _dispatch.choose("vq_attention", "auto", CUDA, (torch.float32,), lambda: None) == "native"
    assert _dispatch.choose("vq_attention", "auto", torch.device("cpu"), (torch.float32,), lambda: "") == "native"
