"""What the scan is timed against: the same model computed in the ways others compute it, checked to be the same.

| method | what it does | layout |
|---|---|---|
| vandermonde | the public minimal S4D: the kernel from a full (H, N, L) Vandermonde matrix, then fft | B H L |
| fft | FFT convolution alone, its kernel given | B H L |
| torch | `ops.ssm_scan(…, backend="torch")` | B L H |
| copy | `copy_` of u into memory that is there already | |
| clone | `clone` of u: a copy into new memory, as every result needs it | |

Each peer gets its inputs in its own layout; no transposition is charged to it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from longvq_layers import ops
from longvq_layers.layers.ssm.diagonal import DiagonalSSM

D_STATE = 64
MODES = D_STATE // 2  # complex

# Largest difference between two methods, relative to the largest value: all round to float32 in other places, most so
# the phases of the Vandermonde matrix; differences up to 1e-5 were seen.
TOLERANCE = 1e-4

_CHECKED = ("vandermonde", "fft", "torch")
_ROWS = ("vandermonde", "fft")  # methods whose natural layout is (B, H, L)

# Vandermonde-sized complex64 tensors alive at once: the exponents, their exponentials and, with gradients, those of
# both and what is saved for them.
_VANDERMONDE_COPIES = {"forward": 2, "forward + backward": 5}
MOST_BYTES = 4 * 10**9


class Problem:
    """One size: the model, its discretised parameters, u and the gradient of y, in both layouts."""

    def __init__(self, batch: int, channels: int, length: int, backend: str):
        torch.manual_seed(0)
        self.batch, self.channels, self.length, self.backend = batch, channels, length, backend
        self.ssm = DiagonalSSM(channels, d_state=D_STATE, causal=True)
        with torch.no_grad():
            self.log_decay, weight, self.skip = self.ssm.discrete()
            self.weight, self.skip = weight[0].clone(), self.skip.clone()
            self.kernel = ops.ssm_kernel(self.log_decay, self.weight, length)
        self.u, self.grad_y = torch.randn(2, batch, length, channels).unbind()
        self.u_rows, self.grad_rows = (x.transpose(1, 2).contiguous() for x in (self.u, self.grad_y))

    def peers(self, case: str) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
        """Calls by name, "ours" first, and the reasons why some are left out."""
        build = self._forward if case == "forward" else self._with_backward
        calls, skipped = build(), {}
        needed = _VANDERMONDE_COPIES[case] * 8 * self.channels * MODES * self.length
        if needed > MOST_BYTES:
            del calls["vandermonde"]
            skipped["vandermonde"] = f"would take about {needed / 1e9:.1f} GB, more than {MOST_BYTES / 1e9:.0f} GB"
        copy = torch.empty_like(self.u)
        return {**calls, "copy": lambda: copy.copy_(self.u), "clone": self.u.clone}, skipped

    def _forward(self) -> dict[str, Callable[[], Tensor]]:
        model = [x.detach() for x in self._model_parameters()]
        with_skip = self.kernel.clone()
        with_skip[:, 0] += self.skip  # the kernel is given: D is its first tap
        scan = {name: self._scan(name) for name in ("ours", "torch")}
        return {
            "ours": lambda: scan["ours"](self.u, self.log_decay, self.weight, self.skip),
            "vandermonde": lambda: vandermonde(self.u_rows, *model),
            "fft": lambda: fft(self.u_rows, with_skip),
            "torch": lambda: scan["torch"](self.u, self.log_decay, self.weight, self.skip),
        }

    def _with_backward(self) -> dict[str, Callable[[], list[Tensor]]]:
        """Each returns y and the gradients: of u and D first, the rest in the order of its arguments."""

        def differentiated(function, grad_y, first, second, *rest):
            leaves = [x.detach().clone().requires_grad_() for x in (first, second, *rest)]

            def call():
                y = function(*leaves)
                return [y.detach(), *torch.autograd.grad(y, leaves, grad_y)]

            return call

        def ours(scan):
            return lambda u, skip, log_decay, weight: scan(u, log_decay, weight, skip)

        parameters = self.log_decay, self.weight
        *model, skip = self._model_parameters()
        return {
            "ours": differentiated(ours(self._scan("ours")), self.grad_y, self.u, self.skip, *parameters),
            "vandermonde": differentiated(
                lambda u, skip, *model: vandermonde(u, *model, skip), self.grad_rows, self.u_rows, skip, *model
            ),
            "fft": differentiated(
                lambda u, skip, kernel: fft(u, kernel, skip), self.grad_rows, self.u_rows, self.skip, self.kernel
            ),
            "torch": differentiated(ours(self._scan("torch")), self.grad_y, self.u, self.skip, *parameters),
        }

    def _scan(self, method: str) -> Callable[..., Tensor]:
        backend = self.backend if method == "ours" else method
        return lambda u, log_decay, weight, skip: ops.ssm_scan(u, log_decay, weight, skip=skip, backend=backend)

    def _model_parameters(self) -> list[Tensor]:
        return [getattr(self.ssm, name) for name in ("log_dt", "log_A_real", "A_imag", "C", "D")]

    def differences(self, calls: dict[str, Callable[[], object]], case: str) -> dict[str, float]:
        """Largest difference of each peer from ours, relative to the largest value of the peer.

        With gradients those count as well, each relative to itself; ours are taken on to the parameters of the model
        to compare with the Vandermonde form.

        Raises:
            AssertionError: a difference is beyond `TOLERANCE`.
        """
        ours = calls["ours"]()
        found = {}
        for name in [name for name in _CHECKED if name in calls]:
            theirs = calls[name]()
            if case == "forward":
                pairs = {"y": (ours, theirs)}
            else:
                names = ("y", "gradient of u", "gradient of D")
                pairs = dict(zip(names, zip(ours, theirs, strict=False), strict=False))
                if name == "vandermonde":
                    pairs |= self._model_gradients(ours[3:], theirs[3:])
                elif name == "torch":
                    pairs |= {f"gradient {i}": pair for i, pair in enumerate(zip(ours[3:], theirs[3:], strict=True))}
            found[name] = max(
                _compare(name, what, mine.mT if name in _ROWS and what in ("y", "gradient of u") else mine, other)
                for what, (mine, other) in pairs.items()
            )
        return found

    def _model_gradients(self, ours: list[Tensor], theirs: list[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        *model, _ = self._model_parameters()
        log_decay, weight, _ = self.ssm.discrete()
        mine = torch.autograd.grad([log_decay, weight[0]], model, list(ours))
        names = [f"gradient of {name}" for name in ("log_dt", "log_A_real", "A_imag", "C")]
        return dict(zip(names, zip(mine, theirs, strict=True), strict=True))


def _compare(method: str, what: str, ours: Tensor, theirs: Tensor) -> float:
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    if not difference <= TOLERANCE:  # also for NaN
        raise AssertionError(
            f"{what}: ours differs from {method} by {difference:.2g} of the largest value, more than "
            f"{TOLERANCE:.0e}; a wrong result is not timed"
        )
    return difference


def vandermonde(u: Tensor, log_dt: Tensor, log_A_real: Tensor, A_imag: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """(B, H, L) -> (B, H, L) as in the minimal S4D published by its authors, discretisation included."""
    dt = torch.exp(log_dt)
    A = -torch.exp(log_A_real) + 1j * A_imag
    dtA = A * dt.unsqueeze(-1)
    powers = dtA.unsqueeze(-1) * torch.arange(u.shape[-1], device=u.device)
    readout = torch.view_as_complex(C) * (torch.exp(dtA) - 1.0) / A
    kernel = 2 * torch.einsum("hn,hnl->hl", readout, torch.exp(powers)).real
    return fft(u, kernel, D)


def fft(u: Tensor, kernel: Tensor, D: Tensor | None = None) -> Tensor:
    """(B, H, L) with (H, L) -> (B, H, L), by transforms of length 2L."""
    length = u.shape[-1]
    product = torch.fft.rfft(u, n=2 * length) * torch.fft.rfft(kernel, n=2 * length)
    y = torch.fft.irfft(product, n=2 * length)[..., :length]
    return y if D is None else y + u * D.unsqueeze(-1)
