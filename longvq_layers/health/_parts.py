"""Which block of a model a parameter belongs to, and what it does there."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from longvq_layers.layers.attention.codebook_attention import CodebookAttention
from longvq_layers.layers.blocks.s4d import S4DBlock
from longvq_layers.layers.blocks.transformer import TransformerBlock
from longvq_layers.layers.parts.feed_forward import FeedForward

KINDS = ("ssm", "codebook/keys", "attention", "gates", "feed-forward", "embedding/other")

# Attributes of a block that hold a gate: those that mix a block with its input, and those of the attention's output.
OUTPUT_GATES = ("output_gate", "update_gate")
ATTENTION_GATES = ("attention_gate", "reset_gate")

_FUSED = "mx_proj"  # of a Mega block: update gate, Z, reset gate and candidate from one layer

_MEMORIES = ("ssm", "ema")
_ATTENTIONS = ("attention", "local", "cross")
_MIXERS = (*_MEMORIES, *_ATTENTIONS)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_KIND_OF = {
    **dict.fromkeys(_MEMORIES, "ssm"),
    **dict.fromkeys((*OUTPUT_GATES, *ATTENTION_GATES, _FUSED), "gates"),
    **dict.fromkeys(("ffn", "feed_forward", "mlp"), "feed-forward"),
    **dict.fromkeys(("k_proj", "window_bias"), "codebook/keys"),
    **dict.fromkeys((*_ATTENTIONS, "qkv_proj", "q_proj", "v_proj", "out_proj", "h_proj"), "attention"),
    **dict.fromkeys(("candidate_x", "candidate_o", "gamma", "beta"), "attention"),
}


class Gate(NamedTuple):
    """A gate: its name, the module it belongs to, the linear layer, and which of that layer's outputs it is."""

    name: str
    owner: nn.Module
    layer: nn.Linear
    is_output: bool  # mixes the block with its input; otherwise it weights the attention's output
    columns: slice = slice(None)


@dataclass(frozen=True)
class Part:
    """A parameter, its name in the model, the name of its block (None outside of all blocks), and one of `KINDS`."""

    name: str
    parameter: nn.Parameter
    block: str | None
    kind: str


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost modules, by name, that hold a layer of this library as attention, SSM or moving average."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if _is_block(module) and not any(_inside(name, outer) for outer in found):
            found[name] = module
    return found


def parts(model: nn.Module) -> list[Part]:
    """Every parameter of a model once."""
    found = blocks(model)
    result = []
    for name, parameter in model.named_parameters():
        block = next((outer for outer in found if _inside(name, outer)), None)
        if block is None:
            result.append(Part(name, parameter, None, "embedding/other"))
        else:
            result.append(Part(name, parameter, block, _kind(found[block], name[len(block) :].strip("."))))
    return result


def gates(model: nn.Module) -> Iterator[Gate]:
    """Every gate that is computed by a linear layer."""
    for block_name, block in blocks(model).items():
        for name, module in block.named_modules(prefix=block_name):
            for attribute in (*OUTPUT_GATES, *ATTENTION_GATES):
                layer = module._modules.get(attribute)
                if isinstance(layer, nn.Linear):
                    yield Gate(_join(name, attribute), module, layer, attribute in OUTPUT_GATES)
            fused = module._modules.get(_FUSED)
            if isinstance(fused, nn.Linear) and hasattr(module, "d_attn"):
                reset = module.d_model + module.d_attn
                yield Gate(_join(name, _FUSED, "update_gate"), module, fused, True, slice(0, module.d_model))
                columns = slice(reset, reset + module.d_value)
                yield Gate(_join(name, _FUSED, "reset_gate"), module, fused, False, columns)


def _is_block(module: nn.Module) -> bool:
    if isinstance(module, _CONTAINERS):
        return False
    if isinstance(module, (S4DBlock, TransformerBlock)):
        return True
    children = module._modules.items()
    return any(isinstance(child, CodebookAttention) for _, child in children) or any(
        attribute in _MIXERS
        and isinstance(child, nn.Module)
        and not isinstance(child, _CONTAINERS)
        and _has_ours(child)
        for attribute, child in children
    )


def _has_ours(module: nn.Module) -> bool:
    package = __name__.partition(".")[0]
    return any(type(child).__module__.partition(".")[0] == package for child in module.modules())


def _join(*names: str) -> str:
    return ".".join(filter(None, names))


def _inside(name: str, outer: str) -> bool:
    return not outer or name == outer or name.startswith(outer + ".")


def _kind(block: nn.Module, path: str) -> str:
    # From the block inwards. What is inside the attention may still be its keys; the rest is settled at first sight.
    kind, module = "embedding/other", block
    for attribute in path.split("."):
        here = _KIND_OF.get(attribute)
        child = module._modules.get(attribute)
        if attribute == "out_proj" and kind == "embedding/other" and not _attends(module):
            here = "ssm"  # what mixes the channels of an SSM
        if hasattr(type(child), "slow_parameters"):
            here = "ssm"
        elif isinstance(child, FeedForward):
            here = "feed-forward"
        kind = here or kind
        if kind not in ("attention", "embedding/other") or child is None:
            break
        module = child
    return kind


def _attends(module: nn.Module) -> bool:
    return any(name in module._modules for name in (*_ATTENTIONS, "qkv_proj")) or any(
        isinstance(child, CodebookAttention) for child in module.modules()
    )
