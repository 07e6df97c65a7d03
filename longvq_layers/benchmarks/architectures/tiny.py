"""A tiny random model of any class of transformers: its default config, shrunk by the names of its numbers.

The code needs no list of models, because a number called `..._heads` counts heads in every config. One layer of every
kind that the default config has is kept (windowed and full, dense and sparse, with and without positions).
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

VOCABULARY = 101
FIRST_SPECIAL = 61  # ids from here on mark images, sounds and the like; inputs use smaller ids
WIDTH, INNER, HEADS, LAYERS = 32, 48, 4, 2
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")
_MOST_PARAMETERS = 35_000_000  # a larger model has a size under a name that no pattern matches

# The first pattern that a name matches gives its new value: a number, a function of the default, or None to keep it.
_NUMBERS: list[tuple[str, int | Callable[[int], int] | None]] = [
    (r"vocab_size|vocab_size_per_layer_input|num_embeddings$", VOCABULARY),
    (r"mask_feature|mask_time|audio_channels|num_channels|n_channels|in_channels|input_channels", None),
    (r"(num|n)_(group|groups)$|topk_group$|n_shared_experts|num_shared_experts|moe_num_shared", 1),
    (r"(per_tok|moe_topk|moe_k|top_k|num_selects|num_experts_per_token)$", lambda n: min(n, 2)),
    (r"experts$|num_local_experts|moe_num_experts", lambda n: min(n, 4)),
    (r"first_k_dense|num_dense_layers|moe_layer_start_index", lambda n: min(n, 1)),
    (r"num_kv_shared_layers|nextn|mtp_layers|adapter_layers|feat_extract_layers|window_layers", None),
    (r"(key_value_heads|kv_heads|kv_head)(_per_layer)?$", HEADS),
    (r"linear_num_key_heads", 2),
    (r"mamba_(n|num)_heads|mamba_nheads", 8),
    (r"mamba_expand|^expand$|num_attention_heads_ratio", None),
    (r"heads?$|heads_per_layer$", lambda n: HEADS),
    (r"(hidden|encoder|decoder|num|n|attention|transformer)_(hidden_)?layers?$|^depth$|^layers$|num_blocks$", LAYERS),
    (r"rotary_dim", 4),
    (r"head_dim$|dim_head$|d_head$|head_size$|attention_key_size|mamba_d_head|^d_kv$|key_value_dim", WIDTH // HEADS),
    (r"lora_rank", 16),
    (r"sliding_window|attention_chunk_size|local_attention|swa_window|window_size$", lambda n: min(n, 8)),
    (r"patch_size$|patch_size_t$", lambda n: min(n, 4)),
    (r"(image|img|input|pretrain_image)_size$", lambda n: 24 if n > 48 else n),
    (r"max_source_positions|image_seq_length", lambda n: min(n, 37)),
    (r"position(_embedding)?s$|n_positions|context_length|max_seq_len|max_relative", lambda n: min(n, 256)),
    (r"intermediate(_size|_dim)?(_mlp)?$|ffn_dim$|d_ff$|mlp_dim$|feedforward_dim|ffn_hidden_size|d_inner", INNER),
    (r"state_size|d_state|ssm_state", lambda n: min(n, 8)),
    (r"(hidden|emb|embd|embed|embedding|proj|projection|dim|model|output|pooler)\w*(_size|_dim)s?$", WIDTH),
    (r"^(d_model|n_embd|dim|width|hidden)$", WIDTH),
    (r"conv_dim$", 16),
    (r"num_queries|num_query_tokens|num_denoising", lambda n: min(n, 10)),
    (r"num_mel_bins|feature_size", lambda n: n),
]
_SPECIAL = re.compile(r"_(id|index)$")


@dataclasses.dataclass(frozen=True)
class _Attempt:
    """How to choose numbers that depend on each other."""

    grouped: bool = True  # fewer key-value heads than heads
    sections: tuple[int, ...] = ()  # rotated pairs of each of three coordinates; empty: as in the config
    keep_widths: bool = False


_ATTEMPTS = (
    _Attempt(),
    _Attempt(sections=(2, 1, 1)),
    _Attempt(sections=(1, 1, 0)),
    _Attempt(grouped=False),
    _Attempt(keep_widths=True),
)


def tiny_configs(config_class: type) -> Iterator[Any]:
    """Configs of that class, the smallest first; for a config that can't be made, its exception."""
    for attempt in _ATTEMPTS:
        try:
            yield _shrunk(config_class(), attempt)
        except Exception as error:  # most configs check themselves
            yield error


