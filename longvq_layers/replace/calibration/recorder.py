"""What stands in a slot during calibration: it records what the original attention does, then measures a candidate."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from longvq_layers.replace.calibration.candidate_errors import CandidateErrors
from longvq_layers.replace.calibration.key_importance import attention_received
from longvq_layers.replace.slot.attention_slot import AttentionSlot, OriginalAttention
from longvq_layers.replace.slot.clamped_rotary import ClampedRotary
from longvq_layers.replace.slot.context import FarQueryKey
from longvq_layers.replace.slot.full_attention import full_attention
from longvq_layers.replace.slot.swapped import SwappedAttention

KEYS_PER_HEAD = 20_480  # kept per layer and head for k-means; more keys only cost time and memory
GAINS = (1.0, 0.5, 0.25, 0.0)  # tried on the spread of the codes, per head
SEED = 0x10C6  # of the generators of calibration, which leaves the global generators as they are


class ForwardRefused(NotImplementedError):
    """A call during calibration that a replaced module can't serve; `site` is the module's name."""

    def __init__(self, site: str, reason: str) -> None:
        super().__init__(reason)
        self.site = site


class Recorder(AttentionSlot):
    """The slot during calibration, while the model still uses its original attention.

    It first collects keys, the attention they receive, and the second moment of the queries. After `measure` it
    measures on the same inputs how far a candidate's output is from the original one.

    Args:
        original: the attention function of a transformers module; None: attention to every key is computed here.
        name: of the module in the model, for errors.
        rotary: removes the positions of queries and keys; the first call shows whether that is possible.
        may_stay_rotated: if removing the positions is impossible, True keeps them, False makes the call raise.
        keys_per_head: keys kept, a uniform sample of all that were seen.
        window: W, default 0. Attention from queries less than W positions away isn't counted: there keys are exact.

    Attributes:
        keys: (Hkv, N, D) kept keys; None before the first call.
        weight: (Hkv, N) attention that each kept key receives.
        moment: (Hkv, D, D) float64, the sum of q qᵀ over `queries` queries per key-value head.
        causal: the kinds of calls so far, True for causal; calls of one token are not counted.
        why_rotated: why the positions stay, or None.
        batch: number of the calibration input that is running, for errors.
        errors: of the candidate, None while collecting.
    """

    def __init__(
        self,
        original: OriginalAttention | None = None,
        name: str = "",
        *,
        rotary: ClampedRotary | None = None,
        may_stay_rotated: bool = False,
        keys_per_head: int = KEYS_PER_HEAD,
        window: int = 0,
    ) -> None:
        super().__init__()
        self.original = original
        self.name = name
        self.rotary = rotary
        self.may_stay_rotated = may_stay_rotated
        self.why_rotated: str | None = None
        self.has_positions = True
        self.contexts = {}
        self.causal: set[bool] = set()
        self.batch = 0
        self.errors: CandidateErrors | None = None
        self.keys: Tensor | None = None
        self.weight: Tensor | None = None
        self.moment: Tensor | None = None
        self.queries = 0
        self._sizes: tuple[int, int, int] | None = None
        self._checked: set[bool] = set()
        self._limit, self._window = keys_per_head, window
        self._generator = torch.Generator().manual_seed(SEED)
        # A random rank per kept token, (N,). The tokens with the lowest ranks stay, which is a uniform sample.
        self._rank = torch.empty(0)

    @property
    def sizes(self) -> tuple[int, int, int] | None:
        """(H, Hkv, D) of the first call."""
        return self._sizes

    @property
    def collected_keys(self) -> Tensor:
        """`keys`, after the first pass."""
        if self.keys is None:
            raise RuntimeError(f"replace_attention: {self.name}: no keys were collected yet")
        return self.keys

    @property
    def collected_sizes(self) -> tuple[int, int, int]:
        """`sizes`, after the first pass."""
        if self._sizes is None:
            raise RuntimeError(f"replace_attention: {self.name}: no keys were collected yet")
        return self._sizes

    @property
    def measured(self) -> CandidateErrors:
        """`errors`, after `measure`."""
        if self.errors is None:
            raise RuntimeError(f"replace_attention: {self.name}: no candidate was measured yet")
        return self.errors

    def forward(
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
        """Attend to every key, and observe the result."""
        output = full_attention(q, k, v, causal=causal, key_padding_mask=key_padding_mask, scale=scale)
        self.observe(q, k, v, output, far=far, causal=causal, key_padding_mask=key_padding_mask, scale=scale)
        return output

    @contextlib.contextmanager
    def refusals(self) -> Iterator[None]:
        """Turn a NotImplementedError of the call into a `ForwardRefused` with the module's name."""
        try:
            yield
        except ForwardRefused:
            raise
        except NotImplementedError as error:
            raise ForwardRefused(self.name, str(error)) from error

    def keep_rotated(self, why: str) -> bool:
        """Keep the positions from now on, if the options allow it and no keys without positions were collected yet."""
        if not self.may_stay_rotated or self.keys is not None:
            return False
        self.rotary, self.why_rotated = None, why
        return True

    def needs_adapter_check(self) -> bool:
        """True while collecting."""
        return self.errors is None

    def is_first_check(self, padded: bool) -> bool:
        """True for the first call with padding and for the first without."""
        first = padded not in self._checked
        self._checked.add(padded)
        return first

    @torch.no_grad()
    def observe(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        output: Tensor,
        *,
        far: FarQueryKey | None = None,
        causal: bool,
        key_padding_mask: Tensor | None,
        scale: float | None,
    ) -> None:
        """Collect from one call of the original attention, or measure the candidate on it.

        Args:
            q, k, v: (B, H, L, D), (B, Hkv, L, D) and (B, Hkv, L, E).
            output: (B, H, L, E) of the original attention.
            far: queries and keys of the pairs outside the window, if they are others than q and k.
            causal, key_padding_mask, scale: of the call.

        Raises:
            NotImplementedError: not one key per query.
            ValueError: NaN or infinity in a token that is not padding.
        """
        if q.shape[2] != k.shape[2]:
            raise NotImplementedError(
                f"replace_attention: calibration must run whole sequences without a cache from earlier calls, got "
                f"{q.shape[2]} queries for {k.shape[2]} keys"
            )
        if q.shape[2] > 1:
            self.causal.add(causal)
        real = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)
        if key_padding_mask is not None:
            real = ~key_padding_mask
        self._check_finite(real, queries=q, keys=k, values=v)
        if self.errors is not None:
            self.errors.add(q, k, v, output, real, far=far, causal=causal, scale=scale)
            return
        self._sizes = (q.shape[1], k.shape[1], k.shape[3])
        received = attention_received(q, k, real, window=self._window, causal=causal, scale=scale)
        far_q, far_k = (q, k) if far is None else far
        self._collect(far_q, far_k, received, real)

    def measure(self, candidate: SwappedAttention) -> None:
        """Measure this candidate from now on; errors of an earlier one are dropped."""
        self.errors = CandidateErrors(candidate, GAINS)

    def _check_finite(self, real: Tensor, **tensors: Tensor) -> None:
        for what, x in tensors.items():
            if not (x.isfinite().all(-1) | ~real[:, None]).all():
                raise ValueError(
                    f"replace_attention: calibration must give finite {what} for every token, got NaN or infinity from "
                    f"batch {self.batch} in {self.name or 'the model itself'}; check this input and the weights"
                )

    def _collect(self, q: Tensor, k: Tensor, received: Tensor, real: Tensor) -> None:
        keys = k.transpose(0, 1)[:, real].to(torch.promote_types(k.dtype, torch.float32))  # (Hkv, N, D)
        group = q.shape[1] // k.shape[1]
        queries = q.unflatten(1, (k.shape[1], group)).permute(1, 0, 3, 2, 4)[:, real].flatten(1, 2).double()
        moment = queries.transpose(1, 2) @ queries
        self.moment = moment if self.moment is None else self.moment + moment
        self.queries += queries.shape[1]
        weight = received.transpose(0, 1)[:, real]  # (Hkv, N)
        rank = torch.rand(keys.shape[1], generator=self._generator)
        if self.keys is not None and self.weight is not None:
            keys, rank = torch.cat([self.keys, keys], dim=1), torch.cat([self._rank, rank])
            weight = torch.cat([self.weight, weight], dim=1)
        if rank.numel() > self._limit:
            rank, kept = rank.topk(self._limit, largest=False)
            keys, weight = keys[:, kept.to(keys.device)], weight[:, kept.to(keys.device)]
        self.keys, self.weight, self._rank = keys, weight, rank


def fit(recorder: Recorder, slot: SwappedAttention) -> None:
    """Fit `slot` to what the recorder collected, and let the recorder measure it from now on."""
    if recorder.keys is None or recorder.moment is None:
        raise RuntimeError(f"replace_attention: {recorder.name}: nothing was collected yet")
    generator = torch.Generator(device=recorder.keys.device).manual_seed(SEED)
    with torch.inference_mode(False):  # clones of inference tensors are ordinary tensors here
        moment = recorder.moment.clone() / max(recorder.queries, 1)
        weight = None if recorder.weight is None else recorder.weight.clone()
        slot.fit_(recorder.keys.clone(), moment, weight=weight, generator=generator)
    recorder.measure(slot.eval())
