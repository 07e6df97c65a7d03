"""What forward and backward of the blocked attention share: prepared inputs, masks and scores of one block."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from longvq_layers.ops.torch.far_field import Blocks, FarField

_MU, _SIGMA = math.sqrt(0.5), math.sqrt(0.25 / math.pi)


def laplace(x: Tensor) -> Tensor:
    """``½(1 + erf((x − μ) / (σ√2)))``, Mega's attention function (Ma et al. 2022, eq. 16)."""
    return torch.erf((x - _MU) / (_SIGMA * math.sqrt(2))).add_(1).mul_(0.5)


def laplace_grad(x: Tensor) -> Tensor:
    """Derivative of :func:`laplace`: the density of a normal distribution with mean μ and deviation σ."""
    return torch.exp(((x - _MU) / _SIGMA).square_().mul_(-0.5)).div_(_SIGMA * math.sqrt(2 * math.pi))


@dataclass(frozen=True)
class Options:
    """The scalar arguments of ``vq_attention``."""

    scale: float
    causal: bool
    window: int
    activation: str
    local_keys: str
    key_grad: str
    near_dim: int  # > 0: columns of q and k for pairs inside the window; the others are for all other pairs


class Scores:
    """Inputs in compute precision and, block by block, the scores of near keys and of far codes.

    Rows of grouped queries are laid side by side, so that every product is one batched matmul over (B, Hkv): the
    queries of a block are (B, Hkv, G·T, D) and its near scores (B, Hkv, G·T, K).
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        codebook: Tensor,
        codes: Tensor,
        bias: Tensor | None,
        key_padding_mask: Tensor | None,
        options: Options,
    ):
        precise = torch.promote_types(q.dtype, torch.float32)
        self.options = options
        self.batch, self.heads, self.length, self.width = q.shape
        self.kv_heads, self.num_codes, _ = codebook.shape
        self.group = self.heads // self.kv_heads
        self.value_width = v.shape[-1]
        self.blocks = Blocks.plan(self.length, self.num_codes, options.window, options.causal)
        self.mask = key_padding_mask

        self.codebook = codebook.to(precise)
        self.codes = codes
        self.v = v.to(precise)
        self.k = k.to(precise) if options.local_keys == "exact" and options.window > 0 else None
        if options.near_dim:  # zeros for the columns that a score has no part in
            self.codebook = self.codebook.clone()
            self.codebook[..., : options.near_dim] = 0
            if self.k is not None:
                self.k = torch.nn.functional.pad(self.k[..., : options.near_dim], (0, q.shape[3] - options.near_dim))
        self.bias = None
        if bias is not None and options.window > 0:
            self.bias = bias.to(precise).unflatten(0, (self.kv_heads, self.group))

        # Softmax multiplies scores by `scale`, laplace divides them by the number of allowed keys: in both cases a
        # factor per query, applied to the query once.
        self.unit = self._score_unit(precise)
        q = q.to(precise) * (self.unit if isinstance(self.unit, float) else self.unit[:, None, :, None])
        self.q = q.unflatten(1, (self.kv_heads, self.group))

        self.far_field = FarField(codes, self.num_codes, self.blocks)
        self.far_values, self.far_counts = self._far_statistics()
        self._tiles: dict[tuple[int, int, int], tuple[Tensor, Tensor | None, Tensor | None]] = {}

    def _score_unit(self, precise: torch.dtype) -> float | Tensor:
        """``scale``, or (B, L) one over the number of keys allowed for each query."""
        if self.options.activation == "softmax":
            return self.options.scale
        device = self.codebook.device
        if self.mask is None:
            keys = torch.ones(self.batch, self.length, dtype=precise, device=device)
        else:
            keys = (~self.mask).to(precise)
        count = keys.cumsum(-1) if self.options.causal else keys.sum(-1, keepdim=True).expand(-1, self.length)
        return count.clamp(min=1).reciprocal()

    def _far_statistics(self) -> tuple[Tensor, Tensor]:
        """Values (blocks, B, Hkv, S, E) and counts (blocks, B, Hkv, S, 1) of each block's far field.

        The values are means under softmax (weighted by the counts in the scores), sums under laplace.
        """
        rows = torch.nn.functional.pad(self.v, (0, 1), value=1.0)
        if self.mask is not None:
            rows = rows * (~self.mask)[:, None, :, None]
        sums = self.far_field.sums(rows.flatten(0, 1))
        sums = sums.view(-1, self.batch, self.kv_heads, self.num_codes, self.value_width + 1)
        values, counts = sums[..., :-1], sums[..., -1:]
        if self.options.activation == "softmax":
            values = values / counts.clamp(min=1)
        return values, counts

    def far_index(self, block: int) -> int:
        return 0 if self.blocks.everything_far else block

    def rows_of(self, x: Tensor, rows: slice) -> Tensor:
        """(B, Hkv, G, L, X) -> (B, Hkv, G·T, X), the rows of one block."""
        return x[..., rows, :].reshape(self.batch, self.kv_heads, -1, x.shape[-1])

    def near_codewords(self, keys: slice) -> Tensor:
        """(B, Hkv, K, D) codewords of the near keys."""
        head = torch.arange(self.kv_heads, device=self.codes.device)[:, None]
        return self.codebook[head, self.codes[:, :, keys]]

    def tile(self, rows: slice, keys: slice) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """In-window (T, K), forbidden (T, K) or None, bias (Hkv, G, T, K) or None; equal for all inner blocks."""
        key = (rows.stop - rows.start, keys.stop - keys.start, rows.start - keys.start)
        if key not in self._tiles:
            window, device = self.options.window, self.codes.device
            i = torch.arange(rows.start, rows.stop, device=device)[:, None]
            j = torch.arange(keys.start, keys.stop, device=device)[None, :]
            if self.options.causal:
                in_window, column, forbidden = (i - j < window) & (j <= i), i - j, j > i
            else:
                in_window, column, forbidden = (i - j).abs() < window, j - i + window - 1, None
            bias = None
            if self.bias is not None:
                bias = self.bias[:, :, column.clamp(0, self.bias.shape[2] - 1)] * in_window
            self._tiles[key] = (in_window, forbidden, bias)
        return self._tiles[key]

    def near(self, q: Tensor, codewords: Tensor, rows: slice, keys: slice) -> Tensor:
        """Scores (B, Hkv, G·T, K) of one block's near keys; −inf where a key is not allowed."""
        in_window, forbidden, bias = self.tile(rows, keys)
        score = q @ codewords.transpose(2, 3)
        score = score.view(self.batch, self.kv_heads, self.group, *in_window.shape)
        if self.k is not None:
            exact = (q @ self.k[:, :, keys].transpose(2, 3)).view_as(score)
            score = torch.where(in_window, exact, score)
        if bias is not None:
            score += bias
        if forbidden is not None:
            score.masked_fill_(forbidden, -torch.inf)
        if self.mask is not None:
            score.masked_fill_(self.mask[:, None, None, None, keys], -torch.inf)
        return score.flatten(2, 3)

    def far(self, q: Tensor, block: int) -> Tensor:
        """Scores (B, Hkv, G·T, S) of one block's far codes; under softmax with the log of their counts."""
        score = q @ self.codebook.transpose(1, 2)
        if self.options.activation == "softmax":
            score += self.far_counts[self.far_index(block)].log().transpose(2, 3)
        return score
