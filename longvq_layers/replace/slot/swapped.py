"""The swapped attention of one module: attention over codes, in one call or token by token."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longvq_layers import ops
from longvq_layers.layers.codebook.operations import pick
from longvq_layers.layers.common.context import no_autocast, recomputing
from longvq_layers.layers.streaming import step_checks
from longvq_layers.layers.streaming.gaps import order_without_gaps, put_back, reorder
from longvq_layers.replace.slot import code_spread, far_limit
from longvq_layers.replace.slot.attention_slot import AttentionSlot, find_slot
from longvq_layers.replace.slot.clamped_rotary import ClampedRotary
from longvq_layers.replace.slot.context import FarQueryKey
from longvq_layers.replace.slot.fitted_codes import NAME, FittedCodes
from longvq_layers.replace.slot.sequence_codes import vq_attention_by_sequence
from longvq_layers.replace.slot.settings import CarriesSettings
from longvq_layers.replace.slot.state import SwappedState


class SwappedAttention(AttentionSlot, CarriesSettings, FittedCodes):
    """Attention over quantised keys whose codes were fitted in the metric of the queries.

        M = E[q qᵀ] per key-value head,  k' = k M^½,  z_j = argmin_s ‖k'_j − C'_s‖²,  C = C' M^-½

    ‖k' − C'‖² is the expected square of a score's error, so more codes lie in the directions of queries. The scores use
    q, k and C as they are; M^½ only decides which code a key gets. Without calibration M is the identity.

    With `variance_correction` a code also carries the spread of its keys, σ_s² = E‖k' − C'_s‖². The mean of exp over
    unequal keys exceeds exp of their mean; to second order the factor is exp(½ scale² σ_s² ‖q'‖² / D), q' = q M^-½.
    This is one more dimension of q (½ scale ‖q'‖² / D) and of C (σ_s²); exact local keys have 0 in it. The second order
    is too large where scores are large, so each head multiplies it by a gain in [0, 1], chosen in calibration.

    In bidirectional attention a codeword and its spread are those of the sequence's own keys: the codebook only decides
    which keys share a code. The cost stays linear, and the result is much closer to the original attention. In causal
    attention codewords and spread are the calibrated ones, because the mean of the sequence's keys would leak the
    future.

    `far` gives queries and keys a second time, without their positions; the codes then belong to these keys. With
    `trained_length`, a query that has N > n = trained_length − W far keys gives each the weight n / N (far_limit.py).
    This adds another dimension to q and C.

    Args:
        num_heads: H, query heads.
        num_kv_heads: Hkv, key-value heads.
        head_dim: D.
        num_codes, window, local_keys, backend, device, dtype: see `CodebookAttention`.
        variance_correction: whether a code carries the spread of its keys.
        rotary: with it adapters remove the positions of queries and keys; None if the positions stay.
        trained_length: with rotary, the longest sequence of the model's training; None: far keys always count fully.

    Buffers:
        those of `FittedCodes`.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        num_codes: int,
        window: int,
        local_keys: str,
        variance_correction: bool = True,
        rotary: ClampedRotary | None = None,
        trained_length: int | None = None,
        backend: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_heads,
            num_kv_heads,
            head_dim,
            num_codes=num_codes,
            window=window,
            local_keys=local_keys,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        self.variance_correction = variance_correction
        self.rotary = rotary
        self.trained_length = None if rotary is None else trained_length
        self.has_positions = rotary is not None
        self.contexts = {}

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(H, Hkv, D)."""
        return self.num_heads, self.num_kv_heads, self.head_dim

    @property
    def step_attention(self) -> "SwappedAttention | None":
        """This attention in eval mode; None in training mode, in which `step` is not allowed."""
        return None if self.training else self

    def forward(  # type: ignore[override]  # packed documents (cu_seqlens) are not offered, far pairs and scale are
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_padding_mask: Tensor | None = None,
        *,
        far: FarQueryKey | None = None,
        causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        """Attend; in training the codebook also learns and the commitment loss is stored.

        In eval mode gradients reach `codebook.embedding`, `spread` and `spread_gain` where these require them.

        Args:
            q: (B, H, L, D).
            k: (B, Hkv, L, D).
            v: (B, Hkv, L, E).
            key_padding_mask: (B, L) bool, True = ignore. In causal attention the window counts tokens, as in `step`:
                padding between tokens takes no place.
            far: queries and keys, shaped like q and k, of the pairs outside the window; default q and k. The codebook
                learns from these keys.
            causal: whether a query sees only itself and the past, default False.
            scale: of the scores, default D ** -0.5.

        Returns:
            (B, H, L, E), dtype of v.
        """
        self.check_codes()
        if causal and key_padding_mask is not None and (order := order_without_gaps(key_padding_mask)) is not None:
            q, k, v = (reorder(x, order) for x in (q, k, v))
            far = None if far is None else (reorder(far[0], order), reorder(far[1], order))
            output = self._attend(q, k, v, key_padding_mask.gather(1, order), far, causal, scale)
            return put_back(output, order)
        return self._attend(q, k, v, key_padding_mask, far, causal, scale)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_padding_mask: Tensor | None,
        far: FarQueryKey | None,
        causal: bool,
        scale: float | None,
    ) -> Tensor:
        with no_autocast(q.device):
            scale = self.head_dim**-0.5 if scale is None else scale
            far_q, far_k = (q, k) if far is None else far
            keys = self.in_metric(far_k)  # k'
            codes, table = self.codebook.quantize(keys, key_padding_mask)  # z, C'
            self.store_commitment(keys, codes, table, key_padding_mask)
            learns = self.training and not self.codebook.frozen and not recomputing()
            if learns:
                self._refresh_spread()
            codewords, spread = self.codewords(keys, codes, table, key_padding_mask, causal)  # C, σ²
            if learns:
                self._learn_spread(keys, codes, table, key_padding_mask)
            codewords = self._extend_codewords(codewords, spread)
            far_q, far_k = self._extend_query_key(far_q, far_k, key_padding_mask, scale)
            has_far_qk = far is not None
            if codewords.requires_grad:
                # The operator gives each far key a share of the gradient of its codeword. This sum passes the shares on
                # to the codeword. Pairs inside the window keep the plain keys: they give the codeword no gradient.
                coded = _at_codes(codewords, codes)
                has_far_qk, far_k = True, far_k + (coded - coded.detach())
            attend = vq_attention_by_sequence if codewords.dim() == 4 else ops.vq_attention
            near, apart = _pairs(q, k, far_q, far_k, has_far_qk, v.dtype)
            return attend(
                *near,
                v,
                codewords,
                far_q=apart[0],
                far_k=apart[1],
                causal=causal,
                window=self.window,
                key_padding_mask=key_padding_mask,
                scale=scale,
                local_keys=self.local_keys,
                codes=codes,
                backend=self.backend,
            )

    def initial_state(self, batch: int, value_dim: int) -> SwappedState:  # type: ignore[override]  # E isn't fixed here
        """The state of `batch` empty sequences, for `step`; causal attention in eval mode only."""
        self.check_codes()
        step_checks.eval_mode(NAME, self)
        codewords = self._extend_codewords(self.codebook.embedding @ self.from_metric, self.spread)
        # Without rotary positions `step` gets no `far`: near keys then have the extra dimensions too.
        key_dim = codewords.shape[2] if self.rotary is None else self.head_dim
        past = ops.vq_attention_state(
            batch, codewords, window=self.window, value_dim=value_dim, key_dim=key_dim, local_keys=self.local_keys
        )
        return SwappedState(past, codewords)

    def step(  # type: ignore[override]  # its own state, and far pairs as in `forward`
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: SwappedState,
        key_padding_mask: Tensor | None = None,
        *,
        far: FarQueryKey | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """The next T tokens, as `forward` would attend them (causal); `state` is updated in place."""
        step_checks.eval_mode(NAME, self)
        with no_autocast(q.device):
            scale = self.head_dim**-0.5 if scale is None else scale
            far_q, far_k = (q, k) if far is None else far
            codes = ops.vq_assign(self.in_metric(far_k), self.codebook.embedding, backend=self.backend)
            far_q, far_k = self._extend_query_key(far_q, far_k, key_padding_mask, scale, past=state.past.lengths)
            near, apart = _pairs(q, k, far_q, far_k, far is not None, v.dtype)
            return ops.vq_attention_step(
                *near,
                v,
                state.codebook,
                state.past,
                far_q=apart[0],
                far_k=apart[1],
                key_padding_mask=key_padding_mask,
                scale=scale,
                codes=codes,
                backend=self.backend,
            )

    @torch.no_grad()
    def far_scores(
        self, q: Tensor, k: Tensor, key_padding_mask: Tensor | None = None, *, causal: bool, scale: float
    ) -> Tensor:
        """The unscaled scores of far pairs, for `health`: q (B, H, R, D), k (B, Hkv, L, D) -> (B, H, R, L)."""
        keys, table = self.in_metric(k), self.codebook.embedding
        codes = ops.vq_assign(keys, table, backend=self.backend)
        codewords, spread = self.codewords(keys, codes, table, key_padding_mask, causal)
        codewords, q = self._add_spread(codewords, spread), self._add_spread_to_query(q, scale)
        codewords = codewords.expand(len(q), -1, -1, -1)
        group = self.num_heads // self.num_kv_heads
        codes, codewords = (x.repeat_interleave(group, dim=1) for x in (codes, codewords))
        scores = q @ codewords.to(q.dtype).transpose(-1, -2)  # (B, H, R, S)
        return scores.gather(3, codes.unsqueeze(2).expand(-1, -1, q.shape[2], -1))

    def far_log_weight(self, seen: Tensor) -> Tensor:
        """The log of the weight of far keys: seen (B, L), tokens up to and including each query -> (B, L), ≤ 0."""
        if self.trained_length is None:
            return torch.zeros_like(seen, dtype=self.to_metric.dtype)
        return far_limit.far_log_weight(seen, self.trained_length, self.window, self.to_metric.dtype)

    def _extend_codewords(self, codewords: Tensor, spread: Tensor) -> Tensor:
        """(…, Hkv, S, D) and (…, Hkv, S) -> (…, Hkv, S, F), with the dimensions of the spread and of the limit."""
        codewords = self._add_spread(codewords, spread)
        return codewords if self.trained_length is None else far_limit.extend_codebook(codewords)

    def _extend_query_key(
        self, q: Tensor, k: Tensor, key_padding_mask: Tensor | None, scale: float, past: Tensor | None = None
    ) -> FarQueryKey:
        """(B, …, L, D) -> (B, …, L, F), the same dimensions, with zeros in the keys.

        past (B,) is the number of tokens before these.
        """
        q = self._add_spread_to_query(q, scale)
        if self.trained_length is not None:
            seen = far_limit.tokens_seen(key_padding_mask, q.shape[2], q.device)
            if past is not None:
                seen = past.unsqueeze(-1) + seen
            q = far_limit.extend_query(q, self.far_log_weight(seen), scale)
        return q, F.pad(k, (0, q.shape[-1] - k.shape[-1]))

    def _add_spread(self, codewords: Tensor, spread: Tensor) -> Tensor:
        return code_spread.extend_codebook(codewords, spread) if self.variance_correction else codewords

    def _add_spread_to_query(self, q: Tensor, scale: float) -> Tensor:
        if not self.variance_correction:
            return q
        return code_spread.extend_query(q, self.from_metric, self.spread_gain, scale)

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "contexts": {}}

    def extra_repr(self) -> str:
        parts = [f"{self.num_heads}, {self.num_kv_heads}, {self.head_dim}", f"num_codes={self.num_codes}"]
        parts += [f"window={self.window}", f"local_keys={self.local_keys!r}", f"backend={self.backend!r}"]
        return ", ".join(parts)


def find_swapped(module: nn.Module) -> SwappedAttention | None:
    """The swapped attention in the module's slot, or None."""
    slot = find_slot(module)
    return slot if isinstance(slot, SwappedAttention) else None


def _pairs(
    q: Tensor, k: Tensor, far_q: Tensor, far_k: Tensor, differ: bool, dtype: torch.dtype
) -> tuple[FarQueryKey, FarQueryKey | tuple[None, None]]:
    """Queries and keys of near pairs, and those of far pairs; without a difference the far ones serve both."""
    q, k, far_q, far_k = (x.to(dtype) for x in (q, k, far_q, far_k))  # float32 if rotary ran under autocast
    return ((q, k), (far_q, far_k)) if differ else ((far_q, far_k), (None, None))


def _at_codes(table: Tensor, codes: Tensor) -> Tensor:
    """Rows of table (Hkv, S, F) at codes (B, Hkv, L) -> (B, Hkv, L, F)."""
    rows = pick(table, codes.transpose(0, 1).flatten(1))
    return rows.unflatten(1, (codes.shape[0], codes.shape[2])).transpose(0, 1)
