"""The layers on a GPU against the CPU, in float64."""

import copy

import torch
from torch import Tensor, nn

from longvq_layers import LongVQBlock, S4DLayer, VQAttention
from longvq_layers.benchmarks.gpu.checks import error_of

_BOUND = 1e-9  # relative to 1 + the largest value


def check(device: str) -> str:
    """A table of the differences between a device, with the default backend, and the CPU.

    Raises:
        AssertionError: an output or a gradient differs; names the layer.
    """
    torch.manual_seed(0)
    width, float64 = 32, torch.float64
    cases = {
        "VQAttention": VQAttention(width, 4, num_kv_heads=2, num_codes=16, window=8, dtype=float64),
        "VQAttention, causal, exact": VQAttention(
            width, 4, causal=True, local_keys="exact", num_codes=16, window=8, dtype=float64
        ),
        "S4DLayer": S4DLayer(width, dtype=float64),
        "S4DLayer, causal": S4DLayer(width, causal=True, dtype=float64),
        "LongVQBlock": LongVQBlock(width, num_codes=16, window=8, dtype=float64),
        "LongVQBlock, causal, laplace, recompute": LongVQBlock(
            width, causal=True, activation="laplace", recompute=True, num_codes=16, window=8, dtype=float64
        ),
    }
    x = torch.randn(2, 70, width, dtype=float64)
    padding = torch.zeros(2, 70, dtype=torch.bool)
    padding[1, 60:] = True
    lines, wrong = ["| layer | difference of outputs | of gradients |", "|:---|---:|---:|"], []
    for name, layer in cases.items():
        layer(x)  # in training mode, so that the codebooks get codes
        layer.eval()
        results = [_run_layer(copy.deepcopy(layer).to(there), x, padding, there) for there in ("cpu", device)]
        errors = [error_of(actual, expected) for expected, actual in zip(*results, strict=True)]
        lines.append(f"| {name} | {errors[0]:.2g} | {max(errors[1:]):.2g} |")
        if not max(errors) <= _BOUND:
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