def build(model_class: type, config: Any, *, stir: bool) -> nn.Module:
    """The model, in eval mode, with random weights.

    Args:
        model_class: of transformers.
        config: of the model.
        stir: draw large weights, so that attention is not uniform, and random biases and norms instead of zeros and
            ones.

    Raises:
        ValueError: the model would be too large.
    """
    with torch.device("meta"):
        try:
            size = sum(p.numel() for p in model_class(config).parameters())
        except Exception:  # some models can't be made on the meta device
            size = 0
    if size > _MOST_PARAMETERS:
        raise ValueError(f"its {size / 1e6:.0f} million parameters are too many")
    torch.manual_seed(0)
    model: nn.Module = model_class(config).eval()
    if stir:
        _stir(model)
    return model


def _shrunk(config: Any, attempt: _Attempt) -> Any:
    values: dict[str, object] = {}
    special = iter(range(VOCABULARY - 1, FIRST_SPECIAL - 1, -1))
    if _read(config, "num_key_value_heads") == _read(config, "num_attention_heads"):
        attempt = dataclasses.replace(attempt, grouped=False)  # models read one number or the other
    layers = _layers(config)
    count = max((len(value) for value in _per_layer(config).values()), default=0)
    for name in _names(config):
        value = _read(config, name)
        if isinstance(value, bool):
            continue
        if value is None:
            if re.fullmatch("vocab_size|n_routed_experts", name):
                values[name] = 4 if "experts" in name else VOCABULARY
        elif hasattr(value, "model_type"):
            values[name] = _shrunk(value, attempt)
        elif _SPECIAL.search(name) and isinstance(value, int):
            values[name] = next(special) if value >= FIRST_SPECIAL else value
        elif isinstance(value, int):
            values[name] = _number(name, value, attempt)
        elif isinstance(value, (list, tuple)) and layers and len(value) == count:
            values[name] = [_number(name, value[i], attempt) if type(value[i]) is int else value[i] for i in layers]
        elif isinstance(value, (list, tuple)) and value and all(type(x) is int for x in value):
            values[name] = type(value)(_number(name, x, attempt) for x in value)
        elif name == "rope_parameters":
            kinds = sorted({*(_read(config, "layer_types") or ())})
            values[name] = _rope(value or {kind: dict(_ROPE) for kind in kinds}, attempt)
    for name in _COUNTS:
        if layers and name in values:
            values[name] = len(layers)
    if _read(config, "num_kv_shared_layers"):
        values["num_kv_shared_layers"] = len(layers) // 2
    return type(config)(**values)


def _number(name: str, value: int, attempt: _Attempt) -> int:
    for pattern, new in _NUMBERS:
        if not re.search(pattern, name):
            continue
        if new is None or value <= 0:
            return value
        if attempt.keep_widths and (new in (WIDTH, WIDTH // HEADS, INNER) or "heads" in name):
            return value
        if "kv_head" in name or "key_value_head" in name:
            return min(value, 2 if attempt.grouped else HEADS)
        return new(value) if callable(new) else min(new, value)
    return value


def _names(config: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(config) if field.init]


def _read(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # some configs refuse to give one number where the layers have different ones
        return vars(config).get(name)


def _per_layer(config: Any) -> dict[str, Sequence[Any]]:
    """The lists of the config that have an item for every layer."""
    count = next((n for n in map(lambda name: _read(config, name), _COUNTS) if isinstance(n, int)), 0)
    lists = {name: _read(config, name) for name in _names(config)} if count > 1 else {}
    return {name: value for name, value in lists.items() if isinstance(value, (list, tuple)) and len(value) == count}


def _layers(config: Any) -> list[int]:
    """The layers to keep: one of every kind in their order, at least two; twice that if layers read others' keys."""
    lists = {name: value for name, value in _per_layer(config).items() if all(type(x) in (str, int) for x in value)}
    if not lists:
        return []
    kinds = list(zip(*lists.values(), strict=True))
    first = sorted({kinds.index(kind) for kind in kinds})[:6]
    if len(first) == 1:
        first = [first[0], first[0]]
    return first * 2 if _read(config, "num_kv_shared_layers") else first


def _rope(parameters: Any, attempt: _Attempt) -> Any:
    # Each kind of layers may have a dict of its own.
    if not isinstance(parameters, dict):
        return parameters
    new = {name: _ROPE.get(name) if value is None else _rope(value, attempt) for name, value in parameters.items()}
    if "rope_type" in new and (attempt.sections or "mrope_section" in new):
        new["mrope_section"] = list(attempt.sections or (2, 1, 1))
    return new


@torch.no_grad()
def _stir(model: nn.Module) -> None:
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for parameter in model.parameters():
        if not parameter.is_floating_point() or not parameter.numel():
            continue
        noise = torch.randn(parameter.shape)
        if parameter.dim() < 2 or max(parameter.shape) == parameter.numel():
            parameter.add_(0.2 * noise.to(parameter.dtype))
        else:
            spread = 1.0 if id(parameter) in tables else 1.3 * parameter[0].numel() ** -0.5
            parameter.copy_(spread * noise)
