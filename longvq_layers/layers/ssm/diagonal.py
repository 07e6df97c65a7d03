"""The diagonal state space model (S4D): parameters, discretisation, scan and step."""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from typing_extensions import Self

from longvq_layers import _checks as check
from longvq_layers import ops
from longvq_layers.layers.common.context import no_autocast
from longvq_layers.layers.common.precision import storage_factory
from longvq_layers.layers.common.representation import arguments_repr
from longvq_layers.layers.ssm.scan import ScanLayer, arithmetic_dtype
from longvq_layers.layers.streaming import step_checks
from longvq_layers.ops._dispatch import BACKENDS

TRAINABLE = {"A": ("log_A_real", "A_imag"), "B": ("B",), "dt": ("log_dt",)}  # names of `trained` -> parameters
INITS = ("lin", "inv", "real")
_ORDINARY = (Tensor, nn.Parameter)  # the types of tensors whose changes can be noticed, see `_stamp`
_LEAST_LOG_DECAY = -1e4  # least Δ·Re A: its exp is 0 anyway, while −infinity would become NaN

_Terms: TypeAlias = tuple[Tensor, Tensor, Tensor]  # the arguments of an operator: decay, weight, skip
_Stamp: TypeAlias = list[tuple[int, int, int, torch.dtype, torch.device]]


@dataclass(frozen=True)
class _StepCache:
    """The discretisation of the last step.

    Attributes:
        key: what `terms` were computed from.
        tensors: the parameters and buffers, held so that no other tensor gets their ids.
        terms: the arguments of `ops.ssm_step`.
    """

    key: tuple[torch.dtype, float, str, _Stamp]
    tensors: tuple[Tensor, ...]
    terms: _Terms


