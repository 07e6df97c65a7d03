"""torch.nn.MultiheadAttention, alone or inside nn.TransformerEncoderLayer and nn.TransformerDecoderLayer."""

import contextlib
import sys
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longvq_layers.replace.adapters.base import Site, own_forward
from longvq_layers.replace.slot.full_attention import full_attention
from longvq_layers.replace.slot.recorder import Recorder

_NESTED = "_longvq_use_nested_tensor"  # where a changed nn.TransformerEncoder keeps its own value


def find(model: nn.Module) -> list[Site]:
    """Every nn.MultiheadAttention of the model."""
    parents = {id(child): module for module in model.modules() for child in module.children()}
    return [
        _site(name, module, parents.get(id(module)))
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    ]


def is_replaced(module: nn.Module) -> bool:
    """Whether this module's attention is ours already."""
    return isinstance(module, VQMultiheadAttention)


def original_function(module: nn.Module) -> None:
    """None: calibration computes the original attention from the projections."""


@dataclass
class Installed:
    """Swaps modules and remembers what it changed, by object, so that a deep copy of the model can undo it too."""

    attached: list[nn.Module] = field(default_factory=list)
    encoders: list[nn.Module] = field(default_factory=list)

    def install(self, model: nn.Module, sites: list[Site], seams: list[nn.Module], *, masks: bool) -> None:
        """Give each module its seam and our forward; parameters, hooks, dtype, device and mode stay as they are.

        Args:
            masks: unused, masks of nn.MultiheadAttention come with each call.
        """
        for site, seam in zip(sites, seams, strict=True):
            self.attached.append(site.module)
            site.module.longvq = seam
            site.module.__class__ = VQMultiheadAttention
        for module in model.modules():
            if isinstance(module, nn.TransformerEncoder) and any(is_replaced(child) for child in module.modules()):
                self.encoders.append(module)
                module.__dict__.setdefault(_NESTED, module.use_nested_tensor)
                module.use_nested_tensor = False  # else evaluation with padding hands its layers nested tensors

    def undo(self) -> None:
        """Put everything back."""
        for module in self.attached:
            module.__class__ = nn.MultiheadAttention
            module._modules.pop("longvq", None)
        for module in self.encoders:
            if _NESTED in module.__dict__ and not any(is_replaced(child) for child in module.modules()):
                module.use_nested_tensor = module.__dict__.pop(_NESTED)


