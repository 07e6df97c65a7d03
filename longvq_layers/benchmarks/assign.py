"""Nearest-codeword search on the CPU: the native kernel against torch's matmul + argmax.

Both compute argmax_s (k·C_s − ‖C_s‖²/2). The rate counts the 2 L S D operations of the product alone. It is compared
with the rate of torch's float32 matrix product, measured in the same rounds.
"""

import argparse
import sys

import torch
from torch import Tensor

from longvq_layers import _extension, ops
from longvq_layers.benchmarks.common import arguments, results
from longvq_layers.benchmarks.common.markdown import line
from longvq_layers.benchmarks.common.timing import Calls, interleaved_medians

MATMUL_SIZE = 2048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--heads", type=int, default=8, help="default %(default)s")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384], help="default %(default)s")
    parser.add_argument("--codes", type=int, nargs="+", default=[256, 512], help="default %(default)s")
    parser.add_argument("--width", type=int, default=64, help="size D of a key, default %(default)s")
    arguments.add_repeats(parser, 7)
    arguments.add_threads(parser)


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


def _row(num_heads: int, length: int, num_codes: int, head_dim: int, repeats: int) -> str:
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(1, num_heads, length, head_dim, generator=generator)
    codebook = torch.randn(num_heads, num_codes, head_dim, generator=generator)
    square = torch.randn(MATMUL_SIZE, MATMUL_SIZE, generator=generator)
    seconds = interleaved_medians({**calls(k, codebook, "native"), "matmul": lambda: square @ square}, repeats)
    rate = 2 * num_heads * length * num_codes * head_dim / seconds["ours"] / 1e9
    peak = 2 * MATMUL_SIZE**3 / seconds["matmul"] / 1e9
    plain, ours = seconds["matmul + argmax"], seconds["ours"]
    return line(
        length,
        num_codes,
        f"{plain * 1e3:.1f}",
        f"{ours * 1e3:.1f}",
        f"{plain / ours:.1f}x",
        f"{rate:.0f}",
        f"{peak:.0f}",
        f"{rate / peak:.0%}",
    )


def calls(k: Tensor, codebook: Tensor, backend: str) -> Calls:
    """The calls "ours" and "matmul + argmax", after a check that both give the same codes."""
    half_squares = codebook.square().sum(-1).mul(0.5).unsqueeze(-2)

    def ours() -> Tensor:
        return ops.vq_assign(k, codebook, backend=backend)

    def plain() -> Tensor:
        return (k @ codebook.mT - half_squares).argmax(-1)

    _check_equal(k, codebook, ours(), plain())
    return {"ours": ours, "matmul + argmax": plain}


def _check_equal(k: Tensor, codebook: Tensor, ours: Tensor, baseline: Tensor) -> None:
    """Codes are equal, or their float64 distances to the key agree up to the rounding of a float32 score."""
    b, h, i = (ours != baseline).nonzero(as_tuple=True)
    keys = k[b, h, i].double()
    ours_distance = (keys - codebook[h, ours[b, h, i]].double()).square().sum(-1)
    baseline_distance = (keys - codebook[h, baseline[b, h, i]].double()).square().sum(-1)
    torch.testing.assert_close(ours_distance, baseline_distance, rtol=1e-5, atol=0.0)
