"""The module that a swapped attention carries: its codebook, the metric it was fitted in, and how to attend."""

import torch
from torch import Tensor

from longvq_layers import ops
from longvq_layers.layers._kmeans import no_autocast
from longvq_layers.layers._precision import KeepsFloat32, storage_dtype
from longvq_layers.layers.codebook import Codebook


class SwappedAttention(KeepsFloat32):
    """Attention over quantised keys whose codes were fitted in the metric of the queries.

        M = E[q qᵀ] per key-value head,  k' = k M^½,  z_j = argmin_s ‖k'_j − C'_s‖²,  C = C' M^-½

    ‖k' − C'‖² is the expected square of a score's error, so codes go where queries look. The scores use q, k and C
    as they are; M^½ only decides which code a key gets. Without calibration M is the identity.

    Args:
        num_heads: Hkv, key-value heads.
        head_dim: D, width of a key.
        num_codes: S, codes per head.
        window: W, positions attended key by key; causal: 0 ≤ i−j < W, else |i−j| < W; 0 = none.
        local_keys: "exact" or "quantized" keys inside the window.
        backend: see `ops.vq_attention`.
        device, dtype: of the buffers; float64 stays float64, anything else is float32.

    Buffers:
        to_metric (Hkv, D, D) = M^½, from_metric (Hkv, D, D) = M^-½, and those of `codebook`.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        num_codes: int,
        *,
        window: int,
        local_keys: str,
        backend: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.window, self.local_keys, self.backend = window, local_keys, backend
        dtype = storage_dtype(dtype)
        self.codebook = Codebook(num_heads, num_codes, head_dim, device=device, dtype=dtype)
        identity = torch.eye(head_dim, device=device, dtype=dtype).repeat(num_heads, 1, 1)
        self.register_buffer("to_metric", identity)
        self.register_buffer("from_metric", identity.clone())

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, key_padding_mask: Tensor | None, scale: float | None
    ) -> Tensor:
        """q (B, H, L, D), k (B, Hkv, L, D), v (B, Hkv, L, E), key_padding_mask (B, L) True = ignore -> (B, H, L, E)."""
        if not self.training and not self.codebook._ready:
            raise RuntimeError(
                "longvq attention: the codebook has no codes yet; call replace_attention with calibration=, run one "
                "batch in training mode, or load a state_dict that has codes"
            )
        codes, codebook = self.quantize(k, key_padding_mask)
        return ops.vq_attention(
            q,
            k,
            v,
            codebook,
            causal=causal,
            window=self.window,
            key_padding_mask=key_padding_mask,
            scale=scale,
            local_keys=self.local_keys,
            codes=codes,
            backend=self.backend,
        )

    def quantize(self, k: Tensor, key_padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The codes of keys (B, Hkv, L, D) -> (B, Hkv, L), and the codebook (Hkv, S, D) in the space of the keys."""
        with torch.no_grad(), no_autocast(k.device):
            codes, table = self.codebook.quantize(self.in_metric(k), key_padding_mask)
            return codes, table @ self.from_metric

    @torch.no_grad()
    def in_metric(self, k: Tensor) -> Tensor:
        """k' = k M^½, at least float32: (B, Hkv, L, D) -> the same shape."""
        return k.detach().to(self.to_metric.dtype) @ self.to_metric

    @torch.no_grad()
    def fit_(self, keys: Tensor, second_moment: Tensor, *, generator: torch.Generator | None = None) -> None:
        """Fit the metric and the codes: keys (Hkv, N, D), second_moment (Hkv, D, D) = E[q qᵀ]."""
        to_metric, from_metric = _roots(second_moment)
        self.to_metric.copy_(to_metric)
        self.from_metric.copy_(from_metric)
        self.codebook.initialize_(keys.to(self.to_metric.dtype) @ self.to_metric, generator=generator)

    def extra_repr(self) -> str:
        return f"window={self.window}, local_keys={self.local_keys!r}, backend={self.backend!r}"


def _roots(second_moment: Tensor, ridge: float = 1e-3) -> tuple[Tensor, Tensor]:
    # M^½ and M^-½ of (H, D, D), scaled to mean eigenvalue 1; the ridge keeps directions that no query looked at.
    moment = second_moment.double()
    identity = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    size = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    moment = torch.where(size > 0, moment / size.clamp(min=torch.finfo(moment.dtype).tiny), identity)
    values, vectors = torch.linalg.eigh((1 - ridge) * moment + ridge * identity)
    root = values.clamp(min=ridge).sqrt().unsqueeze(-2)  # (H, 1, D), over the columns of vectors
    return (vectors * root) @ vectors.transpose(-1, -2), (vectors / root) @ vectors.transpose(-1, -2)