class VQMultiheadAttention(nn.MultiheadAttention):
    """An nn.MultiheadAttention whose keys are quantised; made by `replace_attention`, never by hand.

    Same parameters and same call as nn.MultiheadAttention for self-attention. `attn_mask` may be None or the causal
    mask; `is_causal=True` alone is enough and costs no L×L mask. `need_weights` must be False.
    """

    @property
    def _qkv_same_embed_dim(self) -> bool:
        # nn.TransformerEncoderLayer's evaluation fast path reads the weights and skips this module's forward, unless
        # this is False. A property of the class wins over the instance's own value, which stays for the way back.
        return False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Self-attention of query (B, L, C), or (L, B, C) without batch_first, or (L, C) unbatched.

        Args:
            key: must be `query` itself, or have its memory.
            value: (…, vdim), often `query` itself.
            key_padding_mask: (B, L) bool, True = ignore, or float of 0 and -inf.
            need_weights: must be False.
            attn_mask: None, exactly the causal mask, or one that hides nothing; bool (True = not allowed) or float of 0
                and -inf.
            is_causal: attend to the past only; attn_mask may then be None.

        Returns:
            the output, shaped like query, and None.
        """
        seam = self.longvq
        with seam.refusals() if isinstance(seam, Recorder) else contextlib.nullcontext():
            self._check_call(query, key, need_weights)
            return self._attend(seam, query, key, value, key_padding_mask, attn_mask, is_causal), None

    def _attend(
        self,
        seam: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> Tensor:
        batched = query.dim() == 3
        q, k, v = self._project(query, key, value, batched)
        length = q.shape[2]
        causal = is_causal if attn_mask is None else _read_attn_mask(attn_mask, is_causal, length)
        padding = _read_padding(key_padding_mask, q.shape[0], length)
        if isinstance(seam, Recorder):
            output = full_attention(q, k, v, causal=causal, key_padding_mask=padding)
            seam.observe(q, k, v, output, causal=causal, key_padding_mask=padding, scale=None)
        else:
            output = seam(q, k, v, padding, causal=causal)
        output = F.linear(output.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        if not batched:
            return output.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1)

    def _check_call(self, query: Tensor, key: Tensor, need_weights: bool) -> None:
        if need_weights:
            raise NotImplementedError(
                "VQMultiheadAttention: need_weights: got True (the default), but attention weights are never formed; "
                "pass need_weights=False"
            )
        if query.is_nested:
            raise NotImplementedError(
                "VQMultiheadAttention: query: got a nested tensor, expected a dense one with key_padding_mask=; build "
                "nn.TransformerEncoder with enable_nested_tensor=False"
            )
        if query is not key and not _share_memory(query, key):
            raise NotImplementedError(
                "VQMultiheadAttention: key: got another tensor than query (cross-attention), expected query itself; "
                "pass the same object, or leave this module out with filter_fn="
            )
        if query.dim() not in (2, 3) or query.shape[-1] != self.embed_dim:
            raise ValueError(
                f"VQMultiheadAttention: query: got shape {tuple(query.shape)}, expected (B, L, {self.embed_dim}) or "
                f"(L, {self.embed_dim})"
            )

    def _project(self, query: Tensor, key: Tensor, value: Tensor, batched: bool) -> tuple[Tensor, Tensor, Tensor]:
        # -> q, k (B, H, L, D), v (B, H, L, D)
        packed, bias = self.in_proj_weight, self.in_proj_bias
        if packed is not None and key is query and value is query:
            projected = F.linear(query, packed, bias).chunk(3, dim=-1)
        else:  # packed is None if vdim differs from embed_dim
            separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            weights = separate if packed is None else packed.chunk(3)
            biases = (None, None, None) if bias is None else bias.chunk(3)
            projected = [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]
        if not batched:
            projected = [x.unsqueeze(0) for x in projected]
        elif not self.batch_first:
            projected = [x.transpose(0, 1) for x in projected]
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in projected)
        return q, k, v


def _site(name: str, module: nn.MultiheadAttention, parent: nn.Module | None) -> Site:
    notes = []
    if module.dropout > 0:
        notes.append("attention dropout is not applied to the probabilities in training")
    return Site(
        name=name,
        module=module,
        adapter=sys.modules[__name__],
        kind=type(module).__name__,
        new_kind=VQMultiheadAttention.__name__,
        causal="per call",
        sizes=(module.num_heads, module.num_heads, module.head_dim),
        refusal=_refusal(module, parent),
        notes=notes,
    )


def _refusal(module: nn.MultiheadAttention, parent: nn.Module | None) -> str | None:
    if type(module) not in (nn.MultiheadAttention, VQMultiheadAttention):
        return f"{type(module).__name__} is a subclass of nn.MultiheadAttention with a forward of its own"
    if isinstance(parent, nn.TransformerDecoderLayer) and module is parent.multihead_attn:
        return "cross-attention: the keys come from another sequence"
    if module.kdim != module.embed_dim:
        return f"cross-attention: kdim {module.kdim} differs from embed_dim {module.embed_dim}"
    if (reason := own_forward(module)) is not None:
        return reason
    if module.bias_k is not None:
        return "add_bias_kv=True: an extra learned key without a position"
    if module.add_zero_attn:
        return "add_zero_attn=True: an extra zero key without a position"
    return None


def _share_memory(query: Tensor, key: Tensor) -> bool:
    # Reentrant checkpointing detaches each argument by itself: other objects, the same numbers.
    if torch.compiler.is_compiling():
        return False
    try:
        return (query.data_ptr(), query.shape, query.stride()) == (key.data_ptr(), key.shape, key.stride())
    except RuntimeError:  # the wrappers of torch.func have no memory of their own
        return False


def _read_attn_mask(attn_mask: Tensor, is_causal: bool, length: int) -> bool:
    # Causal, or hiding nothing, or an error. A compiled graph can't look at values, so there the hint is trusted.
    if attn_mask.shape[-2:] != (length, length):
        raise ValueError(
            f"VQMultiheadAttention: attn_mask: got shape {tuple(attn_mask.shape)}, expected ({length}, {length})"
        )
    if torch.compiler.is_compiling() and is_causal:
        return True
    blocked = _blocked("attn_mask", attn_mask)
    future = torch.ones(length, length, dtype=torch.bool, device=attn_mask.device).triu(1)
    if length > 1 and not blocked.any():
        return is_causal
    if not (blocked == future).all():
        raise NotImplementedError(
            "VQMultiheadAttention: attn_mask: got a mask that is not exactly causal, expected None or the causal mask; "
            "other masks have no linear-time form"
        )
    return True


def _read_padding(mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    if mask is None:
        return None
    mask = _blocked("key_padding_mask", mask)
    if mask.dim() == 1:
        mask = mask.unsqueeze(0)
    if tuple(mask.shape) != (batch, length):
        raise ValueError(
            f"VQMultiheadAttention: key_padding_mask: got shape {tuple(mask.shape)}, expected {(batch, length)}"
        )
    return mask


def _blocked(name: str, mask: Tensor) -> Tensor:
    # bool (True = not allowed) as it is; float must be 0 or -inf.
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        raise TypeError(f"VQMultiheadAttention: {name}: got dtype {mask.dtype}, expected bool or float")
    if torch.compiler.is_compiling():
        return _blocked_when_run(mask.detach(), name)
    return _blocked_by_float(mask, name)


def _blocked_by_float(mask: Tensor, name: str) -> Tensor:
    blocked = mask == -torch.inf
    if not (blocked | (mask == 0)).all():
        raise NotImplementedError(
            f"VQMultiheadAttention: {name}: got values other than 0 and -inf; an additive bias has no linear-time form"
        )
    return blocked


# One opaque step of a compiled graph: it looks at the values when it runs and raises what eager raises. CUDA graphs
# can't hold it, because the answer is read on the host.
_blocked_when_run = torch.library.custom_op(
    "longvq_layers::blocked_by_float", _blocked_by_float, mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)


@_blocked_when_run.register_fake
def _(mask: Tensor, name: str) -> Tensor:
    return torch.empty_like(mask, dtype=torch.bool)
