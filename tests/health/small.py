"""Tiny models of every kind of block, and a short training on associative recall."""

import torch
from torch import Tensor, nn

from longvq_layers import commitment_loss, optimizer_groups, tasks
from longvq_layers.models import BLOCKS, SequenceEncoder, SequenceLM
from longvq_layers.train.evaluation import loss_of

KINDS = tuple(BLOCKS)
VOCAB, WIDTH = 32, 16
OPTIONS = {
    "longvq": {"num_codes": 8, "window": 8, "d_state": 8},
    "mega": {"ema_dim": 4},
    "spade": {"num_heads": 2, "window": 8, "d_state": 8},
    "s4d": {"d_state": 8},
    "transformer": {"num_heads": 2},
}
TASK = tasks.get("mqar", length=32, pairs=4, vocab=VOCAB)


def build(kind: str = "longvq", *, depth: int = 3, gradient_checkpointing: bool = False, **options) -> nn.Module:
    encoder = SequenceEncoder(
        num_inputs=VOCAB,
        d_model=WIDTH,
        depth=depth,
        block=kind,
        causal=True,
        gradient_checkpointing=gradient_checkpointing,
        block_options=OPTIONS[kind] | options,
    )
    return SequenceLM(encoder, VOCAB)


def blocks(model: nn.Module) -> nn.ModuleList:
    return model.encoder.backbone.blocks


def name(layer: int, *path: str) -> str:
    return ".".join(["encoder.backbone.blocks", str(layer), *path])


def tokens(batch: int = 2, length: int = 20) -> Tensor:
    return torch.randint(VOCAB, (batch, length))


def train(model: nn.Module, steps: int, monitor=None) -> None:
    """Train on associative recall; the gradients of the last step are kept."""
    optimizer = torch.optim.AdamW(optimizer_groups(model, lr=3e-3, weight_decay=0.01))
    for step in range(steps):
        batch = TASK.batch("train", step, 8)
        loss = loss_of(model(batch.inputs), batch.targets)
        optimizer.zero_grad()
        (loss + commitment_loss(model)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if monitor is not None:
            monitor.after_backward(loss)
        optimizer.step()
