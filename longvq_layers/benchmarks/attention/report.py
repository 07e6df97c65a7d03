"""What the benchmark of attention prints: tables, targets, the break-even length."""

from longvq_layers.benchmarks.attention.problem import Sizes
from longvq_layers.benchmarks.attention.rows import PEERS, Row, beside, decoded, memory_multiple, peer_of
from longvq_layers.benchmarks.attention.targets import MEMORY_TARGETS, speed_ups, targets
from longvq_layers.benchmarks.common.break_even import faster_from
from longvq_layers.benchmarks.common.markdown import print_table
from longvq_layers.benchmarks.common.memory import NOT_READABLE

_COUNTED = {
    "memory of forward": "beyond q, k, v, codebook, bias and out",
    "memory of backward": "of backward alone, beyond inputs, out, dout, what forward saved and the gradients",
}

Cells = tuple[str, ...]


def print_report(rows: list[Row], sizes: Sizes, judged: bool) -> None:
    """Print all tables.

    Args:
        judged: whether the sizes are those of the targets.
    """
    timed = [row for row in rows if row.case in PEERS and row.method == "ours" and row.timed]
    timed.sort(key=lambda row: (list(PEERS).index(row.case), row.form, row.L))
    if timed:
        _print_times(rows, timed)
    if decoded(rows):
        _print_decoding(rows)
    if memory := [row for row in rows if row.case in MEMORY_TARGETS]:
        _print_memory(memory, sizes)
    print_table(
        "| target | asked | measured | |\n|:---|---:|---:|:---|",
        ((*target[:3], target[3] if judged else "not judged") for target in targets(rows, sizes)),
    )
    if rated := timed + [row for row in rows if row.case == "parts" and row.served]:
        _print_rates(rows, rated)
    for form in sizes.forms:
        if sentence := _break_even_sentence(rows, form.name):
            print(sentence)
    print("".join(f"\n{r.case}, {r.form}, L = {r.L}, {r.method}: {r.note}." for r in rows if r.note), flush=True)


def _print_times(rows: list[Row], timed: list[Row]) -> None:
    def cells(ours: Row) -> Cells:
        peer = peer_of(rows, ours)
        against = ("not timed", "") if peer is None else (_ms(peer), f"{peer.seconds / ours.seconds:.3g}x")
        return ours.case, ours.form, str(ours.L), ours.served, _ms(ours), PEERS[ours.case], *against

    print_table(
        "| case | form | L | ours is served by | ours, ms | peer | peer, ms | ours is faster by |\n"
        "|:---|:---|---:|:---|---:|:---|---:|---:|",
        map(cells, timed),
    )


def _print_decoding(rows: list[Row]) -> None:
    peer = decoded(rows, "sdpa")[0]

    def cells(row: Row) -> Cells:
        times = f"{row.seconds * 1e6:.1f}", f"{peer.seconds * 1e6:.1f}"
        return f"{row.L:,}", row.served, *times, f"{peer.seconds / row.seconds:.3g}x"

    print_table(
        f"| one token after | served by | ours, µs | sdpa over {peer.L:,} keys, µs | ours is faster by |\n"
        "|---:|:---|---:|---:|---:|",
        map(cells, decoded(rows)),
    )


def _print_memory(memory: list[Row], sizes: Sizes) -> None:
    def cells(row: Row) -> Cells:
        if row.extra_bytes is None:
            return row.case, row.form, str(row.L), NOT_READABLE, "", _COUNTED[row.case]
        multiple = f"{memory_multiple(row.extra_bytes, row.L, sizes):.2f}x"
        return row.case, row.form, str(row.L), f"{row.extra_bytes / 2**20:.2f}", multiple, _COUNTED[row.case]

    print_table(
        "| | form | L | extra, MiB | over the bytes of v | counted |\n|:---|:---|---:|---:|---:|:---|",
        map(cells, memory),
    )


def _print_rates(rows: list[Row], rated: list[Row]) -> None:
    def cells(row: Row) -> Cells:
        matmul, tiles, copy = (beside(rows, row, name) for name in ("matmul", "tiles", "copy"))
        name = row.case if row.method == "ours" else row.method
        return (
            *(name, row.form, str(row.L), f"{row.gflops:.1f}", f"{matmul.gflops:.1f}", f"{tiles.gflops:.1f}"),
            *(f"{row.gflops / matmul.gflops:.0%}", f"{row.gbytes:.2f}", f"{copy.gbytes:.2f}"),
            f"{row.gbytes / copy.gbytes:.0%}",
        )

    print_table(
        "| | form | L | ours, GFLOP/s | matmul, GFLOP/s | on tiles, GFLOP/s | share of matmul | ours, GB/s "
        "| copy, GB/s | share |\n|:---|:---|---:|---:|---:|---:|---:|---:|---:|---:|",
        map(cells, rated),
    )


def _break_even_sentence(rows: list[Row], form: str) -> str:
    compared = speed_ups(rows, form)
    if compared is None:
        return ""
    lengths, length = compared[0], faster_from(*compared)
    if length is None:
        return f"Forward, {form}: ours is slower at {lengths[-1]:,}, the longest at which both were timed."
    if length == lengths[0]:
        return f"Forward, {form}: ours is faster at every length measured, from {length:,} on."
    return f"Forward, {form}: ours is faster from L = {length:,} on, interpolated between measured lengths."


def _ms(row: Row) -> str:
    return f"{row.seconds * 1e3:.3f}"
