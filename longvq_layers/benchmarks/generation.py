"""Time per token and memory of generation with a replaced Llama, against the model's own growing cache.

A random Llama (4 layers, width 512, 8 query heads, 2 key-value heads of 64) has read a context and decodes token by
token. Its own cache is filled with as many random keys and values, because reading the context would need quadratic
attention; our cache reads the context. Before anything is timed, decoding with our cache is checked to give the logits
of the full forward. Prints Markdown, writes results.csv and generation.png.
"""

import argparse
import copy
import statistics
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from longvq_layers.benchmarks.common import arguments, plot, results
from longvq_layers.benchmarks.common.markdown import line
from longvq_layers.benchmarks.common.results import say
from longvq_layers.replace import replace_attention

if TYPE_CHECKING:
    from transformers import DynamicCache

_TOLERANCE = 1e-3  # of logits of size 1


@dataclass(frozen=True)
class Row:
    """One context length."""

    context: int
    own_ms: float  # median of a token
    ours_ms: float
    own_bytes: int  # of the cache
    ours_bytes: int
    prefill_seconds: float  # ours, the whole context


def add_arguments(parser: argparse.ArgumentParser) -> None:
    lengths = [1024, 4096, 16384, 65536]
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths, metavar="L", help="default %(default)s")
    parser.add_argument("--codes", type=int, default=512, help="default %(default)s")
    parser.add_argument("--window", type=int, default=256, help="default %(default)s")
    parser.add_argument("--tokens", type=int, default=32, help="timed at each length, default %(default)s")
    arguments.add_threads(parser)
    arguments.add_out(parser, "generation_benchmark")


def run(args: argparse.Namespace) -> None:
    if min(args.tokens, args.threads, args.codes, *args.lengths) < 1 or args.window < 0:
        sys.exit("--tokens, --threads, --codes and --lengths must be at least 1, --window at least 0")
    torch.set_num_threads(args.threads)
    print(
        f"{results.machine(args.threads)}; float32, batch 1, {args.codes} codes, window {args.window}, medians of "
        f"{args.tokens} tokens, the two taking turns.\n"
    )
    own, ours = _models(args.codes, args.window)
    error = check(ours, min(args.lengths))
    print(f"Logits with the cache against the full forward: at most {error:.1e} apart.\n")
    rows = [_measure(own, ours, length, args.tokens) for length in args.lengths]
    print("\n".join(report(rows)), flush=True)
    results.write("generation", args.out, rows, _panels(rows), threads=args.threads, torch=torch.__version__)


def _models(codes: int, window: int) -> tuple[nn.Module, nn.Module]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "vocab_size": 256}
    config = LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=2, eos_token_id=None)
    own = LlamaForCausalLM(config).eval()
    ours = copy.deepcopy(own)
    replace_attention(ours, num_codes=codes, window=window, calibration=[torch.randint(256, (1, 2048))])
    return own, ours


@torch.no_grad()
def check(model: nn.Module, length: int) -> float:
    """The largest difference between the last token's logits, decoded with the cache and by the full forward.

    Raises:
        RuntimeError: the difference is more than rounding.
    """
    tokens = torch.randint(256, (1, min(length, 2048) + 1))
    cache = _named(_empty_cache(model))
    model(tokens[:, :-1], **cache)
    error = (model(tokens[:, -1:], **cache).logits[0, -1] - model(tokens, use_cache=False).logits[0, -1]).abs().max()
    if not error < _TOLERANCE:
        raise RuntimeError(f"with the cache the logits are {error:.1e} from those of the full forward")
    return error.item()


@torch.no_grad()
def _measure(own: nn.Module, ours: nn.Module, length: int, tokens: int) -> Row:
    say(f"context = {length} …")
    config: Any = own.config
    growing: Any = _empty_cache(own)
    constant: Any = _empty_cache(ours)
    num_kv_heads, head_dim = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        growing.update(*torch.randn(2, 1, num_kv_heads, length, head_dim), layer)
    context = torch.randint(256, (1, length))
    start = time.perf_counter()
    ours(context, **_named(constant), logits_to_keep=1)
    prefill = time.perf_counter() - start
    times: dict[str, list[float]] = {"own": [], "ours": []}
    for number in range(tokens + 2):
        token = torch.randint(256, (1, 1))
        for name, model, cache in (("own", own, growing), ("ours", ours, constant)):
            start = time.perf_counter()
            model(token, **_named(cache))
            if number >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    own_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in growing.layers)
    ours_bytes = sum(layer.nbytes for layer in constant.layers)
    own_ms, ours_ms = statistics.median(times["own"]), statistics.median(times["ours"])
    return Row(length, own_ms, ours_ms, own_bytes, ours_bytes, prefill)


def _empty_cache(model: nn.Module) -> "DynamicCache":
    from transformers import DynamicCache

    config: Any = model.config
    return DynamicCache(config=config)


def _named(cache: "DynamicCache") -> dict[str, "DynamicCache"]:
    """The cache as the keyword argument that this version of transformers takes."""
    from longvq_layers.models.huggingface.cache_name import NAME

    return {NAME: cache}


def report(rows: list[Row]) -> list[str]:
    """Markdown: a table, and whether our cache and time stay constant."""
    lines = [
        "| context | own ms a token | ours ms a token | faster by | own cache MB | our cache MB | our prefill s |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        line(
            f"{row.context:,}",
            *(f"{row.own_ms:.2f}", f"{row.ours_ms:.2f}", f"{row.own_ms / row.ours_ms:.2f}x"),
            *(f"{row.own_bytes / 1e6:.2f}", f"{row.ours_bytes / 1e6:.2f}", f"{row.prefill_seconds:.2f}"),
        )
        for row in rows
    ]
    first, last = rows[0], rows[-1]
    same = "yes" if first.ours_bytes == last.ours_bytes else "NO"
    lines += [
        "",
        f"Memory at {last.context:,} equal to that at {first.context:,}: {same}; "
        f"time per token {last.ours_ms / first.ours_ms:.2f}x (own: {last.own_ms / first.own_ms:.2f}x).",
    ]
    return lines


def _panels(rows: list[Row]) -> list[plot.Panel]:
    """A panel of time and one of memory, over the context."""
    contexts = [row.context for row in rows]
    times = {
        "replaced": plot.Line(contexts, [row.ours_ms for row in rows], plot.OURS),
        "own cache": plot.Line(contexts, [row.own_ms for row in rows], plot.AMBER),
    }
    caches = {
        "replaced": plot.Line(contexts, [row.ours_bytes * 1e-6 for row in rows], plot.OURS),
        "own cache": plot.Line(contexts, [row.own_bytes * 1e-6 for row in rows], plot.AMBER),
    }
    return [
        plot.lines(times, "ms a token", logarithmic=True),
        plot.lines(caches, "cache, MB", logarithmic=True),
    ]
