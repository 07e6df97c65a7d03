"""Rotary positions of transformers models: taken off the keys that codes stand for, and clamped outside the window.

A key arrives rotated by its position, k = R(j) k⁰, so that one code would have to stand for all positions. Inside the
window scores stay (R(i) q⁰)·(R(j) k⁰); outside it the relative position is clamped to the window, (R(W) q⁰)·k⁰, so that
codes of the unrotated keys serve all positions, those beyond the training length too (ReRoPE; docs/replace.md).
"""

import copy
import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from longvq_layers.layers.common.precision import KeepsFloat32
from longvq_layers.replace.huggingface_refusals import needs_keys

EMBEDDINGS = "position_embeddings"  # the argument (cos, sin) of attention modules
_ONE, _BOTH = ("x", "cos", "sin"), ("q", "k", "cos", "sin")  # arguments of rotations that are known
_PARTS: dict[str, Callable[[int, int], slice]] = {  # which of the width's columns are rotated, n as many as cos has
    "all": lambda width, n: slice(0, width),
    "first": lambda width, n: slice(0, n),
    "last": lambda width, n: slice(width - n, width),
}


class ClampedRotary(KeepsFloat32, nn.Module):
    """Queries and keys without their positions: ``(q, k, cos, sin) -> R(W) q⁰, k⁰``.

    Args:
        apply: the model's own ``apply_rotary_pos_emb``, of (q, k, cos, sin) or of one tensor, (x, cos, sin).
        cos, sin: (n,) those of position W, float32.

    Attributes:
        part: which columns of a key are rotated, "all", "first" or "last"; None until `settle` has found out.
    """

    def __init__(self, apply: Callable, cos: Tensor, sin: Tensor) -> None:
        super().__init__()
        self.apply_rotation = apply
        self.one_by_one = _arguments(apply) == _ONE
        self.part: str | None = None
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """q (B, H, L, D), k (B, Hkv, L, D), cos and sin (B or 1, L, n) as the model rotated with -> like q and k."""
        # Some models scale cos and sin: by s, so that a score has the factor s², which the queries keep.
        cos, sin = cos.to(self.cos.dtype), sin.to(self.cos.dtype)
        square = cos * cos + sin * sin
        back_cos, back_sin = cos / square, -sin / square
        far_k = self._rotate(k, back_cos, back_sin)
        scale = (self.cos * self.cos + self.sin * self.sin).sqrt()
        far_cos = (self.cos * back_cos - self.sin * back_sin) * scale
        far_sin = (self.sin * back_cos + self.cos * back_sin) * scale
        return self._rotate(q, far_cos, far_sin), far_k

    def settle(self, rotated: Tensor, plain: Tensor, cos: Tensor, sin: Tensor) -> bool:
        """Find out which columns are rotated, given keys (B, Hkv, L, D) with and without positions.

        Returns:
            whether the positions can be taken off.
        """
        tolerance = 1e-3 if rotated.dtype in (torch.float32, torch.float64) else 5e-2
        for self.part in _PARTS:
            try:
                _, found = self(rotated[:, :1], rotated, cos, sin)
            except RuntimeError:  # cos doesn't fit so many columns
                continue
            if (found.float() - plain.float()).abs().max() <= tolerance * (1e-6 + plain.float().abs().max()):
                return True
        self.part = None
        return False

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        at = _PARTS[self.part](x.shape[-1], cos.shape[-1])
        columns = x[..., at].to(cos.dtype)
        if self.one_by_one:
            turned = self.apply_rotation(columns, cos, sin).to(x.dtype)
        else:
            turned = self.apply_rotation(columns, columns[:, :0], cos, sin)[0].to(x.dtype)
        if turned.shape[-1] == x.shape[-1]:
            return turned
        return torch.cat([x[..., : at.start], turned, x[..., at.stop :]], dim=-1)


def is_rotary(module: nn.Module) -> bool:
    """Whether this attention module is given cos and sin, and its forward rotates by them in the usual way."""
    forward = inspect.unwrap(type(module).forward)
    return "apply_rotary_pos_emb" in forward.__code__.co_names and EMBEDDINGS in inspect.signature(forward).parameters


def clamped_rotary(model: nn.Module, name: str, module: nn.Module, window: int) -> ClampedRotary | str:
    """The rotation of that module, `name` in `model`, clamped to `window`; or why there is none."""
    if not is_rotary(module):
        return "its forward doesn't rotate by position_embeddings in the usual way"
    if (reason := needs_keys(module)) is not None:
        return reason
    embedding = _embedding(model, name)
    if embedding is None:
        return "no rotary embedding (a module with inv_freq) was found around it"
    layer_types, index = getattr(module.config, "layer_types", None), getattr(module, "layer_idx", None)
    options = {}
    if "layer_type" in inspect.signature(inspect.unwrap(type(embedding).forward)).parameters:
        options = {"layer_type": layer_types[index]}
    device = next(embedding.buffers()).device
    position = torch.full((1, 1), window, device=device)
    try:
        with torch.no_grad():  # a copy: some embeddings remember the longest position
            cos, sin = copy.deepcopy(embedding)(torch.zeros(1, device=device), position, **options)
    except Exception as error:  # called in a way of its own, or without positions for layers of this type
        return f"its rotary embedding gives no positions here ({type(error).__name__}: {error})"
    if cos.dim() != 3:
        return f"its positions have more than one dimension (cos of shape {tuple(cos.shape)})"
    apply = inspect.unwrap(type(module).forward).__globals__["apply_rotary_pos_emb"]
    if _arguments(apply) not in (_ONE, _BOTH):
        return "its apply_rotary_pos_emb takes other arguments than the usual ones"
    return ClampedRotary(apply, cos[0, 0].float(), sin[0, 0].float())


def _arguments(apply: Callable) -> tuple[str, ...]:
    # Its leading ones, without defaults.
    parameters = inspect.signature(apply).parameters.values()
    return tuple(one.name for one in parameters if one.default is inspect.Parameter.empty)


def _embedding(model: nn.Module, name: str) -> nn.Module | None:
    # That of the nearest module around this one.
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        for child in model.get_submodule(".".join(parts[:depth])).children():
            if any(buffer.endswith("inv_freq") for buffer, _ in child.named_buffers(recurse=False)):
                return child
    return None
