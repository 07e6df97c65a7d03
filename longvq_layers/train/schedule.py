"""The schedule of the learning rate."""

import math

from torch.optim import Optimizer


class Schedule:
    """A linear warm-up, then a cosine to a tenth.

    Args:
        optimizer: its learning rates are the peaks.
        warmup: steps below the peak.
    """

    def __init__(self, optimizer: Optimizer, warmup: int) -> None:
        self.optimizer, self.warmup = optimizer, warmup
        self._peaks = [group["lr"] for group in optimizer.param_groups]

    def set_rates(self, step: int, share: float) -> float:
        """Set the learning rates of a step, and return their share of the peaks.

        Args:
            step: the number of steps before this one.
            share: of the training that is done. The cosine ends at 1.
        """
        warmup = min(1.0, (step + 1) / (self.warmup + 1))
        rate = warmup * (0.55 + 0.45 * math.cos(math.pi * min(share, 1.0)))
        for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * rate
        return rate
