"""A state space model over the next piece of growing sequences, where masked tokens take no position."""

from torch import Tensor, nn


def advance(ssm: nn.Module, u: Tensor, state: Tensor, key_padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Run a causal `DiagonalSSM`, `S4DLayer` or `DampedEMA` over u (B, T, H), finite, from `state` (B, H, N) on.

    Over a mask its `forward` would let time pass: here the state of a row stays exactly as it was.

    Returns:
        y (B, T, H), 0 at masked positions, and the new state.
    """
    if u.shape[1] == 1:
        y, after = ssm.step(u[:, 0], state)
        if key_padding_mask is not None:
            y = y.masked_fill(key_padding_mask, 0)
            after = state.where(key_padding_mask.unsqueeze(-1), after)
        return y.unsqueeze(1), after
    if key_padding_mask is None:
        return ssm(u, initial_state=state, return_state=True)
    kept = ~key_padding_mask
    offsets = nn.functional.pad(kept.sum(1).cumsum(0), (1, 0)).int()
    packed, after = ssm(u[kept].unsqueeze(0), cu_seqlens=offsets, initial_state=state, return_state=True)
    y = packed.new_zeros(u.shape)
    y[kept] = packed[0]
    return y, after
