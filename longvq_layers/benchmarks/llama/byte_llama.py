"""A byte Llama that is trained here: 4 layers, width 192, grouped queries, on the source of the standard library.

Half of its texts give a key, a byte of 16, and ask for it again: it learns to recall what stands in its context.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from longvq_layers.layers import commitment_loss
from longvq_layers.tasks.base import Batch, stream
from longvq_layers.tasks.python_source import BytesLM, bits_per_byte

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, MistralForCausalLM

TRAINED_LENGTH = 512
KEYS, ASK = bytes(range(0x10, 0x20)), 0x0F  # control characters, which the source doesn't have
_SIZES = {
    "vocab_size": 256,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": TRAINED_LENGTH,
    "bos_token_id": None,
    "eos_token_id": None,
}


def trained(folder: Path, steps: int, say: Callable[[str], None]) -> "LlamaForCausalLM":
    """The model in `folder`, after `steps` steps of 8 x 512 bytes; trained and written there if it isn't yet."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if (folder / "config.json").exists():
        return LlamaForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**_SIZES))
    train(model, lambda step: mixed(TRAINED_LENGTH, step), steps, lr=2e-3, say=say)
    model.save_pretrained(folder)
    return model.eval()


def window_only(model: "LlamaForCausalLM", window: int) -> "MistralForCausalLM":
    """The same weights with attention to the last `window` positions, as Mistral has it, and nothing beyond."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(**_SIZES, sliding_window=window, head_dim=model.config.head_dim)
    other = MistralForCausalLM(config)
    other.load_state_dict(model.state_dict())
    return other.eval()


def train(
    model: nn.Module, batch: Callable[[int], Tensor], steps: int, *, lr: float, say: Callable[[str], None]
) -> None:
    """AdamW with warm-up and a cosine. All keys that are asked for count as much as all bytes. Leaves it in eval mode.

    Args:
        batch: gives (B, L + 1) bytes for each step.
    """
    model.train()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    for step in range(steps):
        tokens = batch(step)
        logits = model(tokens[:, :-1], use_cache=False).logits
        inputs, targets = tokens[:, :-1].flatten(), tokens[:, 1:].flatten()
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="none")
        text, key = losses.mean(), losses[inputs == ASK].mean()  # which are few: else they would hardly be learned
        loss = text + key + commitment_loss(model)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99 or step == steps - 1:
            bits = [bits_per_byte(loss.item()) for loss in (text, key)]
            say(f"step {step + 1} of {steps}: {bits[0]:.3f} bits per byte, {bits[1]:.3f} a key")
    model.eval()


@torch.no_grad()
def score(model: nn.Module, tokens: Tensor, last: int) -> tuple[float, float]:
    """Bits per byte of the last bytes of (N, L + 1) texts, and the share of texts of which it has all these right.

    A byte is right if it is the likeliest, given all before it. One text at a time.
    """
    total, right = 0.0, 0
    for row in tokens:
        logits = model(row[None, :-1], use_cache=False, logits_to_keep=last).logits[0]
        total += nn.functional.cross_entropy(logits, row[-last:]).item()
        right += int((logits.argmax(-1) == row[-last:]).all())
    return bits_per_byte(total / len(tokens)), right / len(tokens)


def drawn(length: int, count: int, step: int) -> Tensor:
    """(count, length + 1) bytes of training source, others at every step."""
    return _with_target(BytesLM(length=length).batch("train", step, count))


def windows(length: int, count: int, split: str = "val") -> Tensor:
    """(count, length + 1) bytes of source, spread over a split."""
    if split == "train":
        return drawn(length, count, 0)
    task = BytesLM(length=length)
    step = max(1, task.size(split) // count)
    return torch.cat([_with_target(task.batch(split, number * step, 1)) for number in range(count)])


def _with_target(batch: Batch) -> Tensor:
    return torch.cat([batch.inputs, batch.targets[:, -1:]], dim=1)


def recall(length: int, count: int, split: str, seed: int, *, asked: int) -> Tensor:
    """(count, length + 1) bytes of source that give a key, one of 16, near the front and ask for it `asked` times.

    The questions are spread evenly and the last one ends the text, with the key.
    """
    generator = stream("byte-llama-recall", split, length, seed)
    task = BytesLM(length=length)
    text = _with_target(task.batch(split, int(torch.randint(10_000, (), generator=generator)), count))
    for row in text:
        key = KEYS[int(torch.randint(len(KEYS), (), generator=generator))]
        given, question = (torch.tensor([*text, key, 10]) for text in (b"\nKEY = ", b"\nassert KEY == " + bytes([ASK])))
        start = int(torch.randint(length // 8, (), generator=generator))
        row[start : start + len(given)] = given
        for end in torch.linspace(start + len(given), len(row) + 1, asked + 1)[1:].int().tolist():
            row[end - len(question) : end] = question[: len(row) - end + len(question)]
    return text


def mixed(length: int, step: int) -> Tensor:
    """(8, length + 1) bytes to train on: four texts of source, four that ask for a key, from once to twelve times."""
    keys = [recall(length, 1, "train", 4 * step + i, asked=asked) for i, asked in enumerate((1, 3, 6, 12))]
    return torch.cat([drawn(length, 4, step), *keys])
