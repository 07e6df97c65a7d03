"""A reading and its moving average, kept on the device it was taken on: nothing waits for it until it is asked for."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_WEIGHT = 0.05  # of a new reading, once there are 20


@dataclass(frozen=True)
class Reading:
    """Numbers that were recorded again and again.

    Attributes:
        last: the latest ones, one per head or kind.
        mean: their moving average, over about the last 20.
        calls: how often they were recorded.
    """

    last: tuple[float, ...] = ()
    mean: tuple[float, ...] = ()
    calls: int = 0

    @property
    def average(self) -> float:
        """The moving average over all heads, NaN before the first reading."""
        seen = [value for value in self.mean if not math.isnan(value)]
        return sum(seen) / len(seen) if seen else math.nan


class Running:
    """Takes tensors (n,) and keeps the last one and a moving average; NaN leaves the average as it was."""

    def __init__(self) -> None:
        self.last: Tensor | None = None
        self.mean: Tensor | None = None
        self.calls = 0

    def update(self, value: Tensor) -> None:
        value = value.detach()
        self.calls += 1
        if self.mean is None or self.mean.shape != value.shape:
            self.last = self.mean = value
            return
        mean = self.mean.to(value)
        moved = mean + max(1 / self.calls, _WEIGHT) * (value - mean)
        self.mean = torch.where(value.isnan(), mean, torch.where(mean.isnan(), value, moved))
        self.last = value

    def read(self) -> Reading:
        if self.last is None:
            return Reading()
        return Reading(tuple(self.last.tolist()), tuple(self.mean.tolist()), self.calls)
