"""Part 2: one architecture, random weights, with its own fused attention and with ours, over lengths."""

import copy
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from longvq_layers.benchmarks import break_even
from longvq_layers.demo import memory
from longvq_layers.demo.settings import SpeedResult, SpeedRow, SpeedSettings
from longvq_layers.replace import replace_attention

_VOCABULARY = 1000


def run(settings: SpeedSettings, say: Callable[[str], None]) -> SpeedResult:
    """Time and memory of one forward in inference mode, batch of one, at every length."""
    own, ours = build(settings)
    rows = []
    for length in settings.lengths:
        ids = tokens(length)
        outputs, (own_seconds, our_seconds) = _interleaved((own, ours), ids, settings)
        cosine = nn.functional.cosine_similarity(*outputs, dim=-1).mean().item()
        rows.append(SpeedRow(length, own_seconds, our_seconds, cosine))
        say(
            f"length {length:>6,}: {own_seconds * 1e3:8.1f} ms own attention, {our_seconds * 1e3:8.1f} ms ours, "
            f"{rows[-1].speed_up:.2f}x as fast"
        )
    say("peak memory: the same forwards in a process of their own")
    peaks = memory.measure(settings, torch.get_num_threads())
    rows = [
        SpeedRow(row.length, row.own_seconds, row.our_seconds, row.cosine, *peaks.get(row.length, (None, None)))
        for row in rows
    ]
    width = settings.hidden // settings.heads
    name = f"BERT, {settings.layers} layers, width {settings.hidden}, {settings.heads} heads of {width}, random weights"
    return SpeedResult(name, settings.num_codes, settings.window, rows)


def build(settings: SpeedSettings) -> tuple[nn.Module, nn.Module]:
    """The same model twice: with its own attention, and with ours calibrated on random tokens."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=_VOCABULARY,
        hidden_size=settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        intermediate_size=4 * settings.hidden,
        max_position_embeddings=max(*settings.lengths, settings.calibration_tokens),
        attn_implementation="sdpa",
    )
    own = BertModel(config, add_pooling_layer=False).eval()
    ours = copy.deepcopy(own)
    calibration = [tokens(settings.calibration_tokens)]
    replace_attention(ours, num_codes=settings.num_codes, window=settings.window, calibration=calibration)
    return own, ours


def tokens(length: int) -> Tensor:
    """(1, length) random token ids, the same on every call."""
    return torch.randint(_VOCABULARY, (1, length), generator=torch.Generator().manual_seed(length))


def faster_from(rows: list[SpeedRow]) -> int | None:
    """The length at which ours becomes and stays faster, interpolated between measured lengths; None: never."""
    return break_even.faster_from([row.length for row in rows], [row.speed_up for row in rows])


@torch.inference_mode()
def _interleaved(models: tuple[nn.Module, nn.Module], ids: Tensor, settings: SpeedSettings):
    # Turn and turn about, so that other load on the machine hits both; the first round is a warm-up.
    start = time.perf_counter()
    outputs = [model(ids).last_hidden_state for model in models]
    rounds = int(settings.seconds_per_length / (time.perf_counter() - start))
    seconds: list[list[float]] = [[], []]
    for _ in range(min(max(rounds, 3), settings.most_repeats)):
        for index, model in enumerate(models):
            start = time.perf_counter()
            model(ids)
            seconds[index].append(time.perf_counter() - start)
    return outputs, [statistics.median(times) for times in seconds]
