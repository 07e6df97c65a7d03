"""Attention over quantised keys between given queries, keys and values: the core of every VQ layer."""

import math

import torch
from torch import Tensor

from longvq_layers import _checks as check
from longvq_layers import ops
from longvq_layers.layers.attention.core import AttentionCore
from longvq_layers.layers.codebook.codebook import Codebook
from longvq_layers.layers.codebook.operations import pick
from longvq_layers.layers.common.context import no_autocast, recomputing
from longvq_layers.layers.common.factory import Factory
from longvq_layers.layers.common.representation import arguments_repr
from longvq_layers.layers.streaming import step_checks
from longvq_layers.ops._attention_options import ACTIVATIONS, KEY_GRADS, LOCAL_KEYS
from longvq_layers.ops._dispatch import BACKENDS


def check_options(name: str, local_keys: str, key_grad: str, activation: str) -> None:
    """Check the options of `ops.vq_attention` in the name of a layer."""
    check.one_of(name, "local_keys", local_keys, LOCAL_KEYS)
    check.one_of(name, "key_grad", key_grad, KEY_GRADS)
    check.one_of(name, "activation", activation, ACTIVATIONS)


class CodebookAttention(AttentionCore):
    """`ops.vq_attention` with a codebook that learns, a window bias that is trained, and the commitment loss.

        out = vq_attention(q, k, v, C, bias=b, ...)
        loss = β · mean_j ‖k_j − sg(C_{z_j})‖²            over unmasked keys and heads, in training

    `commitment_loss(model)` collects the loss. A module that is called twice in one training step keeps only the loss
    of the last call.

    Args:
        num_heads: H, query heads.
        num_kv_heads: Hkv, key-value heads; H must be a multiple. Each has its own codes.
        head_dim: D, width of a query or key.
        value_dim: E, width of a value, default D.
        num_codes: S, codes per key-value head, default 256.
        window: W, default 64; keys less than W positions away are attended one by one; 0 = none.
        causal: whether a query sees only itself and the past, default False.
        local_keys: "quantized" (default) or "exact" keys inside the window.
        key_grad: "cluster" (default) or "window", see `ops.vq_attention`.
        activation: "softmax" (default) or "laplace".
        window_bias: whether to learn b, (H, W) causal or (H, 2W − 1), from zero; default True. None when window=0.
        commitment: β, default 1e-4; 0 turns the loss off.
        codebook_decay: γ of the codebook's moving averages, default 0.99; with a smaller γ the codes follow the keys
            faster.
        backend: see `ops.vq_attention`.
        device, dtype: of the bias; the codebook is float32, or float64 with dtype=torch.float64.

    Raises:
        ValueError, TypeError: sizes out of range or unknown options; in `forward` wrong shapes or dtypes.

    Example:
        >>> attention = CodebookAttention(4, 2, 16, num_codes=32, window=8, causal=True)
        >>> q, k, v = torch.randn(2, 4, 50, 16), torch.randn(2, 2, 50, 16), torch.randn(2, 2, 50, 16)
        >>> attention(q, k, v).shape
        torch.Size([2, 4, 50, 16])

    Source: LongVQ (arXiv 2404.11163) section 4.2; Transformer-VQ (arXiv 2309.16354).
    """

    codebook: Codebook
    last_commitment: Tensor | None  # β · mean … of the last training forward, with its graph

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        num_codes: int = 256,
        window: int = 64,
        causal: bool = False,
        local_keys: str = "quantized",
        key_grad: str = "cluster",
        activation: str = "softmax",
        window_bias: bool = True,
        commitment: float = 1e-4,
        codebook_decay: float = 0.99,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "CodebookAttention"
        self._set_sizes(name, num_heads, num_kv_heads, head_dim, value_dim, window, causal, window_bias, dtype)
        check.positive(name, num_codes=num_codes)
        check_options(name, local_keys, key_grad, activation)
        check.one_of(name, "backend", backend, BACKENDS)
        check.number(name, "commitment", commitment)
        if not 0 <= commitment < math.inf:
            raise ValueError(f"{name}: commitment must be a finite number, at least 0, got {commitment}")
        self.num_codes = num_codes
        self.local_keys, self.key_grad, self.activation = local_keys, key_grad, activation
        self.commitment, self.backend = commitment, backend
        factory: Factory = {"device": device, "dtype": dtype}
        self.codebook = Codebook(num_kv_heads, num_codes, head_dim, decay=codebook_decay, backend=backend, **factory)
        self._add_window_bias(window_bias, num_heads, window, causal, factory)
        self.last_commitment = None

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_padding_mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Attend. In training mode also update the codebook and store the commitment loss.

        Args:
            q: (B, H, L, D) float.
            k: (B, Hkv, L, D), dtype of q.
            v: (B, Hkv, L, E), dtype of q.
            key_padding_mask: (B, L) bool, True = ignore.
            cu_seqlens: (N+1,) int32, offsets of N documents in one row (B = 1) that don't see each other, see
                `ops.vq_attention`. The documents share the codebook. Default none.

        Returns:
            (B, H, L, E), dtype of q; 0 at masked positions.
        """
        self._check_queries("CodebookAttention", q, cu_seqlens)
        codes, table = self.codebook.quantize(k, key_padding_mask)
        with no_autocast(q.device):
            self.store_commitment(k, codes, table, key_padding_mask)
            return ops.vq_attention(
                q,
                k,
                v,
                table,
                causal=self.causal,
                window=self.window,
                bias=self.window_bias,
                key_padding_mask=key_padding_mask,
                cu_seqlens=cu_seqlens,
                activation=self.activation,
                local_keys=self.local_keys,
                key_grad=self.key_grad,
                codes=codes,
                backend=self.backend,
            )

    def initial_state(self, batch: int) -> ops.VQAttentionState:
        """The state of `batch` empty sequences, for `step`; causal only (NotImplementedError otherwise)."""
        step_checks.causal("CodebookAttention.initial_state", self.causal)
        return ops.vq_attention_state(
            batch,
            self.codebook.embedding,
            window=self.window,
            value_dim=self.value_dim,
            local_keys=self.local_keys,
        )

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, state: ops.VQAttentionState, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        """Attend from the next T tokens of growing sequences, as `forward` does in eval mode. The codebook stays.

        Args:
            q: (B, H, T, D) float, any T ≥ 0.
            k: (B, Hkv, T, D), dtype of q.
            v: (B, Hkv, T, E), dtype of q.
            state: from `initial_state`; updated in place.
            key_padding_mask: (B, T) bool, True = not part of the sequence.

        Returns:
            (B, H, T, E), dtype of q; 0 at masked positions.

        Raises:
            ValueError, TypeError: wrong shapes, dtypes or devices.
            NotImplementedError: a bidirectional module, or gradients asked for.
            RuntimeError: in training mode.
        """
        name = "CodebookAttention.step"
        step_checks.causal(name, self.causal)
        step_checks.eval_mode(name, self)
        check.tensor(name, "q", q, "B H T D")
        if q.shape[1] != self.num_heads:
            raise ValueError(f"{name}: q must have H = {self.num_heads} heads, got {q.shape[1]}")
        with no_autocast(q.device):
            return ops.vq_attention_step(
                q,
                k,
                v,
                self.codebook.embedding,
                state,
                bias=self.window_bias,
                key_padding_mask=key_padding_mask,
                activation=self.activation,
                backend=self.backend,
            )

    def store_commitment(self, k: Tensor, codes: Tensor, table: Tensor, key_padding_mask: Tensor | None) -> None:
        if not self.training or not self.commitment:
            self.last_commitment = None
            return
        index = codes.transpose(0, 1).reshape(self.num_kv_heads, -1)
        nearest = torch.unflatten(pick(table, index), 1, (k.shape[0], k.shape[2])).transpose(0, 1)  # (B, Hkv, L, D)
        distance = (k.to(table.dtype) - nearest).square().sum(-1)  # (B, Hkv, L)
        count: Tensor | int = max(distance.numel(), 1)
        if key_padding_mask is not None:
            distance = distance.masked_fill(key_padding_mask.unsqueeze(1), 0)
            count = ((~key_padding_mask).sum() * self.num_kv_heads).clamp(min=1)
        loss = self.commitment * distance.sum() / count
        if not recomputing():
            self.last_commitment = loss

    def __getstate__(self) -> dict[str, object]:
        # The loss has a graph, which can be neither copied nor pickled.
        return {**self.__dict__, "last_commitment": None}

    def extra_repr(self) -> str:
        decay, window_bias = self.codebook.decay, self._wants_window_bias()
        return arguments_repr(self, CodebookAttention, codebook_decay=decay, window_bias=window_bias)
