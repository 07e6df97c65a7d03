"""State space models over the next piece of growing sequences."""

from torch import Tensor, nn

from longvq_layers.layers.ssm.diagonal import DiagonalSSM
from longvq_layers.layers.ssm.ema import DampedEMA
from longvq_layers.layers.ssm.s4d import S4DLayer


def advance(
    ssm: DiagonalSSM | S4DLayer | DampedEMA, u: Tensor, state: Tensor, key_padding_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run an SSM over the next tokens of growing sequences, where masked tokens take no position.

    The state of a row stays exactly the same over masked tokens. In `ssm.forward` it would decay.

    Args:
        ssm: causal.
        u: (B, T, H), finite.
        state: (B, H, N), from `ssm.initial_state` or an earlier call.
        key_padding_mask: (B, T) bool, True = the token takes no position. Default none.

    Returns:
        y (B, T, H), 0 at masked tokens, and the new state.
    """
    if u.shape[1] == 1:
        y, after = ssm.step(u[:, 0], state)
        if key_padding_mask is not None:
            y = y.masked_fill(key_padding_mask, 0)
            after = state.where(key_padding_mask.unsqueeze(-1), after)
        return y.unsqueeze(1), after
    if key_padding_mask is None:
        return ssm(u, initial_state=state, return_state=True)
    # Without the masked tokens, the rows are documents of one packed row.
    kept = ~key_padding_mask
    offsets = nn.functional.pad(kept.sum(1).cumsum(0), (1, 0)).int()
    packed, after = ssm(u[kept].unsqueeze(0), cu_seqlens=offsets, initial_state=state, return_state=True)
    y = packed.new_zeros(u.shape)
    y[kept] = packed[0]
    return y, after
