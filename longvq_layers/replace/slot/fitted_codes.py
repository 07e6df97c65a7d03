"""The codes of a swapped attention: the metric they were fitted in, their spread, and how they learn."""

from typing import Any

import torch
from torch import Tensor

from longvq_layers.layers.attention.codebook_attention import CodebookAttention
from longvq_layers.layers.codebook.operations import pick
from longvq_layers.layers.common.precision import KeepsFloat32, storage_dtype
from longvq_layers.replace.slot import code_spread
from longvq_layers.replace.slot.metric import in_proportion, roots
from longvq_layers.replace.slot.sequence_codes import sequence_means

NAME = "longvq attention"  # in errors


class FittedCodes(KeepsFloat32, CodebookAttention):
    """Part of `SwappedAttention`: a codebook in the metric of the queries, with the spread of the keys of each code.

        M = E[q qᵀ] per key-value head,  k' = k M^½,  z_j = argmin_s ‖k'_j − C'_s‖²,  C = C' M^-½,  σ_s² = E‖k' − C'_s‖²

    Args:
        sizes: H, Hkv, D.
        num_codes, device, dtype, options: of `CodebookAttention`, without window_bias.

    Buffers:
        to_metric (Hkv, D, D) = M^½, from_metric (Hkv, D, D) = M^-½, spread (Hkv, S) = σ_s² with its moving sums
        spread_sum and spread_count (Hkv, S), spread_gain (H,), and those of `codebook`; all at least float32.
    """

    to_metric: Tensor
    from_metric: Tensor
    spread: Tensor
    spread_sum: Tensor
    spread_count: Tensor
    spread_gain: Tensor

    def __init__(
        self, *sizes: int, num_codes: int, device: torch.device | None, dtype: torch.dtype | None, **options: Any
    ) -> None:
        super().__init__(*sizes, num_codes=num_codes, window_bias=False, device=device, dtype=dtype, **options)
        num_heads, num_kv_heads, head_dim = sizes
        identity = torch.eye(head_dim, device=device, dtype=storage_dtype(dtype)).repeat(num_kv_heads, 1, 1)
        self.register_buffer("to_metric", identity)
        self.register_buffer("from_metric", identity.clone())
        for name in ("spread", "spread_sum", "spread_count"):
            self.register_buffer(name, identity.new_zeros(num_kv_heads, num_codes))
        self.register_buffer("spread_gain", identity.new_ones(num_heads))

    def in_metric(self, k: Tensor) -> Tensor:
        """k' = k M^½ in the dtype of the codebook: (B, Hkv, L, D) -> the same shape."""
        return k.to(self.to_metric.dtype) @ self.to_metric

    def codewords(
        self, keys: Tensor, codes: Tensor, table: Tensor, key_padding_mask: Tensor | None, causal: bool
    ) -> tuple[Tensor, Tensor]:
        """C and σ², as the scores of one call use them.

        Args:
            keys: (B, Hkv, L, D), k' of the call.
            codes: (B, Hkv, L), z.
            table: (Hkv, S, D), C'.
            key_padding_mask: (B, L) bool, True = ignore, or None.
            causal: True gives codewords of the codebook, False the means of each sequence's own keys.

        Returns:
            (Hkv, S, D) and (Hkv, S) in causal attention, (B, Hkv, S, D) and (B, Hkv, S) in bidirectional attention.
        """
        if causal:
            return table @ self.from_metric, self.spread
        return self._sequence_codewords(keys, codes, table, key_padding_mask)

    @torch.no_grad()
    def _sequence_codewords(
        self, keys: Tensor, codes: Tensor, table: Tensor, key_padding_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        # No gradient is needed here: `ops.vq_attention` gives each key the gradient of its code's mean.
        means, spread = sequence_means(keys, codes, table, key_padding_mask)
        return means @ self.from_metric, spread

    @torch.no_grad()
    def fit_(
        self,
        keys: Tensor,
        second_moment: Tensor,
        *,
        weight: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Fit the metric and the codes.

        With `weight`, one half of the fitted set is every key once. In the other half a key occurs in proportion to its
        weight. The second half alone would leave most keys without a code nearby, because a few keys have most of the
        weight.

        Args:
            keys: (Hkv, N, D).
            second_moment: (Hkv, D, D) = E[q qᵀ].
            weight: (Hkv, N) ≥ 0, default none.
            generator: of the random start, default torch's own.
        """
        to_metric, from_metric = roots(second_moment)
        self.to_metric.copy_(to_metric)
        self.from_metric.copy_(from_metric)
        keys = self.in_metric(keys)
        if weight is not None:
            keys = torch.cat([keys, pick(keys, in_proportion(weight))], dim=1)
        self.codebook.initialize_(keys, generator=generator)
        codes, table = self.codebook.eval().quantize(keys.unsqueeze(0))
        self._learn_spread(keys.unsqueeze(0), codes, table, None)
        self._refresh_spread()

    @torch.no_grad()
    def sync_ema(self) -> None:
        """Let the moving averages continue from the codes and spread that gradients have trained."""
        self.codebook.ema_sum.copy_(self.codebook.embedding * self.codebook.ema_count.unsqueeze(-1))
        self.spread_sum.copy_(self.spread * self.spread_count)

    def check_codes(self) -> None:
        """Raise RuntimeError in eval mode if the codebook has no codes."""
        if not self.training and not self.codebook._ready:
            raise RuntimeError(
                f"{NAME}: the codebook has no codes yet; call replace_attention with calibration=, run one batch in "
                "training mode, or load a state_dict that has codes"
            )

    @torch.no_grad()
    def _learn_spread(self, keys: Tensor, codes: Tensor, table: Tensor, key_padding_mask: Tensor | None) -> None:
        """Updates the moving sums.

        `spread` follows in the next call, so that a recomputed forward sees the same one.
        """
        sums, counts = code_spread.spread_sums(keys, codes, table, key_padding_mask)
        sums, counts = self.codebook.group.sum(sums.squeeze(-1), counts)
        self.spread_sum.lerp_(sums, 1 - self.codebook.decay)
        self.spread_count.lerp_(counts, 1 - self.codebook.decay)

    def _refresh_spread(self) -> None:
        self.spread.copy_(code_spread.mean_spread(self.spread_sum, self.spread_count))
