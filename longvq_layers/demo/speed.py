"""Part 2: one architecture, random weights, with its own fused attention and with ours, over lengths."""

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from longvq_layers.benchmarks.common import break_even
from longvq_layers.benchmarks.common.timing import interleaved_medians
from longvq_layers.demo import memory, random_bert
from longvq_layers.demo.results import SpeedResult, SpeedRow
from longvq_layers.demo.settings import SpeedSettings


def run(settings: SpeedSettings, say: Callable[[str], None]) -> SpeedResult:
    """Time and memory of one forward in inference mode, batch of one, at every length."""
    own, ours = random_bert.build(settings)
    rows = []
    for length in settings.lengths:
        ids = random_bert.tokens(length)
        outputs, (own_seconds, our_seconds) = _interleaved((own, ours), ids, settings)
        cosine = nn.functional.cosine_similarity(outputs[0], outputs[1], dim=-1).mean().item()
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
    head_dim = settings.hidden // settings.heads
    heads = f"{settings.heads} heads of {head_dim}"
    name = f"BERT, {settings.layers} layers, width {settings.hidden}, {heads}, random weights"
    return SpeedResult(name, settings.num_codes, settings.window, rows)


def faster_from(rows: list[SpeedRow]) -> int | None:
    """The length from which ours is faster at every longer one, interpolated between measured lengths; None: never."""
    return break_even.faster_from([row.length for row in rows], [row.speed_up for row in rows])


@torch.inference_mode()
def _interleaved(
    models: tuple[nn.Module, nn.Module], ids: Tensor, settings: SpeedSettings
) -> tuple[list[Tensor], list[float]]:
    """Last hidden states and median seconds of both models.

    The models take turns, so that other load on the machine slows both. The first round is a warm-up.
    """
    start = time.perf_counter()
    outputs = [model(ids).last_hidden_state for model in models]
    rounds = int(settings.seconds_per_length / (time.perf_counter() - start))
    calls = {str(index): partial(model, ids) for index, model in enumerate(models)}
    medians = interleaved_medians(calls, min(max(rounds, 3), settings.most_repeats), warm_up=0)
    return outputs, list(medians.values())
