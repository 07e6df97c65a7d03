"""Prepared inputs, masks and scores of blocks, for the forward and the backward of attention."""

import torch
from torch import Tensor

from longvq_layers.ops._attention_inputs import AttentionInputs
from longvq_layers.ops._attention_options import Activation, AttentionOptions
from longvq_layers.ops.torch.far_field import Blocks, FarField


class Scores:
    """The inputs in compute precision, and the scores of near keys and far codes of one block at a time.

    The G query heads of a key-value head are concatenated along the rows, so that every product is one batched matmul
    over (B, Hkv): the queries of a block are (B, Hkv, G·T, D), its near scores (B, Hkv, G·T, K).
    """

    def __init__(self, inputs: AttentionInputs, options: AttentionOptions) -> None:
        precise = inputs.precise
        self.options = options
        self.batch, self.heads, self.length, self.head_dim = inputs.q.shape
        self.kv_heads, self.num_codes, self.far_dim = inputs.codebook.shape
        self.group = self.heads // self.kv_heads
        self.value_dim = inputs.v.shape[-1]
        self.blocks = Blocks.plan(self.length, self.num_codes, options.window, options.causal)
        self.mask = inputs.key_padding_mask

        self.codebook = inputs.codebook.to(precise)
        self.codes = inputs.codes
        self.v = inputs.v.to(precise)
        self.k = inputs.k.to(precise) if options.uses_exact_keys else None
        self.bias = None
        if inputs.bias is not None and options.window > 0:
            self.bias = inputs.bias.to(precise).unflatten(0, (self.kv_heads, self.group))

        # Softmax multiplies scores by `scale`, laplace divides them by the number of allowed keys. Both are factors of
        # a query, applied to the query once.
        self.score_factor = self._score_factor(precise)
        self.q = self.grouped(inputs.q.to(precise) * self.score_factor)
        self.has_far_q = inputs.far_q is not None
        self.far_q = self.q if inputs.far_q is None else self.grouped(inputs.far_q.to(precise) * self.score_factor)

        self.far_field = FarField(inputs.codes, self.num_codes, self.blocks)
        self.far_values, self.far_counts = self._far_statistics()
        self._tiles: dict[tuple[int, int, int], tuple[Tensor, Tensor | None, Tensor | None]] = {}

    def grouped(self, x: Tensor) -> Tensor:
        """(B, H, L, X) -> (B, Hkv, G, L, X)."""
        return x.unflatten(1, (self.kv_heads, self.group))

    def _score_factor(self, precise: torch.dtype) -> float | Tensor:
        """``scale``, or (B, 1, L, 1) one over the number of keys allowed for each query."""
        if self.options.activation == Activation.SOFTMAX:
            return self.options.scale
        device = self.codebook.device
        if self.mask is None:
            keys = torch.ones(self.batch, self.length, dtype=precise, device=device)
        else:
            keys = (~self.mask).to(precise)
        count = keys.cumsum(-1) if self.options.causal else keys.sum(-1, keepdim=True).expand(-1, self.length)
        return count.clamp(min=1).reciprocal()[:, None, :, None]

    def _far_statistics(self) -> tuple[Tensor, Tensor]:
        """Values (blocks, B, Hkv, S, E) and counts (blocks, B, Hkv, S, 1) of each block's far field.

        With softmax the values are means, because the scores contain the logarithms of the counts. With laplace they
        are sums.
        """
        rows = torch.nn.functional.pad(self.v, (0, 1), value=1.0)
        if self.mask is not None:
            rows = rows * (~self.mask)[:, None, :, None]
        sums = self.far_field.sums(rows.flatten(0, 1))
        sums = sums.view(-1, self.batch, self.kv_heads, self.num_codes, self.value_dim + 1)
        values, counts = sums[..., :-1], sums[..., -1:]
        if self.options.activation == Activation.SOFTMAX:
            values = values / counts.clamp(min=1)
        return values, counts

    def far_index(self, block: int) -> int:
        """The index of a block's far field."""
        return 0 if self.blocks.everything_far else block

    def rows_of(self, x: Tensor, rows: slice) -> Tensor:
        """(B, Hkv, G, L, X) -> (B, Hkv, G·T, X), the rows of one block."""
        return x[..., rows, :].reshape(self.batch, self.kv_heads, -1, x.shape[-1])

    def as_rows(self, x: Tensor) -> Tensor:
        """The reverse of :meth:`rows_of` for the rows of one block: (B, Hkv, G·T, X) -> (B, Hkv, G, T, X)."""
        return x.view(self.batch, self.kv_heads, self.group, -1, x.shape[-1])

    def queries(self, rows: slice) -> tuple[Tensor, Tensor]:
        """The queries of one block for pairs inside the window, and for all other pairs."""
        q = self.rows_of(self.q, rows)
        return q, self.rows_of(self.far_q, rows) if self.has_far_q else q

    def near_codewords(self, keys: slice) -> Tensor:
        """The codewords (B, Hkv, K, F) of the near keys."""
        head = torch.arange(self.kv_heads, device=self.codes.device)[:, None]
        return self.codebook[head, self.codes[:, :, keys]]

    def tile(self, rows: slice, keys: slice) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Masks of one block: inside the window (T, K), in the future (T, K) or None; bias (Hkv, G, T, K) or None.

        All blocks with the same sizes and the same offset between rows and keys share one cached result.
        """
        key = (rows.stop - rows.start, keys.stop - keys.start, rows.start - keys.start)
        if key not in self._tiles:
            window, device = self.options.window, self.codes.device
            i = torch.arange(rows.start, rows.stop, device=device)[:, None]
            j = torch.arange(keys.start, keys.stop, device=device)[None, :]
            if self.options.causal:
                in_window, column, future = (i - j < window) & (j <= i), i - j, j > i
            else:
                in_window, column, future = (i - j).abs() < window, j - i + window - 1, None
            bias = None
            if self.bias is not None:
                bias = self.bias[:, :, column.clamp(0, self.bias.shape[2] - 1)] * in_window
            self._tiles[key] = (in_window, future, bias)
        return self._tiles[key]

    def near(self, q: Tensor, far_q: Tensor, codewords: Tensor, rows: slice, keys: slice) -> Tensor:
        """Scores (B, Hkv, G·T, K) of the near keys of one block; −inf where a key is not allowed."""
        in_window, future, bias = self.tile(rows, keys)
        score = far_q @ codewords.transpose(2, 3)
        score = score.view(self.batch, self.kv_heads, self.group, *in_window.shape)
        if self.k is not None:
            exact = (q @ self.k[:, :, keys].transpose(2, 3)).view_as(score)
            score = torch.where(in_window, exact, score)
        if bias is not None:
            score += bias
        if future is not None:
            score.masked_fill_(future, -torch.inf)
        if self.mask is not None:
            score.masked_fill_(self.mask[:, None, None, None, keys], -torch.inf)
        return score.flatten(2, 3)

    def far(self, far_q: Tensor, block: int) -> Tensor:
        """Scores (B, Hkv, G·T, S) of the far codes of one block; with softmax plus the log of their counts."""
        score = far_q @ self.codebook.transpose(1, 2)
        if self.options.activation == Activation.SOFTMAX:
            score += self.far_counts[self.far_index(block)].log().transpose(2, 3)
        return score
