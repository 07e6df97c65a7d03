"""Removes rotary positions from queries and keys, and clamps the relative position outside the window.

The model rotates a key by its position j: k = R(j) k⁰. Equal keys k⁰ at different positions would need different
codes. Inside the window the scores stay (R(i) q⁰)·(R(j) k⁰). Outside, the relative position is clamped to the window:
(R(W) q⁰)·k⁰. A code of unrotated keys then represents keys at all positions, including those beyond the training length
(ReRoPE; docs/replace.md).
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from longvq_layers.layers.common.precision import KeepsFloat32

_ONE_TENSOR, _QUERY_AND_KEY = ("x", "cos", "sin"), ("q", "k", "cos", "sin")  # known signatures of rotations
_COLUMNS: dict[str, Callable[[int, int], slice]] = {  # which columns of head_dim are rotated; cos has n of them
    "all": lambda head_dim, n: slice(0, head_dim),
    "first": lambda head_dim, n: slice(0, n),
    "last": lambda head_dim, n: slice(head_dim - n, head_dim),
}


class ClampedRotary(KeepsFloat32, nn.Module):
    """Queries and keys without their positions: ``(q, k, cos, sin) -> R(W) q⁰, k⁰``.

    Args:
        apply: the model's own ``apply_rotary_pos_emb``, of (q, k, cos, sin) or of one tensor, (x, cos, sin).
        cos, sin: (n,) float32, cosine and sine of position W.

    Attributes:
        part: which columns of a key are rotated, "all", "first" or "last"; None until `detect_rotated_columns`.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, apply: Callable[..., Any], cos: Tensor, sin: Tensor) -> None:
        super().__init__()
        self.apply_rotation = apply
        self.one_by_one = leading_arguments(apply) == _ONE_TENSOR
        self.part: str | None = None
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Remove the positions of k, and replace those of q by W.

        Args:
            q: (B, H, L, D), rotated by the model.
            k: (B, Hkv, L, D), rotated by the model.
            cos, sin: (B or 1, L, n), with which the model rotated q and k.

        Returns:
            queries and keys shaped like q and k.
        """
        # Some models scale cos and sin by s, so that a score has the factor s². The queries keep both factors.
        cos, sin = cos.to(self.cos.dtype), sin.to(self.cos.dtype)
        square = cos * cos + sin * sin
        back_cos, back_sin = cos / square, -sin / square
        far_k = self._rotate(k, back_cos, back_sin)
        scale = (self.cos * self.cos + self.sin * self.sin).sqrt()
        far_cos = (self.cos * back_cos - self.sin * back_sin) * scale
        far_sin = (self.sin * back_cos + self.cos * back_sin) * scale
        return self._rotate(q, far_cos, far_sin), far_k

    def detect_rotated_columns(self, rotated: Tensor, plain: Tensor, cos: Tensor, sin: Tensor) -> bool:
        """Set `part` from the keys (B, Hkv, L, D) of one call with positions and of the same call without.

        Returns:
            whether removing the positions of `rotated` gives `plain`.
        """
        tolerance = 1e-3 if rotated.dtype in (torch.float32, torch.float64) else 5e-2
        for part in _COLUMNS:
            self.part = part
            try:
                _, found = self(rotated[:, :1], rotated, cos, sin)
            except RuntimeError:  # cos has another number of columns
                continue
            if (found.float() - plain.float()).abs().max() <= tolerance * (1e-6 + plain.float().abs().max()):
                return True
        self.part = None
        return False

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if self.part is None:
            raise RuntimeError("ClampedRotary: part must be set by detect_rotated_columns, got None")
        at = _COLUMNS[self.part](x.shape[-1], cos.shape[-1])
        columns = x[..., at].to(cos.dtype)
        if self.one_by_one:
            turned = self.apply_rotation(columns, cos, sin)
        else:
            turned, _ = self.apply_rotation(columns, columns[:, :0], cos, sin)
        turned = turned.to(x.dtype)
        if turned.shape[-1] == x.shape[-1]:
            return turned
        return torch.cat([x[..., : at.start], turned, x[..., at.stop :]], dim=-1)


def is_known_rotation(apply: Callable[..., object]) -> bool:
    """Whether the rotation takes (x, cos, sin) or (q, k, cos, sin)."""
    return leading_arguments(apply) in (_ONE_TENSOR, _QUERY_AND_KEY)


def leading_arguments(apply: Callable[..., object]) -> tuple[str, ...]:
    """Names of the arguments that have no default."""
    parameters = inspect.signature(apply).parameters.values()
    return tuple(one.name for one in parameters if one.default is inspect.Parameter.empty)
