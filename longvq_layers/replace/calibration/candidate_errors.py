"""How far a fitted attention is from the original one, summed over the calibration inputs."""

import torch
from torch import Tensor

from longvq_layers.replace.slot.context import FarQueryKey
from longvq_layers.replace.slot.swapped import SwappedAttention


class CandidateErrors:
    """Errors of one candidate: of its keys, and of its output with each gain on the spread of the codes.

    Args:
        candidate: the fitted attention, in eval mode.
        gains: the gains that are tried; without variance correction only the first is.
    """

    def __init__(self, candidate: SwappedAttention, gains: tuple[float, ...]) -> None:
        self.candidate = candidate
        self.gains = gains if candidate.variance_correction else gains[:1]
        self._tokens = 0
        self._output_square = 0.0
        self._key_error = 0.0
        self._output_errors: Tensor | None = None  # (gains, H) float64, squared errors
        self._key_square: Tensor | None = None  # (Hkv, D) float64
        self._key_sum: Tensor | None = None  # (Hkv, D) float64

    def add(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        output: Tensor,
        real: Tensor,
        *,
        far: FarQueryKey | None,
        causal: bool,
        scale: float | None,
    ) -> None:
        """Add one call; `output` (B, H, L, E) of the original attention, `real` (B, L) False = padding."""
        candidate = self.candidate
        rows = real[:, None, :, None]
        errors = []
        for gain in self.gains:
            candidate.spread_gain.fill_(gain)
            swapped = candidate(q, k, v, ~real, far=far, causal=causal, scale=scale)
            errors.append(((swapped - output) * rows).double().square().sum((0, 2, 3)))
        self._output_errors = _sum(self._output_errors, torch.stack(errors))
        self._output_square += (output * rows).double().square().sum().item()
        keys = candidate.in_metric(k if far is None else far[1])  # (B, Hkv, L, D)
        codes = candidate.codebook(keys, ~real)
        index = codes.transpose(0, 1).flatten(1).unsqueeze(-1).expand(-1, -1, keys.shape[-1])
        coded = candidate.codebook.embedding.gather(1, index)  # (Hkv, B·L, D)
        keys, mask = keys.transpose(0, 1).flatten(1, 2).double(), real.flatten()[None, :, None]
        self._key_error += ((keys - coded) * mask).square().sum().item()
        self._tokens += int(real.sum())
        self._key_square = _sum(self._key_square, (keys * mask).square().sum(1))
        self._key_sum = _sum(self._key_sum, (keys * mask).sum(1))

    def key_error(self) -> float:
        """The share of the keys' variance that the codes miss."""
        if not self._tokens or self._key_square is None or self._key_sum is None:
            return 0.0
        variance = (self._key_square - self._key_sum.square() / self._tokens).sum().item()
        return 0.0 if variance <= 0 else self._key_error / variance  # NaN stays NaN

    def output_error(self) -> float:
        """‖swapped − original‖ / ‖original‖, each head with its best gain."""
        if self._output_square == 0:
            return 0.0
        error = self._output_errors.amin(0).sum().item() if self._tokens and self._output_errors is not None else 0.0
        return (error / self._output_square) ** 0.5

    @torch.no_grad()
    def choose_gains(self) -> None:
        """Give every head of the candidate its best gain. With a single gain the candidate stays unchanged."""
        gain, errors = self.candidate.spread_gain, self._output_errors
        if errors is not None and len(errors) > 1:
            gain.copy_(gain.new_tensor(self.gains)[errors.argmin(0).to(gain.device)])


def _sum(total: Tensor | None, x: Tensor) -> Tensor:
    return x if total is None else total + x
