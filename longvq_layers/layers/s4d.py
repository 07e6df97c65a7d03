"""The S4D layer: state space model, activation, dropout and output projection."""

import torch
from torch import Tensor, nn

from longvq_layers.layers import _inputs
from longvq_layers.layers.ssm import DiagonalSSM
from longvq_layers.ops import _checks as check

_ACTIVATIONS = {"gelu": nn.GELU, "silu": nn.SiLU, "relu": nn.ReLU, "identity": nn.Identity}


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
        init, discretization, dt_min, dt_max, backend: see `DiagonalSSM`.
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
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _inputs.positive("S4DLayer", d_model=d_model)
        _inputs.floating("S4DLayer", dtype)
        _inputs.probability("S4DLayer", "dropout", dropout)
        check.one_of("S4DLayer", "activation", activation, tuple(_ACTIVATIONS))
        self.d_model, self.activation, self.glu = d_model, activation, bool(glu)
        self.ssm = DiagonalSSM(
            d_model,
            d_state=d_state,
            causal=causal,
            init=init,
            discretization=discretization,
            dt_min=dt_min,
            dt_max=dt_max,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        self.act = _ACTIVATIONS[activation]()
        self.dropout = nn.Dropout(dropout)
        self.out_proj = nn.Linear(d_model, 2 * d_model if glu else d_model, device=device, dtype=dtype)

    def forward(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None = None,
        *,
        initial_state: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run over whole sequences.

        Args:
            x: (B, L, d_model), dtype of the layer.
            key_padding_mask: (B, L) bool, True = this input counts as 0.
            initial_state: (B, d_model, N) complex; causal only. Default zero.
            return_state: also return the state after the last position; causal only. Default False.

        Returns:
            (B, L, d_model), exactly 0 at masked positions; with `return_state` also the state (B, d_model, N).
        """
        _inputs.sequence("S4DLayer", "x", x, self.d_model, self.out_proj.weight, key_padding_mask)
        result = self.ssm(x, key_padding_mask, initial_state=initial_state, return_state=return_state)
        y, state = result if return_state else (result, None)
        y = _inputs.zero_padding(self._mix_channels(y), key_padding_mask)
        return (y, state) if return_state else y

    def initial_state(self, batch: int) -> Tensor:
        """The zero state (batch, d_model, N), complex, for `step`."""
        return self.ssm.initial_state(batch, self.out_proj.weight.dtype)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One position, in constant time and memory: x (B, d_model), state -> y (B, d_model), new state.

        Raises NotImplementedError unless causal=True.
        """
        y, state = self.ssm.step(x, state)
        return self._mix_channels(y), state

    def _mix_channels(self, y: Tensor) -> Tensor:
        y = self.out_proj(self.dropout(self.act(y)))
        return nn.functional.glu(y, dim=-1) if self.glu else y

    def extra_repr(self) -> str:
        ssm = self.ssm
        return _inputs.call_repr(
            (self.d_model,),
            d_state=ssm.d_state,
            causal=ssm.causal,
            dropout=self.dropout.p,
            activation=self.activation,
            glu=self.glu,
            init=ssm.init,
            discretization=ssm.discretization,
            dt_min=ssm.dt_min,
            dt_max=ssm.dt_max,
            backend=ssm.backend,
        )
