"""Replaced models and inputs for distillation, and snapshots of what must stay."""

import torch
from torch import nn

from longvq_layers.replace import replace_attention
from tests.replace.models import COARSE, FAMILIES, encoder, output, tokens

QUICK = {"steps": 12, "evaluate_every": 4}


def batches(family: str, count: int = 5, length: int = 61) -> list:
    """Inputs for one of the tiny models."""
    if family == "encoder":
        generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
        return [torch.randn(2, length, 32, generator=generator) for generator in generators]
    return [tokens(2, length, seed) for seed in range(count)]


def replaced(family: str = "bert", **options) -> tuple[nn.Module, list]:
    torch.manual_seed(0)
    model, data = encoder() if family == "encoder" else FAMILIES[family](), batches(family)
    replace_attention(model, **{**COARSE, **options}, calibration=data[:2])
    return model, data


def run(model: nn.Module, x) -> torch.Tensor:
    with torch.no_grad():
        return model(x) if isinstance(x, torch.Tensor) and x.is_floating_point() else output(model, x)


def snapshot(model: nn.Module) -> list:
    """All values, modes, flags and gradients."""
    tensors = [*model.parameters(), *model.buffers()]
    modules = [(type(module), module.training, sorted(module._modules)) for module in model.modules()]
    hooks = [(list(module._forward_hooks), list(module._forward_pre_hooks)) for module in model.modules()]
    return [[(t.detach().clone(), t.requires_grad, t.grad) for t in tensors], modules, hooks]


def same(a: list, b: list) -> bool:
    tensors = zip(a[0], b[0], strict=True)
    return a[1:] == b[1:] and all(torch.equal(x[0], y[0]) and x[1:] == y[1:] for x, y in tensors)
