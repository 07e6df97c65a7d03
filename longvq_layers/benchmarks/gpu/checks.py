"""The CUDA kernels against the PyTorch backend in float64, on random calls; needs no test package."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from longvq_layers.ops._attention_inputs import AttentionInputs
from longvq_layers.ops._attention_options import Activation, AttentionOptions, LocalKeys

Pairs = dict[str, tuple[Tensor, Tensor]]
"""Name of a result -> actual and expected."""

# Bounds of differences, relative to 1 + the largest value: a few roundings to 24, 11 or 8 bits.
_BOUNDS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def run(device: str, count: int, namespace: Any = None) -> str:
    """A table of the largest differences over `count` random calls of every operator.

    Args:
        device: of the tensors.
        count: of calls.
        namespace: of the operators, default that of the compiled kernels, `torch.ops.longvq`.

    Raises:
        AssertionError: results are wrong; lists the calls.
    """
    namespace = torch.ops.longvq if namespace is None else namespace
    worst: dict[str, float] = {}
    wrong = []
    for number in range(count):
        draw = random.Random(number)
        torch.manual_seed(number)
        dtype = draw.choice(list(_BOUNDS))
        for name, check in (("vq_assign", _assign), ("vq_attention", _attention), ("ssm_scan", _scan)):
            what, results = check(draw, dtype, device, namespace)
            for result, (actual, expected) in results.items():
                key = f"{name} {result} {str(dtype).removeprefix('torch.')}"
                error = error_of(actual, expected)
                worst[key] = max(worst.get(key, 0.0), error)
                if not error <= _BOUNDS[dtype]:
                    wrong.append(f"{key}: {error:.3g} in call {number}: {what}")
    lines = ["| result | largest error | bound |", "|:---|---:|---:|"]
    for key in sorted(worst):
        lines.append(f"| {key} | {worst[key]:.2g} | {_BOUNDS[getattr(torch, key.split()[-1])]:g} |")
    if wrong:
        raise AssertionError(f"{len(wrong)} results are wrong:\n" + "\n".join(wrong[:20]))
    return "\n".join(lines)


def error_of(actual: Tensor, expected: Tensor) -> float:
    """The largest difference over 1 + the largest expected value; infinity for NaN."""
    if not expected.numel():
        return 0.0
    difference = (actual.to(expected.dtype) - expected).abs().max() / (1 + expected.abs().max())
    return float(difference) if torch.isfinite(difference) else float("inf")


def _precise(x: object) -> object:
    if not isinstance(x, Tensor):
        return x
    return x.to(torch.complex128) if x.is_complex() else x.double() if x.is_floating_point() else x


def _pairs(call: Callable[..., tuple[Tensor, ...]], arguments: Sequence[object], names: Sequence[str]) -> Pairs:
    """Results of the kernels, and of the PyTorch backend in double precision."""
    actual, expected = call(False, *arguments), call(True, *map(_precise, arguments))
    return dict(zip(names, zip(actual, expected, strict=True), strict=True))


def _documents(draw: random.Random, length: int, device: str) -> Tensor | None:
    """Offsets of some documents, of which some may be empty, or None."""
    if draw.random() < 0.7:
        return None
    inner = sorted(draw.randint(0, length) for _ in range(draw.choice([0, 1, 5, 40])))
    return torch.tensor([0, *inner, length], dtype=torch.int32, device=device)


def _assign(draw: random.Random, dtype: torch.dtype, device: str, namespace: Any) -> tuple[str, Pairs]:
    head_dim, num_codes = draw.choice([8, 64, 100, 128]), draw.choice([1, 33, 200, 512])
    length = draw.choice([1, 65, 300])
    k = torch.randn(2, 2, length, head_dim, device=device).to(dtype)
    codebook = torch.randn(2, num_codes, head_dim, device=device)
    found = namespace.vq_assign(k, codebook)
    distances = torch.cdist(k.double(), codebook.double().expand(2, -1, -1, -1))
    nearest = distances.amin(-1)
    return f"D {head_dim}, S {num_codes}, L {length}", {
        "distance": (distances.gather(-1, found[..., None])[..., 0], nearest)
    }


def _attention(draw: random.Random, dtype: torch.dtype, device: str, namespace: Any) -> tuple[str, Pairs]:
    num_kv_heads, group, length = (
        draw.choice([1, 2]),
        draw.choice([1, 2]),
        draw.choice([1, 64, 129, 300, 2200 if device == "cuda" else 200]),
    )
    head_dim, value_dim = draw.choice([16, 64, 128]), draw.choice([24, 64, 128, 200])
    num_codes = draw.choice([1, 60, 300])
    causal, window = draw.random() < 0.5, draw.choice([0, 3, 64, 150])
    laplace = draw.random() < 0.2 and dtype != torch.float16
    exact, near_dim = draw.random() < 0.5, 0
    if exact and causal and draw.random() < 0.3:
        near_dim = head_dim // 2
    q = torch.randn(1, num_kv_heads * group, length, head_dim, device=device).to(dtype)
    k = torch.randn(1, num_kv_heads, length, head_dim, device=device).to(dtype)
    v = torch.randn(1, num_kv_heads, length, value_dim, device=device).to(dtype)
    far_q = far_k = None
    if near_dim:
        (q, far_q), (k, far_k) = (x.split([near_dim, head_dim - near_dim], dim=-1) for x in (q, k))
    codebook = torch.randn(num_kv_heads, num_codes, head_dim - near_dim, device=device).to(dtype).float()
    z = torch.randint(num_codes, (1, num_kv_heads, length), device=device)
    bias = None
    if window and draw.random() < 0.5:
        bias = torch.randn(num_kv_heads * group, window if causal else 2 * window - 1, device=device)
    mask = torch.rand(1, length, device=device) < 0.1 if draw.random() < 0.5 else None
    activation = Activation.LAPLACE if laplace else Activation.SOFTMAX
    local_keys = LocalKeys.EXACT if exact else LocalKeys.QUANTIZED
    options = AttentionOptions(
        head_dim**-0.5, causal=causal, window=window, activation=activation, local_keys=local_keys
    )
    documents = _documents(draw, length, device)
    grad = torch.randn(*q.shape[:3], value_dim, device=device).to(dtype)

    def call(precise: bool, *tensors: Any) -> tuple[Tensor, ...]:
        ops: Any = torch.ops.longvq_torch if precise else namespace
        q, k, v, codebook, z, bias, mask, far_q, far_k, grad = tensors
        arguments = (*AttentionInputs(q, k, v, codebook, z, bias, mask, documents, far_q, far_k), *options)
        out, normalizers = ops.vq_attention(*arguments)
        return out, *ops.vq_attention_backward(grad, out, normalizers, *arguments)

    what = (
        f"H {num_kv_heads * group}, Hkv {num_kv_heads}, L {length}, D {head_dim}, E {value_dim}, S {num_codes}, "
        f"{options}, near {near_dim}, bias {bias is not None}, mask {mask is not None}, documents {documents}"
    )
    names = ("out", "dq", "dk", "dv", "dbias", "dfar_q", "dfar_k")
    return what, _pairs(call, (q, k, v, codebook, z, bias, mask, far_q, far_k, grad), names)


def _scan(draw: random.Random, dtype: torch.dtype, device: str, namespace: Any) -> tuple[str, Pairs]:
    channels, modes, length = (
        draw.choice([1, 9, 64]),
        draw.choice([1, 16, 32]),
        draw.choice([1, 33, 1024, 1100, 9000 if device == "cuda" else 2000]),
    )
    size = -torch.rand(channels, modes, device=device) * draw.choice([1e-3, 1.0])
    log_decay = torch.complex(size, torch.randn(channels, modes, device=device))
    weight = torch.randn(channels, modes, dtype=torch.complex64, device=device) / modes
    skip = torch.randn(channels, device=device) if draw.random() < 0.5 else None
    documents = _documents(draw, length, device)
    rows, states = (2, 2) if documents is None else (1, len(documents) - 1)
    state = torch.randn(states, channels, modes, dtype=torch.complex64, device=device)
    u = torch.randn(rows, length, channels, device=device).to(dtype)
    mask = torch.rand(rows, length, device=device) < 0.1 if draw.random() < 0.5 else None
    reverse = draw.random() < 0.5
    grads = torch.randn_like(u), torch.randn_like(state)

    def call(precise: bool, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        ops: Any = torch.ops.longvq_torch if precise else namespace
        *inputs, grad_y, grad_state = tensors
        arguments = (*inputs, documents, reverse)
        return *ops.ssm_scan(*arguments), *ops.ssm_scan_backward(grad_y, grad_state, *arguments, True, True)

    what = (
        f"H {channels}, N {modes}, L {length}, skip {skip is not None}, mask {mask is not None}, reverse {reverse}, "
        f"documents {documents}"
    )
    names = ("y", "state", "du", "dlog_decay", "dweight", "dskip", "dinitial")
    return what, _pairs(call, (u, log_decay, weight, skip, state, mask, *grads), names)
