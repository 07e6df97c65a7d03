"""The module that a swapped attention carries: its codebook, the metric it was fitted in, and how to attend."""

import torch
from torch import Tensor

from longvq_layers import ops
from longvq_layers.layers._kmeans import no_autocast
from longvq_layers.layers._precision import KeepsFloat32, storage_dtype
from longvq_layers.layers.codebook_attention import CodebookAttention


class SwappedAttention(KeepsFloat32, CodebookAttention):
    """Attention over quantised keys whose codes were fitted in the metric of the queries.

        M = E[q qᵀ] per key-value head,  k' = k M^½,  z_j = argmin_s ‖k'_j − C'_s‖²,  C = C' M^-½

    ‖k' − C'‖² is the expected square of a score's error, so codes go where queries look. The scores use q, k and C
    as they are; M^½ only decides which code a key gets. Without calibration M is the identity.

    Args:
        num_heads: H, query heads.
        num_kv_heads: Hkv, key-value heads.
        head_dim: D, width of a key.
        num_codes, window, local_keys, backend, device, dtype: see `CodebookAttention`.

    Buffers:
        to_metric (Hkv, D, D) = M^½, from_metric (Hkv, D, D) = M^-½, and those of `codebook`, at least float32.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        num_codes: int,
        window: int,
        local_keys: str,
        backend: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_heads,
            num_kv_heads,
            head_dim,
            num_codes=num_codes,
            window=window,
            local_keys=local_keys,
            window_bias=False,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        identity = torch.eye(head_dim, device=device, dtype=storage_dtype(dtype)).repeat(num_kv_heads, 1, 1)
        self.register_buffer("to_metric", identity)
        self.register_buffer("from_metric", identity.clone())

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_padding_mask: Tensor | None = None,
        *,
        causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        """q (B, H, L, D), k (B, Hkv, L, D), v (B, Hkv, L, E), key_padding_mask (B, L) True = ignore -> (B, H, L, E).

        In training the codebook learns from k and the commitment loss is stored, as in `CodebookAttention`.
        """
        if not self.training and not self.codebook._ready:
            raise RuntimeError(
                "longvq attention: the codebook has no codes yet; call replace_attention with calibration=, run one "
                "batch in training mode, or load a state_dict that has codes"
            )
        with no_autocast(q.device):
            keys = self.in_metric(k)
            codes, table = self.codebook.quantize(keys, key_padding_mask)
            self._commit(keys, codes, table, key_padding_mask)
            return ops.vq_attention(
                q.to(v.dtype),  # under autocast rotary positions leave q and k in float32
                k.to(v.dtype),
                v,
                table @ self.from_metric,
                causal=causal,
                window=self.window,
                key_padding_mask=key_padding_mask,
                scale=scale,
                local_keys=self.local_keys,
                codes=codes,
                backend=self.backend,
            )

    def in_metric(self, k: Tensor) -> Tensor:
        """k' = k M^½ in the dtype of the codebook: (B, Hkv, L, D) -> the same shape."""
        return k.to(self.to_metric.dtype) @ self.to_metric

    @torch.no_grad()
    def fit_(self, keys: Tensor, second_moment: Tensor, *, generator: torch.Generator | None = None) -> None:
        """Fit the metric and the codes: keys (Hkv, N, D), second_moment (Hkv, D, D) = E[q qᵀ]."""
        to_metric, from_metric = _roots(second_moment)
        self.to_metric.copy_(to_metric)
        self.from_metric.copy_(from_metric)
        self.codebook.initialize_(self.in_metric(keys), generator=generator)

    def extra_repr(self) -> str:
        parts = [f"{self.num_heads}, {self.num_kv_heads}, {self.head_dim}", f"num_codes={self.num_codes}"]
        parts += [f"window={self.window}", f"local_keys={self.local_keys!r}", f"backend={self.backend!r}"]
        return ", ".join(parts)


def _roots(second_moment: Tensor, ridge: float = 1e-3) -> tuple[Tensor, Tensor]:
    # M^½ and M^-½ of (H, D, D), scaled to mean eigenvalue 1; the ridge keeps directions that no query looked at.
    moment = second_moment.double()
    identity = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    size = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    moment = torch.where(size > 0, moment / size.clamp(min=torch.finfo(moment.dtype).tiny), identity)
    values, vectors = torch.linalg.eigh((1 - ridge) * moment + ridge * identity)
    root = values.clamp(min=ridge).sqrt().unsqueeze(-2)  # (H, 1, D), over the columns of vectors
    return (vectors * root) @ vectors.transpose(-1, -2), (vectors / root) @ vectors.transpose(-1, -2)
