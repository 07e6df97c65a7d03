"""The other way in: `attn_implementation="longvq"`, for models that are trained with it from the start."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from longvq_layers.replace.adapters.huggingface import forward_hook as calls
from longvq_layers.replace.adapters.huggingface import support as refusals
from longvq_layers.replace.slot.swapped import SwappedAttention

NAME = "longvq"
_OPTIONS = {"num_codes": 256, "window": 64, "local_keys": "exact", "variance_correction": True, "backend": "auto"}


class OfReplacement(str):
    """The name, in the config of a model with replaced attention: other models that are made from it have no codes."""


def register_attn_implementation() -> None:
    """Make ``attn_implementation="longvq"`` known to transformers, with the mask function that keeps it causal.

    A model that is made with it gets its codebooks on the first call in training mode, and learns its codes from then
    on. Options are those of `replace_attention`, as a dict in the config: ``config.longvq = {"num_codes": 128}``, which
    is saved with the model. Codes are saved too, and come back with `load_replaced`. To evaluate a trained model that
    has no codes yet, call `replace_attention(model, calibration=...)`. Positions of rotary keys stay
    (``far_positions="rotated"``).

    Raises:
        ImportError: transformers isn't installed.

    Example:
        >>> from transformers import AutoModel, GPT2Config
        >>> register_attn_implementation()
        >>> config = GPT2Config(n_embd=32, n_head=4, n_layer=2, longvq={"num_codes": 16, "window": 8})
        >>> model = AutoModel.from_config(config, attn_implementation="longvq").train()
        >>> model(torch.randint(100, (2, 60))).last_hidden_state.shape
        torch.Size([2, 60, 32])
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    from longvq_layers.replace.adapters.huggingface.attention import longvq_attention
    from longvq_layers.replace.adapters.huggingface.masks import longvq_mask

    AttentionInterface.register(NAME, longvq_attention)
    AttentionMaskInterface.register(NAME, longvq_mask)


def attach(module: nn.Module, query: Tensor, key: Tensor) -> SwappedAttention:
    """Give a module its codebook on its first call: query (B, H, L, D), key (B, Hkv, L, D).

    Raises:
        RuntimeError: in eval mode, in which nothing is learned, or made from the config of a replaced model.
        NotImplementedError: attention that can't be done by codes, with the reason.
        ValueError, TypeError: wrong options in the config.
    """
    kind = type(module).__name__
    if isinstance(module.config._attn_implementation, OfReplacement):
        raise RuntimeError(
            f"longvq attention: {kind} has no codes: its model was made from the config of one with replaced "
            'attention; make it from copy.deepcopy(config) with _attn_implementation = "sdpa", or use load_replaced'
        )
    if not module.training:
        raise RuntimeError(
            f"longvq attention: {kind} has no codes; call longvq_layers.replace_attention(model, calibration=...), "
            "load_replaced(model, path), or train it first"
        )
    reason = refusals.refusal("", module)
    if reason is None and refusals.may_be_cross_attention(module):
        reason = "its keys may come from an encoder; use replace_attention(model), which can tell by its name"
    if reason is not None:
        raise NotImplementedError(f"longvq attention: {kind} can't use attn_implementation='longvq': {reason}")
    options = _options(getattr(module.config, NAME, None))
    with torch.random.fork_rng(devices=[]):  # a new codebook draws random codes
        attention = SwappedAttention(query.shape[1], key.shape[1], key.shape[3], dtype=query.dtype, **options)
    module.longvq = attention.to(query.device).train()
    module.register_forward_pre_hook(calls.NoteCall(module), with_kwargs=True)
    return module.longvq


def _options(given: object) -> dict:
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(f"longvq attention: config.longvq: got {type(given).__name__}, expected a dict of options")
    unknown = sorted(set(given or {}) - set(_OPTIONS))
    if unknown:
        raise ValueError(f"longvq attention: config.longvq: got {unknown[0]!r}, expected some of {', '.join(_OPTIONS)}")
    return {**_OPTIONS, **(given or {})}
