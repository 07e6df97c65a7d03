"""The size of the gradients of a model, by block and kind of parameter."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from longvq_layers import _checks as check
from longvq_layers.health import _text
from longvq_layers.health._model_parts import KINDS, Part, parts


@dataclass(frozen=True)
class GradientRow:
    """The parameters of one kind in one block.

    Attributes:
        block: name of the block in the model; None for parameters outside of all blocks.
        kind: "ssm", "codebook/keys" (the projection of the keys and the window bias), "attention" (queries, values,
            output), "gates", "feed-forward" or "embedding/other".
        grad_norm: ‖g‖ over all these parameters; NaN if none has a gradient.
        param_norm: ‖w‖ of the parameters that have a gradient.
        ratio: ‖g‖ / ‖w‖, NaN for ‖w‖ = 0.
        rms: ‖g‖ / √(number of elements).
        bad: names of the parameters with NaN or infinity in their gradient.
    """

    block: str | None
    kind: str
    grad_norm: float
    param_norm: float
    ratio: float
    rms: float
    bad: tuple[str, ...]

    @property
    def name(self) -> str:
        """The block as text."""
        return "(outside of blocks)" if self.block is None else _text.module(self.block)


class GradientTable(list[GradientRow]):
    """A list of `GradientRow`; `print` shows a line per block, a column per kind, and in a cell ‖g‖/‖w‖ and (RMS)."""

    @property
    def any_nonzero(self) -> bool:
        """Whether any gradient is not 0."""
        return any(row.grad_norm > 0 or row.bad for row in self)

    def __str__(self) -> str:
        kinds = [kind for kind in KINDS if any(row.kind == kind for row in self)]
        cells = {(row.name, row.kind): f"{_text.number(row.ratio)} ({_text.number(row.rms)})" for row in self}
        names = list(dict.fromkeys(row.name for row in self))
        lines = [[name, *(cells.get((name, kind), "") for kind in kinds)] for name in names]
        return _text.table(["‖g‖/‖w‖ (rms g)", *kinds], lines)


@torch.no_grad()
def gradient_scales(model: nn.Module) -> GradientTable:
    """Gradients relative to parameters, by block and kind; call it between `backward()` and `zero_grad()`.

    With a `torch.amp.GradScaler` call `scaler.unscale_(optimizer)` first; otherwise the gradients are scaled.

    Args:
        model: any module. Parameters without `requires_grad` are left out; shared parameters count once.

    Returns:
        A list of `GradientRow`; `print` shows a table with one line per block.

    Raises:
        TypeError: `model` is not a module.

    Example:
        >>> import longvq_layers
        >>> block = longvq_layers.LongVQBlock(16, num_codes=8, d_state=8)
        >>> block(torch.randn(2, 40, 16)).square().mean().backward()
        >>> [row.kind for row in gradient_scales(block)]
        ['ssm', 'codebook/keys', 'attention', 'gates', 'feed-forward', 'embedding/other']
    """
    check.module("gradient_scales", "model", model)
    groups: dict[tuple[str | None, str], list[Part]] = {}
    for part in parts(model):
        if part.parameter.requires_grad and not part.parameter.is_meta:
            groups.setdefault((part.block, part.kind), []).append(part)
    names = list(dict.fromkeys(block for block, _ in groups))
    order = sorted(groups, key=lambda key: (names.index(key[0]), KINDS.index(key[1])))
    squares = _squares([part.parameter for key in order for part in groups[key]])
    return GradientTable(_row(*key, groups[key], squares) for key in order)


def _squares(parameters: list[Tensor]) -> dict[int, tuple[float, float]]:
    """id -> ‖g‖² (undefined without a gradient) and ‖w‖²; reads each device once."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for parameter in parameters:
        by_device.setdefault(parameter.device, []).append(parameter)
    result = {}
    for group in by_device.values():
        norms = [torch.stack([_norm(p if p.grad is None else p.grad), _norm(p)]) for p in group]
        for parameter, (gradient, weight) in zip(group, torch.stack(norms).tolist(), strict=True):
            result[id(parameter)] = gradient**2, weight**2
    return result


def _norm(x: Tensor) -> Tensor:
    x = x.coalesce().values() if x.is_sparse else x
    return torch.linalg.vector_norm(x, dtype=torch.float32 if x.device.type == "mps" else torch.float64)


def _row(block: str | None, kind: str, group: list[Part], squares: dict[int, tuple[float, float]]) -> GradientRow:
    group = [part for part in group if part.parameter.grad is not None]
    gradient = math.sqrt(sum(squares[id(part.parameter)][0] for part in group)) if group else math.nan
    weight = math.sqrt(sum(squares[id(part.parameter)][1] for part in group))
    bad = tuple(part.name for part in group if not math.isfinite(squares[id(part.parameter)][0]))
    size = sum(part.parameter.numel() for part in group)
    return GradientRow(
        block,
        kind,
        gradient,
        weight,
        ratio=gradient / weight if weight else math.nan,
        rms=gradient / math.sqrt(size) if size else math.nan,
        bad=bad,
    )
