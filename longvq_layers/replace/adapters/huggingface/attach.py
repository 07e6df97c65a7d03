"""Gives a module its slot on its first call, in a model made with `attn_implementation="longvq"`."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from longvq_layers.replace.adapters.huggingface.forward_hook import ContextHook
from longvq_layers.replace.adapters.huggingface.support import (
    IMPLEMENTATION,
    config_of,
    may_be_cross_attention,
    refusal,
)
from longvq_layers.replace.slot.attention_slot import fill_slot
from longvq_layers.replace.slot.settings import SlotOptions
from longvq_layers.replace.slot.swapped import SwappedAttention

_OPTIONS: dict[str, Any] = asdict(SlotOptions())


class ReplacedImplementation(str):
    """The name "longvq" in the config of a replaced model. Other models made from this config have no codes."""


def attach(module: nn.Module, query: Tensor, key: Tensor) -> SwappedAttention:
    """Put a new swapped attention into the module's slot: query (B, H, L, D), key (B, Hkv, L, D).

    Raises:
        RuntimeError: in eval mode, in which nothing is learned, or made from the config of a replaced model.
        NotImplementedError: attention that codes can't compute, with the reason.
        ValueError, TypeError: wrong options in the config.
    """
    kind = type(module).__name__
    config = config_of(module)
    if isinstance(config._attn_implementation, ReplacedImplementation):
        raise RuntimeError(
            f"longvq attention: {kind} has no codes: its model was made from the config of one with replaced "
            'attention; make it from copy.deepcopy(config) with _attn_implementation = "sdpa", or use load_replaced'
        )
    if not module.training:
        raise RuntimeError(
            f"longvq attention: {kind} has no codes; call longvq_layers.replace_attention(model, calibration=...), "
            "load_replaced(model, path), or train it first"
        )
    reason = refusal("", module)
    if reason is None and may_be_cross_attention(module):
        reason = "its keys may come from an encoder; use replace_attention(model), which can tell by its name"
    if reason is not None:
        raise NotImplementedError(f"longvq attention: {kind} can't use attn_implementation='longvq': {reason}")
    options = _options(getattr(config, IMPLEMENTATION, None))
    with torch.random.fork_rng(devices=[]):  # a new codebook draws random codes
        attention = SwappedAttention(query.shape[1], key.shape[1], key.shape[3], dtype=query.dtype, **options)
    attention = attention.to(query.device).train()
    fill_slot(module, attention)
    module.register_forward_pre_hook(ContextHook(module), with_kwargs=True)
    return attention


def _options(given: object) -> dict[str, Any]:
    if given is None:
        return _OPTIONS
    if not isinstance(given, Mapping):
        raise TypeError(f"longvq attention: config.longvq must be a dict of options, got {type(given).__name__}")
    unknown = sorted(set(given) - set(_OPTIONS))
    if unknown:
        raise ValueError(f"longvq attention: config.longvq must hold some of {', '.join(_OPTIONS)}, got {unknown[0]!r}")
    return {**_OPTIONS, **given}
