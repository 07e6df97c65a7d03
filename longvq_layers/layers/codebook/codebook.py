"""The codebook: one table of codes per head, learned from the keys in training forwards."""

import math
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from longvq_layers import _checks as check
from longvq_layers import ops
from longvq_layers.layers.codebook.distributed import Group
from longvq_layers.layers.codebook.kmeans import kmeans
from longvq_layers.layers.codebook.operations import code_sums, draw, pick, spread
from longvq_layers.layers.codebook.state_dict import complete_entries, refuse_damaged
from longvq_layers.layers.common.context import no_autocast, recomputing
from longvq_layers.layers.common.factory import Factory
from longvq_layers.layers.common.precision import KeepsFloat32, storage_factory
from longvq_layers.layers.common.representation import arguments_repr

_SEED = 0x10C0DE
_SAMPLED_KEYS_PER_CODE = 64  # keys per code in the sample that k-means fits first; more only cost time
_NEVER_CHOSEN = 1_000_000  # `idle` of a code without a key at the start, if codes are never re-seeded


class Codebook(KeepsFloat32):
    """Vector quantisation of keys, S codes per head, learned by exponential moving averages (EMA).

        z_j = argmin_s ‖k_j − C_s‖²                              (the lowest s wins ties)
        in training, with n_s and m_s the number and sum of the keys of code s in this batch, over all ranks:
        N_s ← γ N_s + (1 − γ) n_s,   M_s ← γ M_s + (1 − γ) m_s
        C_s = M_s / Ñ_s,   Ñ_s = (N_s + ε) ΣN / (ΣN + S ε)       (Laplace smoothing)

    K-means fits the codes to the first training batch in which every head has a key. If no key chose a code for
    `revive_after` steps, the code moves to a current key, drawn in proportion to its squared error, and the averages of
    the code restart there. Averages are updated at once, but `embedding` only at the start of the next training call:
    so a recomputed forward (activation checkpointing) sees the same codes. The codebook doesn't learn in eval mode,
    when frozen, or from masked or non-finite keys. All arithmetic is float32 (or float64) with autocast off, and
    `.half()` or `.bfloat16()` leave the buffers in float32.

    Args:
        num_heads: H, key-value heads.
        num_codes: S, codes per head.
        dim: D, width of a key.
        decay: γ of the averages, in [0, 1), default 0.99 per training call.
        revive_after: training calls without a key after which a code is re-seeded, default 100; None = never.
        eps: ε of the smoothing, in keys, default 1e-5.
        process_group: data-parallel ranks that learn together; None = the default group if torch.distributed is
            initialised. Give each rank a group with only itself to let each rank learn by itself.
        backend: of the search for the nearest code, see `ops.vq_assign`.
        device: where the buffers live.
        dtype: torch.float64 for double buffers, anything else gives float32.

    Buffers:
        embedding (H, S, D), ema_sum (H, S, D), ema_count (H, S), ema_error (H,), ema_energy (H,) float;
        idle (H, S) and steps () int64; initialized () bool.

    Raises:
        ValueError, TypeError: sizes or rates out of range; loading non-finite codes.

    Example:
        >>> book = Codebook(num_heads=2, num_codes=4, dim=8)
        >>> book(torch.randn(3, 2, 10, 8)).shape         # (B, H, L, D) -> (B, H, L)
        torch.Size([3, 2, 10])
        >>> bool(book.initialized), float(book.usage().mean()) > 0
        (True, True)

    Source: van den Oord et al. 2017, appendix A.1 (EMA); Lingle 2023, Transformer-VQ (codes of keys).
    """

    embedding: Tensor
    ema_sum: Tensor
    ema_count: Tensor
    ema_error: Tensor
    ema_energy: Tensor
    idle: Tensor
    steps: Tensor
    initialized: Tensor

    _version = 1

    def __init__(
        self,
        num_heads: int,
        num_codes: int,
        dim: int,
        *,
        decay: float = 0.99,
        revive_after: int | None = 100,
        eps: float = 1e-5,
        process_group: "torch.distributed.ProcessGroup | None" = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check.positive("Codebook", num_heads=num_heads, num_codes=num_codes, dim=dim)
        check.probability("Codebook", "decay", decay)
        if revive_after is not None and revive_after < 1:
            raise ValueError(f"Codebook: revive_after must be at least 1 step, or None for never, got {revive_after}")
        if not 0 < eps < math.inf:
            raise ValueError(f"Codebook: eps must be a positive number of keys, got {eps}")
        self.num_heads, self.num_codes, self.dim = num_heads, num_codes, dim
        self.decay, self.revive_after, self.eps, self.backend = decay, revive_after, eps, backend
        self.frozen = False
        self.group = Group(process_group)
        self._ready = False  # `initialized` as a Python bool: reading the buffer synchronises and breaks the graph

        real = storage_factory(device, dtype)
        count: Factory = {"device": device, "dtype": torch.int64}
        self.register_buffer("embedding", torch.empty(num_heads, num_codes, dim, **real))
        self.register_buffer("ema_sum", torch.empty(num_heads, num_codes, dim, **real))
        self.register_buffer("ema_count", torch.empty(num_heads, num_codes, **real))
        self.register_buffer("ema_error", torch.empty(num_heads, **real))
        self.register_buffer("ema_energy", torch.empty(num_heads, **real))
        self.register_buffer("idle", torch.empty(num_heads, num_codes, **count))
        self.register_buffer("steps", torch.empty((), **count))
        self.register_buffer("initialized", torch.empty((), device=device, dtype=torch.bool))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start again: random codes, no statistics, not initialised."""
        self.embedding.normal_()
        self.ema_sum.copy_(self.embedding)
        self.ema_count.fill_(1)
        for buffer in (self.ema_error, self.ema_energy, self.idle, self.steps):
            buffer.zero_()
        self._mark(False)

    def forward(self, k: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """The code of every key. In training mode, unless frozen, the codebook also learns from the keys.

        Args:
            k: (B, H, L, D) float, any floating dtype.
            key_padding_mask: (B, L) bool, True = ignore.

        Returns:
            (B, H, L) int64 in [0, S); any codes at masked positions.
        """
        return self.quantize(k, key_padding_mask)[0]

    def quantize(self, k: Tensor, key_padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The codes of `forward`, and the table (H, S, D) of their vectors, which later updates don't change."""
        self._check(k, key_padding_mask)
        with torch.no_grad(), no_autocast(k.device):
            learning = self.training and not self.frozen
            rerun = recomputing()
            keys = k.detach()
            if keys.element_size() > 2:  # half types are read as they are: a float32 copy has twice their size
                keys = keys.to(self.embedding.dtype)
            if learning and not rerun:
                if not self._ready:
                    self._start(*self._flat(keys, key_padding_mask))
                else:
                    self._refresh()
            codes = ops.vq_assign(keys, self.embedding, backend=self.backend)
            if not learning:
                return codes, self.embedding
            table = self.embedding.clone()  # autograd may need it after the next update
            if self._ready and not rerun:
                flat, valid = self._flat(keys, key_padding_mask)
                self._learn(flat, codes.transpose(0, 1).reshape(self.num_heads, -1), valid)
            return codes, table

    @torch.no_grad()
    def initialize_(
        self,
        keys: Tensor,
        *,
        mask: Tensor | None = None,
        iterations: int = 10,
        generator: torch.Generator | None = None,
    ) -> Self:
        """Fit the codes to keys by k-means and mark the codebook initialised.

        Ranks don't share the result: give each the same keys and seed.

        Args:
            keys: (H, N, D) float.
            mask, iterations, generator: see `kmeans`.

        Returns:
            The codebook itself.

        Raises:
            ValueError: a wrong shape, or a head without any finite, unmasked key.
        """
        if keys.dim() != 3 or (keys.shape[0], keys.shape[2]) != (self.num_heads, self.dim):
            expected = f"(H, N, D) = ({self.num_heads}, N, {self.dim})"
            raise ValueError(f"Codebook.initialize_: keys must have shape {expected}, got {tuple(keys.shape)}")
        keys = keys.detach().to(device=self.embedding.device, dtype=self.embedding.dtype)
        valid = keys.isfinite().all(-1)
        if mask is not None:
            valid = valid & ~mask.to(device=keys.device, dtype=torch.bool).expand(keys.shape[:2])
        if not bool(valid.any(-1).all()):
            raise ValueError(
                "Codebook.initialize_: keys must hold at least one finite, unmasked key per head, got none; "
                "pass more keys or check the mask"
            )
        with no_autocast(keys.device):
            keys = keys.masked_fill(~valid.unsqueeze(-1), 0)
            self.embedding.copy_(kmeans(keys, self.num_codes, iterations=iterations, mask=~valid, generator=generator))
            codes = ops.vq_assign(keys.unsqueeze(0), self.embedding, backend=self.backend).squeeze(0)
            self._restart(keys, codes, valid)
        self._mark(True)
        return self

    def freeze(self) -> Self:
        """Stop learning, also in training mode, until `unfreeze`; returns self."""
        self.frozen = True
        return self

    def unfreeze(self) -> Self:
        """Learn again in training mode; returns self."""
        self.frozen = False
        return self

    def reread(self) -> Self:
        """Read `initialized` again, after a loader has set the buffers as attributes; returns self.

        It isn't needed after `load_state_dict`.
        """
        self._ready = bool(self.initialized)
        return self

    def usage(self, within: int = 10) -> Tensor:
        """Per head (H,), the share of codes that some key chose, or that were re-seeded, in the last `within` calls."""
        return (self.idle < within).to(self.embedding.dtype).mean(-1)

    def perplexity(self) -> Tensor:
        """Per head (H,), exp of the entropy of the averaged code frequencies: 1 = one code has all keys, S = even."""
        share = self.ema_count / self.ema_count.sum(-1, keepdim=True)
        return torch.special.entr(share).sum(-1).exp()

    def quantization_error(self) -> Tensor:
        """Per head (H,), averaged Σ‖k − C_z‖² / Σ‖k − mean k‖²: 0 = exact, 1 = no better than one code.

        NaN before the first key; infinite if all keys were equal but differed from their code.
        """
        return self.ema_error / self.ema_energy

    def extra_repr(self) -> str:
        return arguments_repr(self, Codebook)

    # ---- learning -------------------------------------------------------------------------------------------------

    def _flat(self, keys: Tensor, key_padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, H, L, D), (B, L) -> keys (H, N, D) with zeros where not valid, valid (H, N), with N = B·L."""
        keys = keys.transpose(0, 1)
        valid = keys.isfinite().all(-1)
        if key_padding_mask is not None:
            valid = valid & ~key_padding_mask
        keys = torch.where(valid.unsqueeze(-1), keys, 0).to(self.embedding.dtype)
        return keys.reshape(self.num_heads, -1, self.dim), valid.reshape(self.num_heads, -1)

    @torch.compiler.disable(  # type: ignore[untyped-decorator]  # PyTorch's decorator has no types
        reason="the k-means start depends on the data; run one training step before compiling"
    )
    def _start(self, keys: Tensor, valid: Tensor) -> None:
        """Fit the codes to the first batch, keys (H, N, D), valid (H, N). All ranks get the first rank's result."""
        # A separate generator: a recomputed forward skips `_start`, and must find torch's generator in the same state.
        generator = torch.Generator(keys.device).manual_seed(torch.initial_seed() ^ _SEED)
        keys, valid = self.group.sample(keys, valid, _SAMPLED_KEYS_PER_CODE * self.num_codes, generator)
        if not bool(valid.any(-1).all()):
            return  # some head has no key on any rank: wait for the next batch
        self.embedding.copy_(self.group.from_first(kmeans(keys, self.num_codes, mask=~valid, generator=generator)))
        codes = ops.vq_assign(keys.unsqueeze(0), self.embedding, backend=self.backend).squeeze(0)
        codes = self.group.from_first(codes)
        self._restart(keys, codes, valid)
        self._mark(True)

    def _restart(self, keys: Tensor, codes: Tensor, valid: Tensor) -> None:
        """Set averages and statistics as if every batch so far had these keys, with their codes in `embedding`."""
        _, counts = code_sums(keys, codes, valid, self.num_codes)
        self.ema_count.copy_(counts.clamp(min=1))
        self.ema_sum.copy_(self.embedding * self.ema_count.unsqueeze(-1))
        self.idle.copy_(torch.where(counts > 0, 0, self.revive_after or _NEVER_CHOSEN))
        error = (keys - pick(self.embedding, codes)).square().sum(-1) * valid
        total = counts.sum(-1, keepdim=True)
        mean = keys.sum(1) / total.clamp(min=1)
        self.ema_error.copy_(error.sum(-1))
        self.ema_energy.copy_(((keys - mean.unsqueeze(1)).square().sum(-1) * valid).sum(-1))

    def _refresh(self) -> None:
        """Set C = M / Ñ in place. Like every update, this has no branch on data, so that it compiles into one graph."""
        total = self.ema_count.sum(-1, keepdim=True)
        smoothed = (self.ema_count + self.eps) * total / (total + self.num_codes * self.eps)
        self.embedding.copy_(self.ema_sum / smoothed.unsqueeze(-1))

    def _learn(self, keys: Tensor, codes: Tensor, valid: Tensor) -> None:
        """Update averages and statistics with keys (H, N, D), codes and valid (H, N). This rank may have no key."""
        error = (keys - pick(self.embedding, codes)).square().sum(-1) * valid  # (H, N)
        sums, counts = code_sums(keys, codes, valid, self.num_codes)
        square = keys.square().sum((1, 2))  # keys are zero where not valid
        spare, has_spare = self._spare_keys(keys, error, valid)
        sums, counts, error, square, spare, has_spare = self.group.sum(
            sums, counts, error.sum(-1), square, spare, has_spare
        )
        total = counts.sum(-1)  # (H,)
        seen = total > 0
        energy = (square - sums.sum(1).square().sum(-1) / total.clamp(min=1)).clamp(min=0)  # Σ‖k − mean‖²

        gamma = torch.where(seen, self.decay, 1.0).to(keys.dtype)  # a step without keys changes nothing
        self.ema_sum.copy_(torch.lerp(sums, self.ema_sum, gamma[:, None, None]))
        self.ema_count.copy_(torch.lerp(counts, self.ema_count, gamma[:, None]))
        self.ema_error.copy_(torch.lerp(error, self.ema_error, gamma))
        self.ema_energy.copy_(torch.lerp(energy, self.ema_energy, gamma))
        self.idle.copy_(torch.where(counts > 0, 0, self.idle + seen.unsqueeze(-1)))
        self.steps.add_(1)

        if self.revive_after is not None:
            revived = (self.idle >= self.revive_after) & (has_spare > 0)  # (H, S)
            self.ema_sum.copy_(torch.where(revived.unsqueeze(-1), spare, self.ema_sum))
            self.ema_count.masked_fill_(revived, 1)
            self.idle.masked_fill_(revived, 0)

    def _spare_keys(self, keys: Tensor, error: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """For each code a key to re-seed it with (H, S, D), and whether a key exists (H, S).

        Under data parallelism one rank gives the key of code s, and all others give zeros. The ranks take turns from
        step to step.
        """
        if self.revive_after is None or keys.shape[1] == 0:
            return torch.zeros_like(self.ema_sum), torch.zeros_like(self.ema_count)
        weight = torch.where((error > 0).any(-1, keepdim=True), error, valid.to(error.dtype))
        spare = pick(keys, draw(weight, spread(self.num_heads, self.num_codes, self.steps)))
        mine = valid.any(-1, keepdim=True).expand(-1, self.num_codes)
        if self.group.active:
            owner = (torch.arange(self.num_codes, device=keys.device) + self.steps) % self.group.size
            mine = mine & (owner == self.group.rank)
        return spare * mine.unsqueeze(-1), mine.to(keys.dtype)

    # ---- bookkeeping ----------------------------------------------------------------------------------------------

    def _mark(self, ready: bool) -> None:
        self.initialized.fill_(ready)
        self._ready = ready

    def _check(self, k: Tensor, key_padding_mask: Tensor | None) -> None:
        check.tensor("Codebook", "k", k, "B H L D")
        check.real("Codebook", "k", k)
        check.size("Codebook", "k", k, (k.shape[0], self.num_heads, k.shape[2], self.dim), "B H L D")
        if key_padding_mask is not None:
            check.key_padding_mask("Codebook", key_padding_mask, k.shape[0], k.shape[2])
            check.same_device("Codebook", "k", k, key_padding_mask=key_padding_mask)

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        complete_entries(state_dict, prefix, local_metadata.get("version"))
        refuse_damaged(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        flag = state_dict.get(prefix + "initialized")
        if flag is not None and flag.device.type != "meta":
            self._ready = bool(flag)
