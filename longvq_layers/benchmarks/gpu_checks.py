"""The CUDA kernels against the PyTorch backend in float64, and layers against the CPU, without any test package."""

import copy
import random
from collections.abc import Callable

import torch
from torch import Tensor, nn

from longvq_layers import LongVQBlock, S4DLayer, VQAttention
from longvq_layers.ops._attention_inputs import AttentionInputs
from longvq_layers.ops._attention_options import Activation, AttentionOptions, KeyGrad, LocalKeys

# Relative to the largest number of the right result: some roundings of 8, 11 or 24 bits.
_BOUNDS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def run(device: str, count: int, namespace: object = None) -> str:
    """Check `count` calls of every operator; raises AssertionError with those that are wrong.

    Args:
        device: of the tensors.
        count: of calls.
        namespace: of the operators, default those of the compiled kernels, `torch.ops.longvq`.
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
                error = _error(actual, expected)
                worst[key] = max(worst.get(key, 0.0), error)
                if not error <= _BOUNDS[dtype]:
                    wrong.append(f"{key}: {error:.3g} in call {number}: {what}")
    lines = ["| result | largest error | bound |", "|:---|---:|---:|"]
    for key in sorted(worst):
        lines.append(f"| {key} | {worst[key]:.2g} | {_BOUNDS[getattr(torch, key.split()[-1])]:g} |")
    if wrong:
        raise AssertionError(f"{len(wrong)} results are wrong:\n" + "\n".join(wrong[:20]))
    return "\n".join(lines)


def layers(device: str) -> str:
    """The layers with their default backend on that device against the CPU, in float64: outputs and gradients.

    Raises:
        AssertionError: they differ; says where.
    """
    torch.manual_seed(0)
    width, options = 32, {"num_codes": 16, "window": 8, "dtype": torch.float64}
    cases = {
        "VQAttention": VQAttention(width, 4, num_kv_heads=2, **options),
        "VQAttention, causal, exact": VQAttention(width, 4, causal=True, local_keys="exact", **options),
        "S4DLayer": S4DLayer(width, dtype=torch.float64),
        "S4DLayer, causal": S4DLayer(width, causal=True, dtype=torch.float64),
        "LongVQBlock": LongVQBlock(width, **options),
        "LongVQBlock, causal, laplace, recompute": LongVQBlock(
            width, causal=True, activation="laplace", recompute=True, **options
        ),
    }
    x = torch.randn(2, 70, width, dtype=torch.float64)
    padding = torch.zeros(2, 70, dtype=torch.bool)
    padding[1, 60:] = True
    lines, wrong = ["| layer | difference of outputs | of gradients |", "|:---|---:|---:|"], []
    for name, layer in cases.items():
        layer(x)  # in training mode, for codebooks to have codes
        layer.eval()
        results = [_run_layer(copy.deepcopy(layer).to(there), x, padding, there) for there in ("cpu", device)]
        errors = [_error(actual, expected) for expected, actual in zip(*results, strict=True)]
        lines.append(f"| {name} | {errors[0]:.2g} | {max(errors[1:]):.2g} |")
        if not max(errors) <= 1e-9:
            wrong.append(lines[-1])
    if wrong:
        raise AssertionError("layers differ from the CPU:\n" + "\n".join(wrong))
    return "\n".join(lines)


def _run_layer(layer: nn.Module, x: Tensor, padding: Tensor, device: str) -> list[Tensor]:
    """Output, and the gradients of the input and of each parameter, on the CPU."""
    x = x.to(device).requires_grad_()
    y = layer(x, key_padding_mask=padding.to(device))
    inputs = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    gradients = torch.autograd.grad(y.square().sum(), inputs, allow_unused=True)
    return [y.detach().cpu(), *(g.cpu() for g in gradients if g is not None)]


def _error(actual: Tensor, expected: Tensor) -> float:
    if not expected.numel():
        return 0.0
    difference = (actual.to(expected.dtype) - expected).abs().max() / (1 + expected.abs().max())
    return float(difference) if torch.isfinite(difference) else float("inf")


def _precise(x: object) -> object:
    if not isinstance(x, Tensor):
        return x
    return x.to(torch.complex128) if x.is_complex() else x.double() if x.is_floating_point() else x


def _pairs(call: Callable, arguments: tuple, names: tuple[str, ...]) -> dict[str, tuple[Tensor, Tensor]]:
    actual, expected = (call(*each) for each in ((False, *arguments), (True, *map(_precise, arguments))))
    return {name: pair for name, *pair in zip(names, actual, expected, strict=True)}


def _documents(draw: random.Random, length: int, device: str) -> Tensor | None:
    """Offsets of some documents, empty ones too, or None."""
    if draw.random() < 0.7:
        return None
    inner = sorted(draw.randint(0, length) for _ in range(draw.choice([0, 1, 5, 40])))
    return torch.tensor([0, *inner, length], dtype=torch.int32, device=device)


def _assign(draw: random.Random, dtype: torch.dtype, device: str, namespace: object) -> tuple[str, dict]:
    depth, codes, length = draw.choice([8, 64, 100, 128]), draw.choice([1, 33, 200, 512]), draw.choice([1, 65, 300])
    k = torch.randn(2, 2, length, depth, device=device).to(dtype)
    codebook = torch.randn(2, codes, depth, device=device)
    found = namespace.vq_assign(k, codebook)
    distances = torch.cdist(k.double(), codebook.double().expand(2, -1, -1, -1))
    nearest = distances.amin(-1)
    return f"depth {depth}, codes {codes}, length {length}", {
        "distance": (distances.gather(-1, found[..., None])[..., 0], nearest)
    }


def _attention(draw: random.Random, dtype: torch.dtype, device: str, namespace: object) -> tuple[str, dict]:
    kv_heads, group, length = (
        draw.choice([1, 2]),
        draw.choice([1, 2]),
        draw.choice([1, 64, 129, 300, 2200 if device == "cuda" else 200]),
    )
    depth, values, codes = draw.choice([16, 64, 128]), draw.choice([24, 64, 128, 200]), draw.choice([1, 60, 300])
    causal, window = draw.random() < 0.5, draw.choice([0, 3, 64, 150])
    laplace = draw.random() < 0.2 and dtype != torch.float16
    exact, near_dim = draw.random() < 0.5, 0
    if exact and causal and draw.random() < 0.3:
        near_dim = depth // 2
    q = torch.randn(1, kv_heads * group, length, depth, device=device).to(dtype)
    k = torch.randn(1, kv_heads, length, depth, device=device).to(dtype)
    v = torch.randn(1, kv_heads, length, values, device=device).to(dtype)
    far_q = far_k = None
    if near_dim:
        (q, far_q), (k, far_k) = (x.split([near_dim, depth - near_dim], dim=-1) for x in (q, k))
    codebook = torch.randn(kv_heads, codes, depth - near_dim, device=device).to(dtype).float()
    z = torch.randint(codes, (1, kv_heads, length), device=device)
    bias = None
    if window and draw.random() < 0.5:
        bias = torch.randn(kv_heads * group, window if causal else 2 * window - 1, device=device)
    mask = torch.rand(1, length, device=device) < 0.1 if draw.random() < 0.5 else None
    activation = Activation.LAPLACE if laplace else Activation.SOFTMAX
    local_keys = LocalKeys.EXACT if exact else LocalKeys.QUANTIZED
    options = AttentionOptions(depth**-0.5, causal, window, activation, local_keys, KeyGrad.CLUSTER)
    documents = _documents(draw, length, device)
    grad = torch.randn(*q.shape[:3], values, device=device).to(dtype)

    def call(precise: bool, q, k, v, codebook, z, bias, mask, far_q, far_k, grad):
        ops = torch.ops.longvq_torch if precise else namespace
        arguments = (*AttentionInputs(q, k, v, codebook, z, bias, mask, documents, far_q, far_k), *options)
        out, normalizers = ops.vq_attention(*arguments)
        return out, *ops.vq_attention_backward(grad, out, normalizers, *arguments)

    what = (
        f"H {kv_heads * group}, Hkv {kv_heads}, L {length}, D {depth}, E {values}, S {codes}, {options}, "
        f"near {near_dim}, bias {bias is not None}, mask {mask is not None}, documents {documents}"
    )
    names = ("out", "dq", "dk", "dv", "dbias", "dfar_q", "dfar_k")
    return what, _pairs(call, (q, k, v, codebook, z, bias, mask, far_q, far_k, grad), names)


def _scan(draw: random.Random, dtype: torch.dtype, device: str, namespace: object) -> tuple[str, dict]:
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

    def call(precise: bool, u, log_decay, weight, skip, state, mask, grad_y, grad_state):
        ops = torch.ops.longvq_torch if precise else namespace
        arguments = (u, log_decay, weight, skip, state, mask, documents, reverse)
        return *ops.ssm_scan(*arguments), *ops.ssm_scan_backward(grad_y, grad_state, *arguments, True, True)

    what = (
        f"H {channels}, N {modes}, L {length}, skip {skip is not None}, mask {mask is not None}, reverse {reverse}, "
        f"documents {documents}"
    )
    names = ("y", "state", "du", "dlog_decay", "dweight", "dskip", "dinitial")
    return what, _pairs(call, (u, log_decay, weight, skip, state, mask, *grads), names)
