"""The module that a swapped attention carries: its codebook, the metric it was fitted in, and how to attend."""

import torch
import torch.nn.functional as F
from torch import Tensor

from longvq_layers import ops
from longvq_layers.layers.attention.codebook_attention import CodebookAttention
from longvq_layers.layers.codebook.operations import code_sums, pick
from longvq_layers.layers.common.context import no_autocast, recomputing
from longvq_layers.layers.common.precision import KeepsFloat32, storage_dtype
from longvq_layers.layers.streaming import step_checks
from longvq_layers.layers.streaming.gaps import order_without_gaps, put_back, reorder
from longvq_layers.replace._calls import Call, Far, SwappedState
from longvq_layers.replace._metric import in_proportion, roots
from longvq_layers.replace._rows import row_means, vq_attention_by_row
from longvq_layers.replace._settings import CarriesSettings
from longvq_layers.replace.rotary import ClampedRotary

_FEW = 1e-6  # keys; below it a code has no spread yet


class SwappedAttention(KeepsFloat32, CarriesSettings, CodebookAttention):
    """Attention over quantised keys whose codes were fitted in the metric of the queries.

        M = E[q qᵀ] per key-value head,  k' = k M^½,  z_j = argmin_s ‖k'_j − C'_s‖²,  C = C' M^-½

    ‖k' − C'‖² is the expected square of a score's error, so codes go where queries look. The scores use q, k and C
    as they are; M^½ only decides which code a key gets. Without calibration M is the identity.

    With `variance_correction` a code also stands for the spread of its keys, σ_s² = E‖k' − C'_s‖²: the mean of exp over
    unequal keys exceeds exp of their mean, to second order by the factor exp(½ scale² σ_s² ‖q'‖² / D), q' = q M^-½.
    That is one more dimension of q (½ scale ‖q'‖² / D) and of C (σ_s²), which exact local keys have as 0. Where scores
    are large the second order says too much, so each head has a gain in [0, 1] on it, chosen in calibration.

    Bidirectional attention sees all keys of a sequence at once, so there a code stands for the mean and the spread of
    the sequence's own keys that chose it: as linear, and much closer. The codebook then decides only which keys go
    together. In causal attention that mean would tell of the future, and codes are those of the codebook.

    Keys that carry a position may be given a second time without it (`far`): then the codes are those of the second. In
    training no query saw more than n = trained_length − W of them, and attention spread over many more would drown the
    window: a query that has N > n far keys sees each with the weight n / N, which is one more dimension again.

    Args:
        num_heads: H, query heads.
        num_kv_heads: Hkv, key-value heads.
        head_dim: D, width of a key.
        num_codes, window, local_keys, backend, device, dtype: see `CodebookAttention`.
        variance_correction: whether a code accounts for the spread of its keys.
        rotary: how positions are taken off queries and keys, for those who call; None where that isn't done.
        trained_length: with rotary, the longest sequence of the model's training; None: far keys always count in full.

    Buffers:
        to_metric (Hkv, D, D) = M^½, from_metric (Hkv, D, D) = M^-½, spread (Hkv, S) = σ_s² with its moving sums
        spread_sum and spread_count (Hkv, S), spread_gain (H,), and those of `codebook`; all at least float32.
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
            window_bias=False,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        self.variance_correction = variance_correction
        self.rotary = rotary
        self.trained_length = None if rotary is None else trained_length
        self.has_positions = rotary is not None  # as in `Recorder`
        self.linear_masks = True  # whether a transformers model makes masks of linear size for it
        self.calls: dict[int, Call] = {}
        identity = torch.eye(head_dim, device=device, dtype=storage_dtype(dtype)).repeat(num_kv_heads, 1, 1)
        self.register_buffer("to_metric", identity)
        self.register_buffer("from_metric", identity.clone())
        for name in ("spread", "spread_sum", "spread_count"):
            self.register_buffer(name, identity.new_zeros(num_kv_heads, num_codes))
        self.register_buffer("spread_gain", identity.new_ones(num_heads))

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_padding_mask: Tensor | None = None,
        *,
        far: Far | None = None,
        causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        """q (B, H, L, D), k (B, Hkv, L, D), v (B, Hkv, L, E), key_padding_mask (B, L) True = ignore -> (B, H, L, E).

        `far`: queries and keys, shaped like q and k, for pairs outside the window; default q and k themselves. In
        training the codebook learns from those keys and the commitment loss is stored, as in `CodebookAttention`.
        In eval mode the gradient reaches `codebook.embedding`, `spread` and `spread_gain` where they require it.
        Causal, the window counts tokens: padding between them is as if it weren't there, as in `step`.
        """
        self.check_codes()
        if causal and key_padding_mask is not None and (order := order_without_gaps(key_padding_mask)) is not None:
            q, k, v = (reorder(x, order) for x in (q, k, v))
            far = None if far is None else tuple(reorder(x, order) for x in far)
            output = self._attend(q, k, v, key_padding_mask.gather(1, order), far, causal, scale)
            return put_back(output, order)
        return self._attend(q, k, v, key_padding_mask, far, causal, scale)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_padding_mask: Tensor | None,
        far: Far | None,
        causal: bool,
        scale: float | None,
    ) -> Tensor:
        with no_autocast(q.device):
            far_q, far_k = (q, k) if far is None else far
            keys = self.in_metric(far_k)
            codes, table = self.codebook.quantize(keys, key_padding_mask)
            self.store_commitment(keys, codes, table, key_padding_mask)
            scale = self.head_dim**-0.5 if scale is None else scale
            learning = self.training and not self.codebook.frozen and not recomputing()
            if learning:
                self.spread.copy_(self.spread_sum / self.spread_count.clamp(min=_FEW))
            codebook = self._codewords(keys, codes, table, key_padding_mask, causal)
            far_q = self._with_spread(far_q, scale)
            if self.trained_length is not None:
                seen = self._seen(key_padding_mask, q.shape[2], q.device)
                far_q, codebook = self._with_limit(far_q, seen, scale), self._limited(codebook)
            far_k = F.pad(far_k, (0, far_q.shape[-1] - far_k.shape[-1]))
            if codebook.requires_grad:  # the gradient that a code collects is shared among its far keys: it adds up
                coded = _of_codes(codebook, codes)
                far, far_k = (q, k), far_k + (coded - coded.detach())  # pairs inside the window stay apart from it
            if learning:
                self._learn_spread(keys, codes, table, key_padding_mask)
            # Under autocast rotary positions leave q and k in float32.
            q, k, far_q, far_k = (x.to(v.dtype) for x in (q, k, far_q, far_k))
            pairs = (far_q, far_k) if far is None else (q, k)
            apart = {} if far is None else {"far_q": far_q, "far_k": far_k}
            attend = vq_attention_by_row if codebook.dim() == 4 else ops.vq_attention
            return attend(
                *pairs,
                v,
                codebook,
                **apart,
                causal=causal,
                window=self.window,
                key_padding_mask=key_padding_mask,
                scale=scale,
                local_keys=self.local_keys,
                codes=codes,
                backend=self.backend,
            )

    def initial_state(self, batch: int, value_dim: int) -> "SwappedState":
        """The state of `batch` empty sequences, for `step`; causal attention in eval mode only."""
        self.check_codes()
        step_checks.eval_mode("longvq attention", self)
        codebook = self._spread_out(self.codebook.embedding @ self.from_metric, self.spread)
        key_dim = codebook.shape[2]  # without rotary `step` has no far keys: those of the window get the added columns
        if self.rotary is not None:
            codebook, key_dim = self._limited(codebook), self.head_dim
        past = ops.vq_attention_state(
            batch, codebook, window=self.window, value_dim=value_dim, key_dim=key_dim, local_keys=self.local_keys
        )
        return SwappedState(past, codebook)

    def step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: "SwappedState",
        key_padding_mask: Tensor | None = None,
        *,
        far: Far | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """The next T tokens, as `forward` would attend them (causal); `state` is updated in place."""
        step_checks.eval_mode("longvq attention", self)
        with no_autocast(q.device):
            scale = self.head_dim**-0.5 if scale is None else scale
            far_q, far_k = (q, k) if far is None else far
            codes = ops.vq_assign(self.in_metric(far_k), self.codebook.embedding, backend=self.backend)
            far_q = self._with_spread(far_q, scale)
            if self.trained_length is not None:
                seen = state.past.lengths.unsqueeze(-1) + self._seen(key_padding_mask, q.shape[2], q.device)
                far_q = self._with_limit(far_q, seen, scale)
            far_k = F.pad(far_k, (0, far_q.shape[-1] - far_k.shape[-1]))
            q, k, far_q, far_k = (x.to(v.dtype) for x in (q, k, far_q, far_k))
            pairs = (far_q, far_k) if far is None else (q, k)
            apart = {} if far is None else {"far_q": far_q, "far_k": far_k}
            return ops.vq_attention_step(
                *pairs,
                v,
                state.codebook,
                state.past,
                **apart,
                key_padding_mask=key_padding_mask,
                scale=scale,
                codes=codes,
                backend=self.backend,
            )

    @torch.no_grad()
    def far_scores(
        self, q: Tensor, k: Tensor, key_padding_mask: Tensor | None = None, *, causal: bool, scale: float
    ) -> Tensor:
        """What stands for q·k outside the window: q (B, H, R, D), k (B, Hkv, L, D) -> (B, H, R, L), not yet scaled."""
        keys, table = self.in_metric(k), self.codebook.embedding
        codes = ops.vq_assign(keys, table, backend=self.backend)
        codebook = self._codewords(keys, codes, table, key_padding_mask, causal).expand(len(q), -1, -1, -1)
        group = self.num_heads // self.num_kv_heads
        codes, codebook = (x.repeat_interleave(group, dim=1) for x in (codes, codebook))
        scores = self._with_spread(q, scale) @ codebook.to(q.dtype).transpose(-1, -2)  # (B, H, R, S)
        return scores.gather(3, codes.unsqueeze(2).expand(-1, -1, q.shape[2], -1))

    def in_metric(self, k: Tensor) -> Tensor:
        """k' = k M^½ in the dtype of the codebook: (B, Hkv, L, D) -> the same shape."""
        return k.to(self.to_metric.dtype) @ self.to_metric

    @torch.no_grad()
    def fit_(
        self,
        keys: Tensor,
        second_moment: Tensor,
        *,
        weight: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Fit the metric and the codes: keys (Hkv, N, D), second_moment (Hkv, D, D) = E[q qᵀ].

        `weight` (Hkv, N) ≥ 0, default none: half of what codes are fitted to is every key once, half is keys in
        proportion to it. All by weight would leave most keys without a code near them, for a few that it dwells on.
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
        self.spread.copy_(self.spread_sum / self.spread_count.clamp(min=_FEW))

    @torch.no_grad()
    def settle_trained(self) -> None:
        """Let the moving averages go on from codes and spread as they are now, trained by gradient."""
        self.codebook.ema_sum.copy_(self.codebook.embedding * self.codebook.ema_count.unsqueeze(-1))
        self.spread_sum.copy_(self.spread * self.spread_count)

    def check_codes(self) -> None:
        """Raises RuntimeError in eval mode without any codes."""
        if not self.training and not self.codebook._ready:
            raise RuntimeError(
                "longvq attention: the codebook has no codes yet; call replace_attention with calibration=, run one "
                "batch in training mode, or load a state_dict that has codes"
            )

    def _with_spread(self, q: Tensor, scale: float) -> Tensor:
        # q (B, H, L, D) with the dimension that meets the spread of the codes.
        if not self.variance_correction:
            return q
        group = self.num_heads // self.num_kv_heads
        from_metric = self.from_metric.repeat_interleave(group, dim=0) if group > 1 else self.from_metric
        square = (q.to(from_metric.dtype) @ from_metric).square().sum(-1, keepdim=True)  # ‖q'‖², (B, H, L, 1)
        gain = self.spread_gain[:, None, None]
        return torch.cat([q, (0.5 * scale / self.head_dim * gain * square).to(q.dtype)], dim=-1)

    def _spread_out(self, codebook: Tensor, spread: Tensor) -> Tensor:
        # codebook (…, Hkv, S, D) with the same dimension; spread (…, Hkv, S).
        return torch.cat([codebook, spread.unsqueeze(-1)], dim=-1) if self.variance_correction else codebook

    def far_log_weight(self, seen: Tensor) -> Tensor:
        """What far keys have added to their scores: seen (B, L), tokens up to and with each query -> (B, L), ≤ 0."""
        if self.trained_length is None:
            return torch.zeros_like(seen, dtype=self.to_metric.dtype)
        limit = max(self.trained_length - self.window, 1)
        return -((seen - self.window).to(self.to_metric.dtype) / limit).clamp(min=1).log()

    def _seen(self, key_padding_mask: Tensor | None, length: int, device: torch.device) -> Tensor:
        # Number of tokens up to and with each, (B or 1, L).
        if key_padding_mask is None:
            return torch.arange(1, length + 1, device=device).unsqueeze(0)
        return (~key_padding_mask).cumsum(1)

    def _with_limit(self, far_q: Tensor, seen: Tensor, scale: float) -> Tensor:
        # far_q (B, H, L, F) with the dimension that weighs far keys by n / N where N > n.
        weight = self.far_log_weight(seen)[:, None, :, None] / scale
        return torch.cat([far_q, weight.expand(*far_q.shape[:3], 1).to(far_q.dtype)], dim=-1)

    def _limited(self, codebook: Tensor) -> Tensor:
        # codebook (…, Hkv, S, F) with the same dimension.
        return codebook if self.trained_length is None else F.pad(codebook, (0, 1), value=1.0)

    def _codewords(self, keys: Tensor, codes: Tensor, table: Tensor, key_padding_mask: Tensor | None, causal: bool):
        # (Hkv, S, D + 1) for all, or (B, Hkv, S, D + 1) for each sequence
        if causal:
            return self._spread_out(table @ self.from_metric, self.spread)
        return self._of_sequence(keys, codes, table, key_padding_mask)

    @torch.no_grad()
    def _of_sequence(self, keys: Tensor, codes: Tensor, table: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        # Codewords (B, Hkv, S, D + 1) of each sequence by itself: its keys (B, Hkv, L, D) in the metric, their codes.
        # Where a key has a gradient, `ops.vq_attention` gives it that of its code's mean.
        means, spread = row_means(keys, codes, table, key_padding_mask)
        return self._spread_out(means @ self.from_metric, spread)

    @torch.no_grad()
    def _learn_spread(self, keys: Tensor, codes: Tensor, table: Tensor, key_padding_mask: Tensor | None) -> None:
        # Moving sums of ‖k' − C'‖² per code; keys (B, Hkv, L, D) in the metric, codes (B, Hkv, L), table (Hkv, S, D).
        valid = keys.isfinite().all(-1)
        if key_padding_mask is not None:
            valid = valid & ~key_padding_mask[:, None, :]
        keys, codes, valid = (x.transpose(0, 1).flatten(1, 2) for x in (keys, codes, valid))
        error = (keys - pick(table, codes)).square().sum(-1, keepdim=True)
        sums, counts = code_sums(torch.where(valid.unsqueeze(-1), error, 0), codes, valid, self.num_codes)
        sums, counts = self.codebook.group.sum(sums.squeeze(-1), counts)
        self.spread_sum.lerp_(sums, 1 - self.codebook.decay)
        self.spread_count.lerp_(counts, 1 - self.codebook.decay)

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "calls": {}}

    def extra_repr(self) -> str:
        parts = [f"{self.num_heads}, {self.num_kv_heads}, {self.head_dim}", f"num_codes={self.num_codes}"]
        parts += [f"window={self.window}", f"local_keys={self.local_keys!r}", f"backend={self.backend!r}"]
        return ", ".join(parts)


def _of_codes(table: Tensor, codes: Tensor) -> Tensor:
    # Rows of table (Hkv, S, F) at codes (B, Hkv, L) -> (B, Hkv, L, F)
    rows = pick(table, codes.transpose(0, 1).flatten(1))
    return rows.unflatten(1, (codes.shape[0], codes.shape[2])).transpose(0, 1)
