"""The byte classifiers that the benchmark of a training step compares."""

from typing import NamedTuple

import torch

from longvq_layers.models import SequenceClassifier, SequenceEncoder

_CLASSES = 10


class Block(NamedTuple):
    """A block of a `SequenceEncoder` with its options."""

    name: str
    options: dict[str, object]
    d_ff: int  # for d_model = 256; chosen so that all models have about as many parameters


class Sizes(NamedTuple):
    """Sizes that all models share."""

    d_model: int
    depth: int
    num_codes: int
    window: int


MODELS: dict[str, Block] = {
    "longvq": Block("longvq", {}, 512),
    "longvq, recompute": Block("longvq", {"recompute": True}, 512),
    "fused": Block("transformer", {}, 1024),
    "dense": Block("transformer", {"attention": "dense"}, 1024),
}
OURS = ("longvq", "longvq, recompute")


def build(name: str, sizes: Sizes) -> SequenceClassifier:
    """The model of that name in `MODELS`."""
    torch.manual_seed(0)
    block = MODELS[name]
    options = {**block.options, "d_ff": block.d_ff * sizes.d_model // 256}
    if block.name == "longvq":
        options |= {"num_codes": sizes.num_codes, "window": sizes.window}
    encoder = SequenceEncoder(
        num_inputs=256, d_model=sizes.d_model, depth=sizes.depth, block=block.name, block_options=options
    )
    return SequenceClassifier(encoder, _CLASSES)
