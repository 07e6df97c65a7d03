"""The state of attention over a growing sequence. Its size is constant."""

from dataclasses import dataclass

import torch
from torch import Tensor

from longvq_layers import _checks as check
from longvq_layers.ops._attention_options import LOCAL_KEYS
from longvq_layers.ops._state import State


@dataclass(eq=False, repr=False)
class VQAttentionState(State):
    """The past of a batch of sequences, as :func:`vq_attention_step` needs it; made by :func:`vq_attention_state`.

    The last ``R = max(W − 1, 0)`` keys are stored in a ring, the key at ``position`` in slot ``position % R``. When a
    key leaves the window, its value is added to the sum of its code, and 1 to the count of its code. So the size does
    not grow with the length. The tensors are contiguous, are updated in place and may be read at any time.
    :meth:`clone` makes a copy that continues separately.

    Attributes:
        far_sums: (B, Hkv, S, E) sums of the values of each code's keys before the window, float32 or float64.
        far_counts: (B, Hkv, S) int64, number of those keys: exact at any length.
        ring_codes: (B, Hkv, R) int64, codes of the keys in the window.
        ring_keys: (B, Hkv, R, D) the keys themselves with ``local_keys="exact"``, else (B, Hkv, R, 0).
        ring_values: (B, Hkv, R, E).
        lengths: (B,) int64, number of tokens that each row has seen.
        window: W.
        local_keys: ``"quantized"`` or ``"exact"``.
    """

    far_sums: Tensor
    far_counts: Tensor
    ring_codes: Tensor
    ring_keys: Tensor
    ring_values: Tensor
    lengths: Tensor
    window: int
    local_keys: str

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of sums, keys and values: float32 or float64."""
        return self.far_sums.dtype

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""
        return self.far_sums.device

    @property
    def reach(self) -> int:
        """R, number of keys that the ring holds at most."""
        return max(self.window - 1, 0)

    @property
    def keeps_keys(self) -> bool:
        """Whether the ring holds the keys themselves."""
        return self.ring_keys.shape[3] > 0

    def tensors(self) -> tuple[Tensor, ...]:
        """The six tensors, in the order of the attributes."""
        # Written out because it is faster than `State.tensors`: every step calls this.
        return (self.far_sums, self.far_counts, self.ring_codes, self.ring_keys, self.ring_values, self.lengths)


def vq_attention_state(
    batch: int,
    codebook: Tensor,
    *,
    window: int = 0,
    value_dim: int | None = None,
    key_dim: int | None = None,
    local_keys: str = "quantized",
) -> VQAttentionState:
    """The state of ``batch`` empty sequences, for :func:`vq_attention_step`.

    Its size in float32 is ``B · Hkv · (S · (E + 2) + R · (E + 2))`` numbers of 4 bytes with ``R = max(W − 1, 0)``.
    Exact keys add ``B · Hkv · R · D``.

    Args:
        batch: B ≥ 0, number of sequences.
        codebook: codewords (Hkv, S, F), finite; F = D unless the steps get ``far_q`` and ``far_k``. The state is on the
            codebook's device. It is float64 for a float64 codebook, else float32.
        window: W ≥ 0, in positions; 0 (default) means no window. Memory for W is allocated even for short sequences.
        value_dim: E, width of a value; default F.
        key_dim: D, width of a key inside the window; default F.
        local_keys: ``"quantized"`` (default) or ``"exact"``, see :func:`vq_attention`.

    Returns:
        A state with ``lengths`` 0.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or value; the message names it.

    Example:
        >>> state = vq_attention_state(2, torch.randn(4, 32, 16), window=8)
        >>> state.far_sums.shape, state.ring_values.shape
        (torch.Size([2, 4, 32, 16]), torch.Size([2, 4, 7, 16]))
    """
    op = "vq_attention_state"
    check.tensor(op, "codebook", codebook, "H S D")
    check.real(op, "codebook", codebook)
    check.codebook_values(op, codebook)
    check.at_least_one(op, "codebook", codebook, 0, "key-value head H")
    check.window(op, window)
    check.one_of(op, "local_keys", local_keys, LOCAL_KEYS)
    heads, num_codes, far_dim = codebook.shape
    value_dim = far_dim if value_dim is None else value_dim
    key_dim = far_dim if key_dim is None else key_dim
    check.integer(op, "batch", batch, 0)
    check.positive(op, value_dim=value_dim, key_dim=key_dim)
    reach = max(window - 1, 0)
    precise = torch.promote_types(codebook.dtype, torch.float32)

    def zeros(*sizes: int, dtype: torch.dtype = precise) -> Tensor:
        return torch.zeros(batch, *sizes, dtype=dtype, device=codebook.device)

    return VQAttentionState(
        far_sums=zeros(heads, num_codes, value_dim),
        far_counts=zeros(heads, num_codes, dtype=torch.int64),
        ring_codes=zeros(heads, reach, dtype=torch.int64),
        ring_keys=zeros(heads, reach, key_dim if local_keys == "exact" and window else 0),
        ring_values=zeros(heads, reach, value_dim),
        lengths=zeros(dtype=torch.int64),
        window=window,
        local_keys=local_keys,
    )
