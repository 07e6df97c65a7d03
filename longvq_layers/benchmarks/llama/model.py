"""A byte Llama that the benchmark trains: 4 layers, width 192, grouped queries, source of the standard library.

Half of its texts give a key, one of 16 bytes, and ask for it again, so that it learns to recall from its context.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from longvq_layers.benchmarks.llama.texts import ASK, mixed
from longvq_layers.layers import commitment_loss
from longvq_layers.tasks.python_source import bits_per_byte

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, MistralForCausalLM

TRAINED_LENGTH = 512
SIZES: dict[str, Any] = {
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
    """The model in `folder`; if there is none, it is trained for `steps` steps of 8 x 512 bytes and saved there."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if (folder / "config.json").exists():
        return LlamaForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    train(model, lambda step: mixed(TRAINED_LENGTH, step), steps, lr=2e-3, say=say)
    model.save_pretrained(folder)
    return model.eval()


def window_only(model: "LlamaForCausalLM", window: int) -> "MistralForCausalLM":
    """The same weights as a Mistral, whose attention sees only the last `window` positions."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(**SIZES, sliding_window=window, head_dim=model.config.head_dim)
    other = MistralForCausalLM(config)
    other.load_state_dict(model.state_dict())
    return other.eval()


def train(
    model: nn.Module, batch: Callable[[int], Tensor], steps: int, *, lr: float, say: Callable[[str], None]
) -> None:
    """Train with AdamW, a warm-up and a cosine; the model is in eval mode afterwards.

    The loss on keys counts as much as the loss on all bytes. With less weight the few keys would hardly be learned.

    Args:
        model: a causal language model of bytes.
        batch: step -> (B, L + 1) bytes.
        steps: optimiser steps.
        lr: peak learning rate.
        say: gets a line every 100 steps.
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
        text, key = losses.mean(), losses[inputs == ASK].mean()
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
    """How well a model predicts the last bytes of texts, one text at a time.

    Args:
        model: a causal language model of bytes.
        tokens: (N, L + 1) texts.
        last: how many bytes count.

    Returns:
        Bits per byte, and the share of texts whose last bytes are all right: each the likeliest, given the bytes
        before it.
    """
    total, right = 0.0, 0
    for row in tokens:
        logits = model(row[None, :-1], use_cache=False, logits_to_keep=last).logits[0]
        total += nn.functional.cross_entropy(logits, row[-last:]).item()
        right += int((logits.argmax(-1) == row[-last:]).all())
    return bits_per_byte(total / len(tokens)), right / len(tokens)
