"""Nearest-codeword search on the CPU: the native kernel against torch's matmul + argmax.

Both compute argmax_s (k.C_s - ||C_s||^2 / 2). The rate counts the 2 L S D operations of the product alone, and is set
against torch's own float32 matrix product, measured in the same rounds.
"""

import argparse
import sys
from collections.abc import Callable

import torch

from longvq_layers import _extension, ops
from longvq_layers.benchmarks import results
from longvq_layers.benchmarks.timing import interleaved_medians

MATMUL_SIZE = 2048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--heads", type=int, default=8, help="default %(default)s")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384], help="default %(default)s")
    parser.add_argument("--codes", type=int, nargs="+", default=[256, 512], help="default %(default)s")
    parser.add_argument("--width", type=int, default=64, help="key width D, default %(default)s")
    parser.add_argument("--repeats", type=int, default=7, help="rounds, default %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default %(default)s")


def run(args: argparse.Namespace) -> None:
    if not _extension.is_loaded():
        sys.exit(f"there is no native kernel to measure: {_extension.load_error()}")
    torch.set_num_threads(args.threads)
    print(
        f"{results.machine(args.threads)}; float32, B = 1, H = {args.heads}, D = {args.width}, "
        f"medians of {args.repeats} interleaved rounds.\n"
    )
    print("| L | S | matmul + argmax, ms | native, ms | speed-up | native, GFLOP/s | matmul, GFLOP/s | share of it |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for length in args.lengths:
        for codes in args.codes:
            print(_row(args.heads, length, codes, args.width, args.repeats), flush=True)


def _row(heads: int, length: int, codes: int, width: int, repeats: int) -> str:
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(1, heads, length, width, generator=generator)
    codebook = torch.randn(heads, codes, width, generator=generator)
    square = torch.randn(MATMUL_SIZE, MATMUL_SIZE, generator=generator)
    seconds = interleaved_medians({**calls(k, codebook, "native"), "matmul": lambda: square @ square}, repeats)
    rate = 2 * heads * length * codes * width / seconds["ours"] / 1e9
    peak = 2 * MATMUL_SIZE**3 / seconds["matmul"] / 1e9
    plain, ours = seconds["matmul + argmax"], seconds["ours"]
    return (
        f"| {length} | {codes} | {plain * 1e3:.1f} | {ours * 1e3:.1f} "
        f"| {plain / ours:.1f}x | {rate:.0f} | {peak:.0f} | {rate / peak:.0%} |"
    )


def calls(k: torch.Tensor, codebook: torch.Tensor, backend: str) -> dict[str, Callable[[], torch.Tensor]]:
    """Calls "ours" and "matmul + argmax", checked to give the same."""
    half_squares = codebook.square().sum(-1).mul(0.5).unsqueeze(-2)

    def ours() -> torch.Tensor:
        return ops.vq_assign(k, codebook, backend=backend)

    def plain() -> torch.Tensor:
        return (k @ codebook.mT - half_squares).argmax(-1)

    _check_equal(k, codebook, ours(), plain())
    return {"ours": ours, "matmul + argmax": plain}


def _check_equal(k: torch.Tensor, codebook: torch.Tensor, ours: torch.Tensor, baseline: torch.Tensor) -> None:
    """Equal codes, or codes whose float64 distances to the key agree to the rounding of a float32 score."""
    b, h, i = (ours != baseline).nonzero(as_tuple=True)
    keys = k[b, h, i].double()
    ours_distance = (keys - codebook[h, ours[b, h, i]].double()).square().sum(-1)
    baseline_distance = (keys - codebook[h, baseline[b, h, i]].double()).square().sum(-1)
    torch.testing.assert_close(ours_distance, baseline_distance, rtol=1e-5, atol=0.0)
