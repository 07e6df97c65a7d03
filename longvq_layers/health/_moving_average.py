"""A reading and its moving average. Both stay on the device of the reading, so that recording waits for no transfer."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_WEIGHT = 0.05  # of a new reading, from the 20th on


@dataclass(frozen=True)
class Reading:
    """Numbers that are recorded repeatedly.

    Attributes:
        last: the latest numbers, one per head or kind.
        mean: their moving average, over about the last 20 readings.
        calls: number of readings.
    """

    last: tuple[float, ...] = ()
    mean: tuple[float, ...] = ()
    calls: int = 0

    @property
    def average(self) -> float:
        """The moving average, averaged over all heads; NaN before the first reading."""
        seen = [value for value in self.mean if not math.isnan(value)]
        return sum(seen) / len(seen) if seen else math.nan


class MovingAverage:
    """Keeps the last of several tensors (n,) and their moving average, which ignores NaN."""

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
        if self.last is None or self.mean is None:
            return Reading()
        return Reading(tuple(self.last.tolist()), tuple(self.mean.tolist()), self.calls)
