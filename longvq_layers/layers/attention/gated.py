"""Single-head attention for gated blocks: full or in chunks, with a relative bias and several functions."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from longvq_layers import _checks as check
from longvq_layers.layers.attention.chunks import chunks_of_documents, chunks_of_rows
from longvq_layers.layers.attention.relative_bias import RelativeBias, make_relative_bias
from longvq_layers.layers.common.factory import Factory
from longvq_layers.layers.common.representation import arguments_repr
from longvq_layers.ops.torch.elementwise import laplace


def _squared_relu(scores: Tensor) -> Tensor:
    return scores.relu().square()


# Functions of single scores. Softmax, which normalises them, is the other choice.
_ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {"laplace": laplace, "relu2": _squared_relu}
ATTENTION = ("softmax", *_ELEMENTWISE)


class GatedAttention(nn.Module):
    """Single-head attention of a gated block. The block gates the values, so one head is enough.

        softmax:  out_i = Σ_j softmax_j(q_i·k_j / √dim + b_{j−i}) v_j
        laplace:  out_i = Σ_j ½(1 + erf((s_ij − √½) √(2π))) v_j,    s_ij = q_i·k_j / n_i + b_{j−i}
        relu2:    out_i = Σ_j max(s_ij, 0)² v_j                     n_i = number of keys allowed for query i

    The sums run over all keys, or over those in the query's chunk, which makes the cost O(L · chunk). The first chunk
    starts at the first unmasked position of a row or, in packed rows, of a document. The last one may be shorter.

    Args:
        dim: width of queries and keys.
        chunk: length of a chunk, default None: all keys.
        causal: whether a position sees only itself and the past, default False.
        activation: "softmax" (default), "laplace" or "relu2".
        rel_pos_bias: "rotary" (default) or "simple", see `RotaryRelativeBias` and `SimpleRelativeBias`.
        max_positions: longest sequence of the simple bias without chunks, default 1024.
        dropout: probability of dropping an attention weight, default 0.0.
        device, dtype: of the bias.

    Raises:
        ValueError, TypeError: sizes out of range or unknown options.

    Example:
        >>> attention = GatedAttention(8, chunk=16, causal=True)
        >>> q, k, v = torch.randn(3, 2, 50, 8)
        >>> attention(q, k, v).shape
        torch.Size([2, 50, 8])

    Source: Mega (arXiv 2209.10655), sections 3.2 to 3.4 (chunks) and eq. 16; relu²: So et al. 2021 (arXiv 2109.08668).
    """

    bias: RelativeBias

    def __init__(
        self,
        dim: int,
        *,
        chunk: int | None = None,
        causal: bool = False,
        activation: str = "softmax",
        rel_pos_bias: str = "rotary",
        max_positions: int = 1024,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "GatedAttention"
        check.positive(name, dim=dim, max_positions=max_positions)
        if chunk is not None:
            check.positive(name, chunk=chunk)
        check.flags(name, causal=causal)
        check.probability(name, "dropout", dropout)
        check.one_of(name, "activation", activation, ATTENTION)
        self.dim, self.chunk, self.causal, self.activation = dim, chunk, causal, activation
        self.rel_pos_bias, self.max_positions, self.dropout = rel_pos_bias, max_positions, dropout
        factory: Factory = {"device": device, "dtype": dtype}
        self.bias = make_relative_bias(name, rel_pos_bias, dim, chunk or max_positions, factory)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_padding_mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Attend. The block has checked the arguments.

        Args:
            q, k: (B, L, dim).
            v: (B, L, E).
            key_padding_mask: (B, L) bool, True = ignore; q, k and v are finite there.
            cu_seqlens: (N+1,) int32, offsets of documents in one row (B = 1) that don't see each other.

        Returns:
            (B, L, E); at masked positions any finite numbers.
        """
        length = q.shape[1]
        if length == 0 or q.shape[0] == 0:
            return v
        size = length if self.chunk is None else min(self.chunk, length)
        if cu_seqlens is not None:
            if self.chunk is None:
                return self._each_document(q, k, v, key_padding_mask, cu_seqlens.tolist())
            chunks = chunks_of_documents(cu_seqlens, length, key_padding_mask, size)
        elif key_padding_mask is None:
            return self._even_chunks(q, k, v, size)
        elif size == length:  # one chunk, which may start anywhere: only offsets matter
            return self.attend(q, k, v, ~key_padding_mask)
        else:
            chunks = chunks_of_rows(key_padding_mask, size)
        out = self.attend(chunks.split(q), chunks.split(k), chunks.split(v), chunks.valid)
        return chunks.join(out)

    def _each_document(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, offsets: list[int]) -> Tensor:
        parts = []
        for start, end in itertools.pairwise(offsets):
            queries, keys, values = (x[:, start:end] for x in (q, k, v))
            parts.append(self(queries, keys, values, None if mask is None else mask[:, start:end]))
        return torch.cat(parts, dim=1)

    def _even_chunks(self, q: Tensor, k: Tensor, v: Tensor, size: int) -> Tensor:
        length = q.shape[1]
        even = length // size * size
        queries, keys, values = (x[:, :even].reshape(-1, size, x.shape[-1]) for x in (q, k, v))
        out = self.attend(queries, keys, values).view(q.shape[0], even, -1)
        if even == length:
            return out
        return torch.cat([out, self.attend(q[:, even:], k[:, even:], v[:, even:])], dim=1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None) -> Tensor:
        """Attend from every slot of a chunk to the slots of that chunk: to all or, if causal, to those up to its own.

        Args:
            q, k: (R, C, dim), R chunks.
            v: (R, C, E).
            valid: (R, C) bool, False = ignore this key. Default: every key counts.

        Returns:
            (R, C, E); 0 for a query that sees nothing.
        """
        if valid is not None:
            v = v * valid.unsqueeze(-1)
        bias = self.bias(q.shape[1])
        if self.activation == "softmax":
            return self._softmax(q, k, v, bias, valid)
        scores = q @ k.transpose(-1, -2) / self._allowed_keys(q, valid) + bias
        weights = _ELEMENTWISE[self.activation](scores)
        if self.causal:
            weights = weights.tril()
        return nn.functional.dropout(weights, self.dropout, self.training).to(v.dtype) @ v

    def attend_one(self, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
        """Attend, causally, from one query per row to the keys up to its own.

        Args:
            q: (B, 1, dim), the query at `position`.
            k: (B, C, dim), the chunk's keys; the query doesn't see those after `position`.
            v: (B, C, E).
            position: (B,) int64, in [0, C).

        Returns:
            (B, 1, E).
        """
        size = k.shape[1]
        bias = self.bias.rows(position, size).unsqueeze(1)  # (B, 1, C)
        later = (torch.arange(size, device=q.device) > position.unsqueeze(-1)).unsqueeze(1)
        if self.activation == "softmax":
            bias = bias.to(q.dtype).masked_fill(later, -torch.inf)
            return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        scores = q @ k.transpose(-1, -2) / (position + 1).view(-1, 1, 1).to(_count_dtype(q)) + bias
        return _ELEMENTWISE[self.activation](scores).masked_fill(later, 0).to(v.dtype) @ v

    def _softmax(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, valid: Tensor | None) -> Tensor:
        kind = q.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else q.dtype
        bias = bias.to(dtype)
        if self.causal:
            size = q.shape[1]
            later = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
            bias = bias.masked_fill(later, -torch.inf)
        scale = self.dim**-0.5
        if valid is not None:
            # One more dimension of queries and keys lowers the scores of hidden keys. So the bias stays (C, C): a mask
            # would make it (R, C, C). Eight dimensions are added, because rows must stay aligned. The lowered score is
            # finite, because softmax gives NaN for a chunk in which every key has −infinity.
            least = torch.finfo(dtype).min / 4
            hidden = k.new_zeros(*k.shape[:2], 8)
            hidden[..., 0] = (~valid).to(k.dtype) * least
            k = torch.cat([k, hidden], dim=-1)
            q = torch.cat([q, q.new_ones(*q.shape[:2], 8)], dim=-1)
        q, k, v = (x.unsqueeze(1) for x in (q, k, v))
        p = self.dropout if self.training else 0.0
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=p, scale=scale).squeeze(1)

    def _allowed_keys(self, q: Tensor, valid: Tensor | None) -> Tensor | int:
        """The number of keys that each query may see; broadcasts to (R, C, C)."""
        size = q.shape[1]
        if valid is None:
            if not self.causal:
                return size
            return torch.arange(1, size + 1, device=q.device, dtype=_count_dtype(q)).unsqueeze(-1)
        count = valid.cumsum(-1) if self.causal else valid.sum(-1, keepdim=True)
        return count.clamp(min=1).unsqueeze(-1).to(_count_dtype(q))

    def extra_repr(self) -> str:
        return arguments_repr(self, GatedAttention)


def _count_dtype(q: Tensor) -> torch.dtype:
    """A dtype that holds numbers of keys exactly. Half types do so only up to 256 (bfloat16) or 2048 (float16)."""
    return torch.promote_types(q.dtype, torch.float32)