class DiagonalSSM(ScanLayer):
    """One diagonal state space model per channel, with N = d_state / 2 complex modes in conjugate pairs.

        x'(t) = A x(t) + B u(t),  y(t) = 2 Re(C x(t)) + D u(t),   A = −exp(log_A_real) + i A_imag
        zero-order hold:  Ā = exp(ΔA),                  B̄ = (Ā − 1) / A · B,      Δ = rate · exp(log_dt)
        bilinear:         Ā = (1 + ΔA/2) / (1 − ΔA/2),  B̄ = ΔB / (1 − ΔA/2)
        x_t = Ā x_{t−1} + B̄ u_t,   y_t = 2 Re(C x_t) + D u_t

    The real part of A is negative for every parameter value, so the model is stable. If bidirectional, a second model
    reads the reversed sequence, and its outputs are added. It has its own C and shares A, B and Δ. All arithmetic is
    float32 (float64 for float64 inputs) with autocast off, and `.half()` or `.bfloat16()` leave the parameters in
    float32.

    Args:
        channels: H, independent channels.
        d_state: 2N, real size of the state of a channel; even, default 64.
        causal: only past and present, default False (bidirectional).
        init: of A: "lin" −½ + iπn (default), "inv" −½ + i (2N/π)(2N/(2n+1) − 1), or "real" −(n+1).
        discretization: "zoh" (default) or "bilinear".
        dt_min, dt_max: range of Δ, drawn log-uniformly, default 1e-3 to 1e-1.
        trained: which of "A", "B" and "dt" are learned, default ("A", "dt"). Untrained A and dt are buffers of the same
            names, so checkpoints fit either way. An untrained B is 1 and isn't stored, because C absorbs it.
        backend: see `ops.ssm_scan`.
        device: where the parameters live.
        dtype: torch.float64 for double parameters, anything else gives float32.

    Parameters:
        log_dt (H,), log_A_real (H, N), A_imag (H, N), C (H, N, 2) or, bidirectional, (2, H, N, 2), D (H,); with "B" in
        `trained` also B (H, N, 2), from 1 + 0i. C and B are pairs of real and imaginary part.

    Raises:
        ValueError, TypeError: sizes out of range or unknown options; in `forward` a wrong shape or dtype.

    Example:
        >>> ssm = DiagonalSSM(8, d_state=16, causal=True)
        >>> ssm(torch.randn(2, 100, 8)).shape
        torch.Size([2, 100, 8])

    Source: Gu et al. 2022 (arXiv 2206.11893), sections 3 and 4.
    """

    log_dt: Tensor
    log_A_real: Tensor
    A_imag: Tensor
    B: Tensor
    C: nn.Parameter
    D: nn.Parameter
    trained: tuple[str, ...]

    # For `optimizer_groups`.
    slow_parameters: ClassVar[dict[str, str]] = {name: kind for kind, names in TRAINABLE.items() for name in names}
    no_decay_parameters = ("C", "D")

    _step_cache: _StepCache | None = None

    def __init__(
        self,
        channels: int,
        *,
        d_state: int = 64,
        causal: bool = False,
        init: str = "lin",
        discretization: str = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        trained: Collection[str] = ("A", "dt"),
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check.positive("DiagonalSSM", channels=channels, d_state=d_state)
        check.floating("DiagonalSSM", dtype)
        check.flags("DiagonalSSM", causal=causal)
        if d_state % 2:
            raise ValueError(f"DiagonalSSM: d_state must be even (conjugate pairs), got {d_state}")
        check.one_of("DiagonalSSM", "init", init, INITS)
        check.one_of("DiagonalSSM", "discretization", discretization, tuple(DISCRETIZATIONS))
        check.one_of("DiagonalSSM", "backend", backend, BACKENDS)
        check.number("DiagonalSSM", "dt_min", dt_min)
        check.number("DiagonalSSM", "dt_max", dt_max)
        if not 0 < dt_min <= dt_max < math.inf:
            raise ValueError(f"DiagonalSSM: dt_min and dt_max must be 0 < dt_min <= dt_max, got {dt_min}, {dt_max}")
        self.channels, self.d_state, self.causal = channels, d_state, causal
        self.init, self.discretization, self.backend = init, discretization, backend
        self.dt_min, self.dt_max = dt_min, dt_max
        self.trained = _names(trained)
        real = storage_factory(device, dtype)
        shape = (channels, d_state // 2)  # (H, N)
        self._add("dt", "log_dt", torch.empty(channels, **real))
        self._add("A", "log_A_real", torch.empty(shape, **real))
        self._add("A", "A_imag", torch.empty(shape, **real))
        if "B" in self.trained:
            self._add("B", "B", torch.empty((*shape, 2), **real))
        self.C = nn.Parameter(torch.empty((*shape, 2) if causal else (2, *shape, 2), **real))
        self.D = nn.Parameter(torch.empty(channels, **real))
        self.reset_parameters()

    def _add(self, kind: str, name: str, values: Tensor) -> None:
        if kind in self.trained:
            self.register_parameter(name, nn.Parameter(values))
        else:
            self.register_buffer(name, values)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new Δ, C and D, and set A and B to their initial values."""
        self.log_dt.uniform_(math.log(self.dt_min), math.log(self.dt_max))
        n = torch.arange(self.d_state // 2, device=self.A_imag.device, dtype=self.A_imag.dtype)
        if self.init == "real":
            self.log_A_real.copy_((n + 1).log().expand_as(self.log_A_real))
            self.A_imag.zero_()
        else:
            inverse = self.d_state / math.pi * (self.d_state / (2 * n + 1) - 1)
            self.log_A_real.fill_(math.log(0.5))
            self.A_imag.copy_((math.pi * n if self.init == "lin" else inverse).expand_as(self.A_imag))
        if "B" in self.trained:
            self.B.copy_(torch.tensor([1.0, 0.0]).expand_as(self.B))
        self.C.normal_(std=0.5**0.5)  # complex with unit variance
        self.D.normal_()

    def discrete(self, dtype: torch.dtype = torch.float32, rate: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """The arguments of `ops.ssm_scan`: log Ā (H, N) and weight 2·C·B̄ (directions, H, N), complex, and D (H,).

        `dtype` is the precision of the arithmetic, float32 or float64; `rate` multiplies Δ.
        """
        with no_autocast(self.log_dt.device):
            dt = (self.log_dt.to(dtype).exp() * rate).unsqueeze(-1)
            decay = (-self.log_A_real.to(dtype).exp() * dt).clamp(min=_LEAST_LOG_DECAY)
            turn = self.A_imag.to(dtype) * dt
            log_decay, gain = DISCRETIZATIONS[self.discretization](decay, turn)
            if "B" in self.trained:
                gain = gain * torch.view_as_complex(self.B.to(dtype).contiguous())
            readout = torch.view_as_complex(self.C.to(dtype).contiguous()).reshape(-1, *turn.shape)
            return log_decay, 2 * readout * gain * dt, self.D.to(dtype)

    def forward(
        self,
        u: Tensor,
        key_padding_mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        initial_state: Tensor | None = None,
        return_state: bool = False,
        rate: float = 1.0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run over whole sequences.

        Args:
            u: (B, L, H), any floating dtype.
            key_padding_mask: (B, L) bool, True = this input counts as 0 and this output is 0. The state keeps
                decaying over padding.
            cu_seqlens: (documents + 1,) int32, offsets of documents in one row (B = 1) that don't see each other, see
                `ops.ssm_scan`. States are then (documents, H, N). Default none.
            initial_state: (B, H, N) complex, from an earlier call; causal only. Default zero.
            return_state: also return the state after the last position; causal only. Default False.
            rate: multiplies Δ in this call, default 1.0. A model trained at 16 kHz reads 8 kHz with 2.0.

        Returns:
            y (B, L, H), dtype of u; with `return_state` also the state (B, H, N), complex.

        Raises:
            ValueError, TypeError: wrong shapes or dtypes, a `rate` that isn't a finite number above 0.
            NotImplementedError: a bidirectional model with a state: its outputs depend on the future.
        """
        self._check_forward(u, key_padding_mask, cu_seqlens, initial_state is not None or return_state)
        _check_rate(rate)
        self._forget_step()
        log_decay, weight, skip = self.discrete(arithmetic_dtype(u.dtype), rate)
        return self._scan(
            u,
            (log_decay, log_decay),
            weight,
            skip,
            key_padding_mask=key_padding_mask,
            cu_seqlens=cu_seqlens,
            initial_state=initial_state,
            return_state=return_state,
        )

    def initial_state(self, batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The zero state (batch, H, N), complex; `dtype` float64 for float64 inputs."""
        step_checks.batch("DiagonalSSM.initial_state", batch)
        self._forget_step()
        complex_dtype = torch.complex128 if dtype == torch.float64 else torch.complex64
        shape = (batch, self.channels, self.d_state // 2)
        return torch.zeros(shape, dtype=complex_dtype, device=self.log_dt.device)

    def step(self, u: Tensor, state: Tensor, *, rate: float = 1.0) -> tuple[Tensor, Tensor]:
        """Run the next position. Outputs equal those of `forward` up to rounding.

        The discretisation is cached between calls while no gradient is asked for. Most changes of the parameters are
        noticed at once: optimizer steps, `load_state_dict`, `.to()`, any in-place operation. PyTorch doesn't count
        changes in place by a fused optimizer, through `.data` or through a NumPy view. They take effect from the next
        call of `forward`, `initial_state`, `train` or `eval` on.

        Args:
            u: (B, H), any floating dtype.
            state: (B, H, N), complex: complex128 for float64 `u`, else complex64; not modified.
            rate: multiplies Δ in this call, default 1.0.

        Returns:
            y (B, H), dtype of u, and the new state (B, H, N).

        Raises:
            ValueError, TypeError: wrong shapes, dtypes or devices, a `rate` that isn't a finite number above 0.
            NotImplementedError: a bidirectional model.
        """
        step_checks.causal("DiagonalSSM.step", self.causal)
        if not isinstance(u, Tensor) or u.shape[1:] != (self.channels,):  # `ops.ssm_step` checks the rest
            check.tensor("DiagonalSSM.step", "u", u, "B H")
            check.size("DiagonalSSM.step", "u", u, (u.shape[0], self.channels), "B H")
        _check_rate(rate)
        decay, weight, skip = self._discrete_step(arithmetic_dtype(u.dtype), rate)
        return ops.ssm_step(u, decay, weight, state, skip=skip, backend=self.backend)

    def _discrete_step(self, dtype: torch.dtype, rate: float) -> _Terms:
        """The arguments of `ops.ssm_step`: Ā and 2·C·B̄ (H, N) and D (H,), from the cache if nothing has changed."""
        if torch.compiler.is_compiling():
            return self._discretise_step(dtype, rate)
        # Not parameters() and buffers(), which are slow. Their type allows None; none of these is.
        tensors: tuple[Tensor, ...] = (*self._parameters.values(), *self._buffers.values())  # type: ignore[arg-type]
        # With a parametrisation or a hook, some tensors are computed from others. The number of tensors then differs.
        stamp = _stamp(tensors) if len(tensors) == 5 + ("B" in self.trained) else None
        if stamp is None or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
            return self._discretise_step(dtype, rate)
        if tensors[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return self._discretise_step(dtype, rate)  # a CUDA graph lives longer than the cache
        key = (dtype, rate, self.discretization, stamp)
        cache = self._step_cache  # read once: another thread may clear it meanwhile
        if cache is not None and cache.key == key:
            return cache.terms
        # No inference tensors, even in a caller's inference mode: a later call may save the terms for backward.
        with torch.inference_mode(False), torch.no_grad():
            terms = self._discretise_step(dtype, rate)
        if _stamp(terms) is not None:
            self._step_cache = _StepCache(key, tensors, terms)
        return terms

    def _discretise_step(self, dtype: torch.dtype, rate: float) -> _Terms:
        log_decay, weight, skip = self.discrete(dtype, rate)
        return log_decay.exp(), weight[0], skip

    def _forget_step(self) -> None:
        # Called where a sequence starts and where the whole module changes: no unnoticed change lasts longer.
        if not torch.compiler.is_compiling() and self._step_cache is not None:
            self._step_cache = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._forget_step()
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> Self:
        self._forget_step()
        return super().train(mode)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_step_cache"}

    def extra_repr(self) -> str:
        return arguments_repr(self, DiagonalSSM)


def _names(trained: object) -> tuple[str, ...]:
    choices = tuple(TRAINABLE)
    if isinstance(trained, str) or not isinstance(trained, Collection):
        raise TypeError(f"DiagonalSSM: trained must be a collection of names out of {choices}, got {trained!r}")
    for name in trained:
        check.one_of("DiagonalSSM", "trained", name, choices)
    return tuple(name for name in choices if name in trained)


def _check_rate(rate: float) -> None:
    check.number("DiagonalSSM", "rate", rate)
    if not 0 < rate < math.inf:
        raise ValueError(f"DiagonalSSM: rate must be a finite number above 0, got {rate}")


def _stamp(tensors: tuple[Tensor, ...]) -> _Stamp | None:
    """A value that changes when a tensor does; None if changes can't be noticed, so that nothing may be cached.

    Changes can't be noticed in subclasses (fake tensors), inside `torch.func` (no storage) and in inference tensors (no
    version). Assigning `.data` changes the address, but not the version. `.data.mul_()` and fused optimizers change
    neither; `_forget_step` limits how long such a change goes unnoticed.
    """
    try:
        stamp = [(id(t), t._version, t.data_ptr(), t.dtype, t.device) for t in tensors if type(t) in _ORDINARY]
    except RuntimeError:
        return None
    return stamp if len(stamp) == len(tensors) else None


def _zoh(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    # z = ΔA = a + ib -> log Ā = z and B̄ / Δ = (exp(z) − 1) / z, exact for small z
    half = (b / 2).sin()
    grown = torch.complex(a.expm1() * b.cos() - 2 * half * half, a.exp() * b.sin())  # exp(z) − 1
    z = torch.complex(a, b)
    tiny = z.abs() < 1e-12  # Δ or A underflowed; the limit of the quotient is 1
    return z, torch.where(tiny, 1.0, grown / torch.where(tiny, 1.0, z))


def _bilinear(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    # w = ΔA/2 = x + iy -> log Ā = log(1 + w) − log(1 − w) and B̄ / Δ = 1 / (1 − w)
    x, y = a / 2, b / 2
    # |1+w|²/|1−w|² = 1 + 4x/((1−x)²+y²) keeps small decays exact. The clamp keeps the logarithm finite where Ā = 0.
    ratio = (4 * x / ((1 - x).square() + y.square())).clamp(min=-1 + 1e-7)
    real = torch.where(1 + x == 0, 1e-12, 1 + x)
    angle = torch.atan2(y, real) + torch.atan2(y, 1 - x)
    return torch.complex(ratio.log1p() / 2, angle), 1 / torch.complex(1 - x, -y)


# Functions from ΔA = a + ib to log Ā and B̄ / Δ (at B = 1).
DISCRETIZATIONS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {"zoh": _zoh, "bilinear": _bilinear}
