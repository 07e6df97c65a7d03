"""Why a transformers attention module can't be replaced, decided before anything is touched or at the call."""

import inspect

from torch import nn

BIAS_NAMES = frozenset(
    {
        "alibi",
        "position_bias",
        "relative_attention_bias",
        "relative_position_bias",
        "relative_position_bias_table",
        "rel_pos_bias",
        "rel_pos_h",
        "distance_embedding",
    }
)
CROSS_NAMES = frozenset({"crossattention", "cross_attn", "cross_attention", "encoder_attn", "EncDecAttention"})
# Keyword arguments that change no score; any other one that is set is refused by name.
HARMLESS = frozenset(
    {
        "cache",
        "cache_position",
        "input_ids",
        "inputs_embeds",
        "labels",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "past_key_value",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "token_type_ids",
        "use_cache",
    }
)


def refusal(name: str, module: nn.Module) -> str | None:
    """Why this module keeps its attention, or None if it can be replaced."""
    config = module.config
    implementation = config._attn_implementation
    if implementation not in ("eager", "sdpa", "longvq"):
        return f"its attention is {implementation!r}; load the model with attn_implementation='sdpa'"
    if getattr(config, "output_attentions", False):
        return "config.output_attentions is True, but attention weights are never formed; set it to False"
    if _is_cross_attention(name, module):
        return "cross-attention: the keys come from another sequence"
    bias = _position_bias(module)
    if bias is not None:
        return f"additive position bias ({bias}): it has no linear-time form"
    window = _sliding_window(module)
    if isinstance(window, str) and not any(word in window for word in ("sliding", "chunked")):
        return f"layers of type {window!r}: only 'full_attention' is known to see all keys"
    if window is not None:
        return f"sliding-window attention ({window}): it is linear already, and its far keys must stay hidden"
    if getattr(module, "sinks", None) is not None:
        return "attention sinks: an extra softmax term that isn't a key"
    cap = getattr(module, "attn_logit_softcapping", None)
    if cap is not None:
        return f"soft-capped scores (attn_logit_softcapping={cap})"
    return None


def notes(module: nn.Module) -> list[str]:
    """What a user should know of this module once it is replaced."""
    remarks = []
    if _dropout(module) > 0:
        remarks.append("attention dropout is not applied to the probabilities in training")
    return remarks


def check_call(kwargs: dict) -> None:
    """Refuse, by name, every keyword argument that could change a score.

    Raises:
        NotImplementedError: an argument that is set and not known to be harmless.
    """
    for name, value in kwargs.items():
        if value is None or value is False or name in HARMLESS:
            continue
        if name == "output_attentions":
            raise NotImplementedError(
                "longvq attention: output_attentions: got True, but attention weights are never formed (they would be "
                "L x L); pass output_attentions=False or restore_attention(model)"
            )
        raise NotImplementedError(
            f"longvq attention: {name}: got {type(value).__name__}, expected None: this argument may change the "
            "attention scores and is not supported; don't pass it, or restore_attention(model)"
        )


def has_rotary(module: nn.Module) -> bool:
    """Whether its forward rotates queries and keys by their positions."""
    return any("rotary" in name or "rope" in name.lower() for name in _names(module))


def may_be_cross_attention(module: nn.Module) -> bool:
    """Whether its keys may come from an encoder, as far as it knows itself; often only its name in the model tells."""
    takes_keys = "key_value_states" in inspect.signature(inspect.unwrap(type(module).forward)).parameters
    return takes_keys and getattr(module, "is_decoder", False) and not getattr(module, "is_causal", True)


def needs_keys(module: nn.Module) -> str | None:
    """Why this module's keys have to stay as they are and in its cache, or None if sums over them are enough."""
    shared = getattr(module, "is_kv_shared_layer", False) or getattr(module, "store_full_length_kv", False)
    if shared and getattr(module.config, "num_kv_shared_layers", 0):
        return "it shares its keys with another layer"
    try:
        source = inspect.getsource(inspect.unwrap(type(module).forward))
    except OSError:
        return None
    return "it attends more than once with each key" if source.count("attention_interface(") > 1 else None


def _is_cross_attention(name: str, module: nn.Module) -> bool:
    last = name.split(".")
    by_name = any(part in CROSS_NAMES for part in last) or "CrossAttention" in type(module).__name__
    return by_name or bool(getattr(module, "is_cross_attention", False))


def _position_bias(module: nn.Module) -> str | None:
    if getattr(module.config, "alibi", False):
        return "alibi"
    if "relative" in str(getattr(module.config, "position_embedding_type", "")):
        return "relative position embeddings"
    code = inspect.unwrap(type(module).forward).__code__
    known = {*_names(module), *code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]} | set(dir(module))
    return next((name for name in sorted(BIAS_NAMES) if name in known), None)


def _sliding_window(module: nn.Module) -> object | None:
    config = module.config
    if "sliding_window" in module.__dict__:
        return module.sliding_window
    layer_types, index = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if layer_types is not None and isinstance(index, int) and index < len(layer_types):
        kind = layer_types[index]
        return None if kind == "full_attention" else kind
    code = inspect.unwrap(type(module).forward).__code__
    reads_it = any("sliding_window" in str(text) for text in (*code.co_names, *code.co_consts))
    return getattr(config, "sliding_window", None) if reads_it else None


def _dropout(module: nn.Module) -> float:
    for name in ("attention_dropout", "dropout", "attn_dropout", "dropout_p"):
        value = getattr(module, name, None)
        value = getattr(value, "p", value)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    return 0.0


def _names(module: nn.Module) -> tuple[str, ...]:
    return inspect.unwrap(type(module).forward).__code__.co_names
