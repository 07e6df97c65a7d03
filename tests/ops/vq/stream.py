"""Cases for the tests of streaming attention: sequences cut into pieces, and the one call that they must equal."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from hypothesis import strategies as st
from torch import Tensor

from longvq_layers import ops
from tests.strategies import LAYOUTS, layout


@dataclass
class StreamCase:
    """Batched sequences in float64 with padding at any positions, and the cuts between pieces."""

    q: Tensor
    k: Tensor
    v: Tensor
    codebook: Tensor
    codes: Tensor
    bias: Tensor | None
    mask: Tensor | None
    cuts: list[int]
    window: int
    local_keys: str
    activation: str
    scale: float | None

    def state(self, dtype: torch.dtype = torch.float64) -> ops.VQAttentionState:
        return ops.vq_attention_state(
            self.q.shape[0],
            self.codebook.to(dtype),
            window=self.window,
            value_dim=self.v.shape[3],
            local_keys=self.local_keys,
        )

    def step(self, state, part: slice, backend: str, dtype: torch.dtype = torch.float64, **options) -> Tensor:
        q, k, v = (in_dtype(x[:, :, part], dtype) for x in (self.q, self.k, self.v))
        return ops.vq_attention_step(
            q,
            k,
            v,
            self.codebook.to(state.dtype),
            state,
            bias=None if self.bias is None else self.bias.to(state.dtype),
            key_padding_mask=None if self.mask is None else self.mask[:, part],
            scale=self.scale,
            activation=self.activation,
            backend=backend,
            **{"codes": self.codes[:, :, part], **options},
        )

    def parts(self) -> list[slice]:
        ends = [0, *self.cuts, self.q.shape[2]]
        return [slice(a, b) for a, b in pairwise(ends)]

    def pieces(self, backend: str, dtype: torch.dtype = torch.float64, **options) -> tuple[Tensor, object]:
        """The outputs of all pieces, concatenated, and the final state."""
        state = self.state(torch.promote_types(dtype, torch.float32))
        return torch.cat([self.step(state, part, backend, dtype, **options) for part in self.parts()], 2), state

    def at_once(self, dtype: torch.dtype = torch.float64, backend: str = "reference") -> Tensor:
        """`vq_attention` of the unmasked tokens of each row; zeros for masked tokens."""
        out = self.v.new_zeros(*self.q.shape[:3], self.v.shape[3], dtype=dtype)
        for row in range(self.q.shape[0]):
            mine = slice(None) if self.mask is None else (~self.mask[row]).nonzero().squeeze(1)
            out[row, :, mine] = ops.vq_attention(
                *(x[row : row + 1, :, mine].to(dtype) for x in (self.q, self.k, self.v)),
                self.codebook.to(dtype),
                causal=True,
                window=self.window,
                bias=None if self.bias is None else self.bias.to(dtype),
                scale=self.scale,
                activation=self.activation,
                local_keys=self.local_keys,
                codes=self.codes[row : row + 1, :, mine],
                backend=backend,
            )[0]
        return out

    def lengths(self) -> Tensor:
        if self.mask is None:
            return torch.full((self.q.shape[0],), self.q.shape[2])
        return (~self.mask).sum(1)


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in another dtype with the same strides."""
    return torch.empty_strided(x.shape, x.stride(), dtype=dtype).copy_(x)


@st.composite
def stream_cases(draw, max_length: int = 90, dtype: torch.dtype = torch.float64) -> StreamCase:
    """Any valid sequence of calls, with numbers that ``dtype`` represents exactly."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    batch, kv_heads, group = draw(st.integers(0, 3)), draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 3, 9]))
    length = draw(st.one_of(st.sampled_from([0, 1, 2, 17]), st.integers(0, max_length)))
    head_dim, value_dim = draw(st.sampled_from([1, 3, 8, 16, 20])), draw(st.sampled_from([1, 5, 8, 33]))
    num_codes = draw(st.sampled_from([1, 2, 7, 32, 65]))
    window = draw(st.one_of(st.sampled_from([0, 1, 2, 3, 16]), st.integers(0, max_length + 10)))
    real = {"dtype": torch.float64}

    def drawn(*shape, factor=1.0):
        x = (torch.randn(*shape, **real) * factor).to(dtype).double()
        return layout(x, draw(st.sampled_from(LAYOUTS if x.dim() > 2 else ("contiguous", "sliced"))))

    q = drawn(batch, kv_heads * group, length, head_dim, factor=draw(st.sampled_from([1.0, 1.0, 1e-3, 30.0])))
    k, v = drawn(batch, kv_heads, length, head_dim), drawn(batch, kv_heads, length, value_dim)
    codebook = drawn(kv_heads, num_codes, head_dim)
    special = draw(st.sampled_from(["none", "none", "equal codes", "unused codes"]))
    if special == "equal codes":
        codebook[:] = codebook[:, :1].clone()
    elif special == "unused codes":
        codebook[:, 1:] += 1000
    mask = None
    if draw(st.booleans()):
        mask = torch.rand(batch, length) < draw(st.sampled_from([0.1, 0.5, 0.95]))
        if batch and draw(st.booleans()):
            mask[0] = True  # an empty row
    activation = draw(st.sampled_from(["softmax", "softmax", "laplace"]))
    return StreamCase(
        q,
        k,
        v,
        codebook,
        ops.vq_assign(k, codebook, backend="reference"),
        drawn(kv_heads * group, window) if window and draw(st.booleans()) else None,
        mask,
        sorted(draw(st.lists(st.integers(0, length), max_size=6))),
        window,
        draw(st.sampled_from(["quantized", "exact"])),
        activation,
        draw(st.sampled_from([None, 0.3])) if activation == "softmax" else None,
    )
