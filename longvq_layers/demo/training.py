"""Part 3: a byte language model of `LongVQBlock`s, trained from scratch on the source of the standard library."""

from collections.abc import Callable
from time import perf_counter

import torch
from torch import Tensor, nn

from longvq_layers import tasks
from longvq_layers.demo.results import TrainingPoint, TrainingResult
from longvq_layers.demo.settings import TrainingSettings
from longvq_layers.layers import LongVQBlock, commitment_loss, optimizer_groups
from longvq_layers.tasks.standard_library import bucket, library_files, top_level
from longvq_layers.train.evaluation import loss_of
from longvq_layers.train.schedule import Schedule


class ByteModel(nn.Module):
    """Embedding, causal `LongVQBlock`s, logits through the transposed embedding."""

    def __init__(self, settings: TrainingSettings) -> None:
        super().__init__()
        width = settings.d_model
        self.embedding = nn.Embedding(256, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.blocks = nn.ModuleList(
            LongVQBlock(
                width,
                num_codes=settings.num_codes,
                window=settings.window,
                d_state=settings.d_state,
                causal=True,
            )
            for _ in range(settings.blocks)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, text: Tensor) -> Tensor:
        """text (B, L) byte values -> logits (B, L, 256) of the next byte."""
        x = self.embedding(text) * self.embedding.embedding_dim**0.5
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.embedding.weight.T


def run(
    settings: TrainingSettings, say: Callable[[str], None], progress: Callable[[float], None] = lambda seconds: None
) -> TrainingResult:
    """Train for a fixed time; every few seconds measure bits per byte of files that training never sees."""
    torch.manual_seed(0)
    train, held_out = (_as_tensor(text) for text in source_bytes(settings.train_bytes, settings.held_out_bytes))
    model = ByteModel(settings)
    optimizer = torch.optim.AdamW(optimizer_groups(model, lr=settings.learning_rate, weight_decay=0.01))
    schedule = Schedule(optimizer, warmup=19)
    points = [TrainingPoint(0.0, 0, bits_per_byte(model, held_out, settings.length))]
    say(f"   0 s, step    0: {points[0].bits_per_byte:.3f} bits per byte on held-out files")

    step, trained, evaluate_at = 0, 0.0, settings.evaluate_every  # seconds of training, without evaluation
    while trained < settings.seconds:
        start = perf_counter()
        schedule.set_rates(step, trained / settings.seconds)
        starts = torch.randint(train.numel() - settings.length - 1, (settings.batch_size, 1))
        text = train[starts + torch.arange(settings.length + 1)]
        loss = loss_of(model(text[:, :-1]), text[:, 1:]) + commitment_loss(model)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        took = perf_counter() - start
        trained += took
        progress(took)
        if trained >= evaluate_at or trained >= settings.seconds:
            evaluate_at += settings.evaluate_every
            points.append(TrainingPoint(trained, step, bits_per_byte(model, held_out, settings.length)))
            say(f"{trained:4.0f} s, step {step:4}: {points[-1].bits_per_byte:.3f} bits per byte on held-out files")

    parameters = sum(parameter.numel() for parameter in model.parameters())
    name = (
        f"{settings.blocks} LongVQBlocks, width {settings.d_model}, {settings.num_codes} codes, window "
        f"{settings.window}, {parameters:,} parameters"
    )
    return TrainingResult(name, points, step * settings.batch_size * settings.length)


@torch.no_grad()
def bits_per_byte(model: nn.Module, text: Tensor, length: int) -> float:
    """Mean −log2 p(next byte); each byte of `text` is predicted from at most ``length`` bytes before it."""
    model.eval()
    rows = (text.numel() - 1) // length
    inputs, targets = text[: rows * length].view(rows, length), text[1 : rows * length + 1].view(rows, length)
    loss = loss_of(model(inputs), targets).item()
    model.train()
    return tasks.bits_per_byte(loss)


def source_bytes(train: int, held_out: int) -> tuple[bytes, bytes]:
    """At most ``train`` and ``held_out`` bytes of source; no top-level module or package serves both."""
    parts: dict[bool, list[bytes]] = {True: [], False: []}
    missing = {True: held_out, False: train}
    for path, name in library_files():
        is_held_out = bucket(top_level(name), 8) == 0
        if missing[is_held_out] > 0:
            text = path.read_bytes()
            if is_held_out:
                text = text[:4096]  # the beginnings of many files are more varied than all of one file
            parts[is_held_out].append(text[: missing[is_held_out]])
            missing[is_held_out] -= len(text)
        elif max(missing.values()) <= 0:
            break
    return b"".join(parts[False]), b"".join(parts[True])


def _as_tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
