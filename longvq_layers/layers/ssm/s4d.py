"""The S4D layer: state space model, activation, dropout and output projection."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from longvq_layers import _checks as check
from longvq_layers.layers.common import input_checks
from longvq_layers.layers.common.padding import zero_padding
from longvq_layers.layers.common.representation import arguments_repr
from longvq_layers.layers.published.s4d_minimal import read_minimal
from longvq_layers.layers.ssm.diagonal import DiagonalSSM

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "silu": nn.SiLU, "relu": nn.ReLU, "identity": nn.Identity}


class S4DLayer(nn.Module):
    """A diagonal state space model that mixes positions, then a linear layer that mixes channels.

        h = dropout(activation(SSM(x)))
        y = GLU(h W + b)                with W (d_model, 2 d_model); without glu: y = h W + b

    Args:
        d_model: width, one SSM per channel.
        d_state: 2N, state of a channel, even, default 64.
        causal: only past and present, default False (bidirectional).
        dropout: probability of dropping an element of h, default 0.0.
        activation: "gelu" (default), "silu", "relu" or "identity".
        glu: whether the output is gated, default True.
        init, discretization, dt_min, dt_max, trained, backend: see `DiagonalSSM`.
        device, dtype: of the output layer; the SSM stays in float32 or float64.

    Raises:
        ValueError, TypeError: sizes out of range or unknown options; in `forward` a wrong shape, dtype or device.

    Example:
        >>> layer = S4DLayer(16, d_state=8, causal=True).eval()
        >>> x = torch.randn(2, 50, 16)
        >>> state, tokens = layer.initial_state(2), []
        >>> for t in range(50):
        ...     y, state = layer.step(x[:, t], state)
        ...     tokens.append(y)
        >>> torch.allclose(torch.stack(tokens, 1), layer(x), atol=1e-4)
        True

    Source: Gu et al. 2022 (arXiv 2206.11893).
    """

    ssm: DiagonalSSM
    act: nn.Module
    out_proj: nn.Linear

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        causal: bool = False,
        dropout: float = 0.0,
        activation: str = "gelu",
        glu: bool = True,
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
        check.positive("S4DLayer", d_model=d_model)
        check.floating("S4DLayer", dtype)
        check.flags("S4DLayer", causal=causal, glu=glu)
        check.probability("S4DLayer", "dropout", dropout)
        check.one_of("S4DLayer", "activation", activation, tuple(ACTIVATIONS))
        self.d_model, self.activation, self.glu = d_model, activation, glu
        self.ssm = DiagonalSSM(
            d_model,
            d_state=d_state,
            causal=causal,
            init=init,
            discretization=discretization,
            dt_min=dt_min,
            dt_max=dt_max,
            trained=trained,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        self.act = ACTIVATIONS[activation]()
        self.dropout = nn.Dropout(dropout)
        self.out_proj = nn.Linear(d_model, 2 * d_model if glu else d_model, device=device, dtype=dtype)

    def forward(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        initial_state: Tensor | None = None,
        return_state: bool = False,
        rate: float = 1.0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run over whole sequences.

        Args:
            x: (B, L, d_model), dtype of the layer.
            key_padding_mask: (B, L) bool, True = this input counts as 0.
            cu_seqlens: (documents + 1,) int32, offsets of documents in one row (B = 1) that don't see each other, see
                `ops.ssm_scan`. States are then (documents, d_model, N). Default none.
            initial_state: (B, d_model, N) complex; causal only. Default zero.
            return_state: also return the state after the last position; causal only. Default False.
            rate: multiplies Δ in this call, default 1.0. A model trained at 16 kHz reads 8 kHz with 2.0.

        Returns:
            (B, L, d_model), exactly 0 at masked positions; with `return_state` also the state (B, d_model, N).

        Raises:
            ValueError, TypeError: a wrong shape, dtype or device, a `rate` that isn't a finite number above 0.
            NotImplementedError: a bidirectional layer with a state: its outputs depend on the future.
        """
        input_checks.sequence("S4DLayer", "x", x, self.d_model, self.out_proj.weight, key_padding_mask)
        input_checks.packed("S4DLayer", "x", x, cu_seqlens)
        result = self.ssm(
            x,
            key_padding_mask,
            cu_seqlens=cu_seqlens,
            initial_state=initial_state,
            return_state=return_state,
            rate=rate,
        )
        y = result[0] if return_state else result
        y = zero_padding(self._mix_channels(y, self.out_proj), key_padding_mask)
        return (y, result[1]) if return_state else y

    def initial_state(self, batch: int) -> Tensor:
        """The zero state (batch, d_model, N), complex, for `step`."""
        return self.ssm.initial_state(batch, self.out_proj.weight.dtype)

    def step(self, x: Tensor, state: Tensor, *, rate: float = 1.0) -> tuple[Tensor, Tensor]:
        """Run the next position, in constant time and memory. `DiagonalSSM.step` says what is cached between calls.

        Args:
            x: (B, d_model), dtype of the layer.
            state: (B, d_model, N), complex, from `initial_state`, `forward` or the step before; not modified.
            rate: multiplies Δ in this call, default 1.0.

        Returns:
            y (B, d_model) and the new state (B, d_model, N).

        Raises:
            ValueError, TypeError: wrong shapes, dtypes or devices, a `rate` that isn't a finite number above 0.
            NotImplementedError: a bidirectional layer.
        """
        out_proj = self.out_proj  # looked up once: reading an attribute of a module takes microseconds
        weight = out_proj.weight
        if getattr(x, "dtype", None) is not weight.dtype:  # the SSM checks the rest
            check.tensor("S4DLayer.step", "x", x, "B d_model")
            check.real("S4DLayer.step", "x", x)
            input_checks.layer_dtype("S4DLayer.step", "x", x, weight)
        y, state = self.ssm.step(x, state, rate=rate)
        return self._mix_channels(y, out_proj), state

    @classmethod
    def from_minimal(
        cls,
        state_dict: Mapping[str, Tensor],
        prefix: str = "",
        *,
        dropout: float = 0.0,
        trained: Collection[str] = ("A", "dt"),
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "S4DLayer":
        """A layer with the numbers of the public minimal S4D layer (`models/s4/s4d.py` of `state-spaces/s4`).

        That layer is causal, with zero-order hold, GELU and GLU, and takes (B, d_model, L). The new layer gives the
        same outputs for (B, L, d_model). A checkpoint doesn't hold that layer's dropout (by default of whole channels).

        Args:
            state_dict: under `prefix` the keys D (H,), kernel.log_dt (H,), kernel.log_A_real (H, N), kernel.A_imag
                (H, N), kernel.C (H, N, 2), output_linear.0.weight (2H, H, 1) and output_linear.0.bias (2H,). The keys
                are the same for tensors that were not trained. Tensors are copied.
            prefix: text before these keys, such as "layers.3.". Default none.
            dropout, trained, backend: of the new layer, as in `S4DLayer`.
            device, dtype: of the new layer, default those of output_linear.0.weight.

        Returns:
            The layer, in training mode.

        Raises:
            ValueError: missing or unknown keys under `prefix`, or wrong shapes; names them.
            TypeError: a value that isn't a real floating-point tensor.

        Example:
            >>> shapes = {"D": (4,), "kernel.log_dt": (4,), "kernel.log_A_real": (4, 8), "kernel.A_imag": (4, 8)}
            >>> shapes |= {"kernel.C": (4, 8, 2), "output_linear.0.weight": (8, 4, 1), "output_linear.0.bias": (8,)}
            >>> layer = S4DLayer.from_minimal({name: torch.zeros(shape) for name, shape in shapes.items()})
            >>> layer(torch.randn(2, 50, 4)).shape
            torch.Size([2, 50, 4])
        """
        values = read_minimal(state_dict, prefix)
        weight = values["out_proj.weight"]
        width, modes = values["ssm.A_imag"].shape
        layer = cls(
            width,
            d_state=2 * modes,
            causal=True,
            dropout=dropout,
            trained=trained,
            backend=backend,
            device=weight.device if device is None else device,
            dtype=dtype or weight.dtype,
        )
        layer.load_state_dict(values, strict=False)  # the checkpoint has no B: there B is 1, and so it starts here
        return layer

    def _mix_channels(self, y: Tensor, out_proj: nn.Linear) -> Tensor:
        y = out_proj(self.dropout(self.act(y)))
        return nn.functional.glu(y, dim=-1) if self.glu else y

    def extra_repr(self) -> str:
        return arguments_repr(self, S4DLayer, self.ssm)
