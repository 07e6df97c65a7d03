"""What the benchmark of attention prints: rows, tables, targets, the break-even length."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from longvq_layers.benchmarks.attention_cases import Sizes
from longvq_layers.benchmarks.break_even import faster_from
from longvq_layers.benchmarks.results import met

PEERS = {  # by case
    "forward": "sdpa",
    "forward + backward": "sdpa",
    "assign": "matmul + argmax",
    "bfloat16": "ours in float32",
}

# (case, form, length) -> least speed-up over the peer
SPEED_TARGETS = {
    ("forward", "bidirectional", 4096): 4.5,
    ("forward", "bidirectional", 16384): 18,
    ("forward", "causal", 4096): 2,
    ("forward", "causal", 16384): 8,
    ("forward + backward", "bidirectional", 16384): 12,
    ("forward + backward", "causal", 16384): 6,
    ("assign", "both", 16384): 3,
    ("bfloat16", "bidirectional", 16384): 1.5,
}
ASSIGN_RATE_TARGET = 0.7  # of the matrix product's rate, at least
MEMORY_TARGETS = {"memory of forward": 1, "memory of backward": 3}  # times the bytes of v, at most
DECODE_TARGET = 20  # least speed-up
# Longest over shortest time per token, at most: equal times differ by this much on a shared machine.
POSITION_TARGET = 1.2
BREAK_EVEN_TARGETS = {"bidirectional": 1024}  # at most

_COUNTED = {
    "memory of forward": "beyond q, k, v, codebook, bias and out",
    "memory of backward": "of backward alone, beyond inputs, out, dout, what forward saved and the gradients",
}


@dataclass(frozen=True)
class Row:
    """One measurement. Rates of ours are those of the useful arithmetic (`attention_work.py`)."""

    case: str
    form: str
    L: int
    method: str
    seconds: float | None = None  # median of one call; of one token for "decode"
    rounds: int | None = None
    gflops: float | None = None
    gbytes: float | None = None
    extra_bytes: int | None = None
    served: str = ""  # the backend that did it
    note: str = ""


Target = tuple[str, str, str, str]  # what, asked, measured, verdict


def find(rows: Iterable[Row], case: str, form: str, length: int, method: str = "ours") -> Row | None:
    wanted = case, form, length, method
    return next((r for r in rows if (r.case, r.form, r.L, r.method) == wanted), None)


def peer_of(rows: Iterable[Row], ours: Row) -> Row | None:
    """The peer's row if it was timed."""
    peer = find(rows, ours.case, ours.form, ours.L, PEERS[ours.case])
    return peer if peer is not None and peer.seconds is not None else None


def by_length(rows: Iterable[Row], form: str, method: str) -> list[Row]:
    """Forward at every length at which a method was timed."""
    found = [r for r in rows if (r.case, r.form, r.method) == ("forward", form, method) and r.seconds is not None]
    return sorted(found, key=lambda row: row.L)


def print_report(rows: list[Row], sizes: Sizes, judged: bool) -> None:
    """All tables; `judged`: whether the sizes are those that the targets are for."""
    timed = [row for row in rows if row.case in PEERS and row.method == "ours" and row.seconds is not None]
    timed.sort(key=lambda row: (list(PEERS).index(row.case), row.form, row.L))
    if timed:
        _print_times(rows, timed)
    if decoded := [row for row in rows if row.case == "decode" and row.method == "ours"]:
        _print_decoding(rows, decoded)
    if memory := [row for row in rows if row.case in MEMORY_TARGETS]:
        _print_memory(memory, sizes)
    _print_table(
        "| target | asked | measured | |\n|:---|---:|---:|:---|",
        ((*target[:3], target[3] if judged else "not judged") for target in targets(rows, sizes)),
    )
    if rated := timed + [row for row in rows if row.case == "parts" and row.served]:
        _print_rates(rows, rated)
    for form in sizes.forms:
        if sentence := _break_even_sentence(rows, form.name):
            print(sentence)
    print("".join(f"\n{r.case}, {r.form}, L = {r.L}, {r.method}: {r.note}." for r in rows if r.note), flush=True)


def _print_table(head: str, lines: Iterable[tuple[str, ...]]) -> None:
    print(head)
    for line in lines:
        print("| " + " | ".join(line) + " |")
    print()


def _print_times(rows: list[Row], timed: list[Row]) -> None:
    def line(ours: Row) -> tuple[str, ...]:
        peer = peer_of(rows, ours)
        against = ("not timed", "") if peer is None else (_ms(peer), f"{peer.seconds / ours.seconds:.3g}x")
        return ours.case, ours.form, str(ours.L), ours.served, _ms(ours), PEERS[ours.case], *against

    _print_table(
        "| case | form | L | ours is served by | ours, ms | peer | peer, ms | ours is faster by |\n"
        "|:---|:---|---:|:---|---:|:---|---:|---:|",
        map(line, timed),
    )


def _print_decoding(rows: list[Row], decoded: list[Row]) -> None:
    peer = next(row for row in rows if row.case == "decode" and row.method == "sdpa")

    def line(row: Row) -> tuple[str, ...]:
        times = f"{row.seconds * 1e6:.1f}", f"{peer.seconds * 1e6:.1f}"
        return f"{row.L:,}", row.served, *times, f"{peer.seconds / row.seconds:.3g}x"

    _print_table(
        f"| one token after | served by | ours, µs | sdpa over {peer.L:,} keys, µs | ours is faster by |\n"
        "|---:|:---|---:|---:|---:|",
        map(line, decoded),
    )


def _print_memory(memory: list[Row], sizes: Sizes) -> None:
    def line(row: Row) -> tuple[str, ...]:
        if row.extra_bytes is None:
            return row.case, row.form, str(row.L), "not readable here", "", _COUNTED[row.case]
        multiple = f"{memory_multiple(row, sizes):.2f}x"
        return row.case, row.form, str(row.L), f"{row.extra_bytes / 2**20:.2f}", multiple, _COUNTED[row.case]

    _print_table(
        "| | form | L | extra, MiB | over the bytes of v | counted |\n|:---|:---|---:|---:|---:|:---|",
        map(line, memory),
    )


def _print_rates(rows: list[Row], rated: list[Row]) -> None:
    def line(row: Row) -> tuple[str, ...]:
        matmul, tiles, copy = (find(rows, row.case, row.form, row.L, name) for name in ("matmul", "tiles", "copy"))
        name = row.case if row.method == "ours" else row.method
        return (
            *(name, row.form, str(row.L), f"{row.gflops:.1f}", f"{matmul.gflops:.1f}", f"{tiles.gflops:.1f}"),
            *(f"{row.gflops / matmul.gflops:.0%}", f"{row.gbytes:.2f}", f"{copy.gbytes:.2f}"),
            f"{row.gbytes / copy.gbytes:.0%}",
        )

    _print_table(
        "| | form | L | ours, GFLOP/s | matmul, GFLOP/s | on tiles, GFLOP/s | share of matmul | ours, GB/s "
        "| copy, GB/s | share |\n|:---|:---|---:|---:|---:|---:|---:|---:|---:|---:|",
        map(line, rated),
    )


def targets(rows: list[Row], sizes: Sizes) -> Iterator[Target]:
    """Without a size that has a target, nothing."""
    for (case, form, length), least in SPEED_TARGETS.items():
        ours = find(rows, case, form, length)
        if ours is None or ours.seconds is None:
            continue
        label, peer = f"{case}, {form}, L = {length}, against {PEERS[case]}", peer_of(rows, ours)
        if peer is None:
            yield label, f"≥ {least}x", "", "not measured"
        else:
            factor = peer.seconds / ours.seconds
            yield label, f"≥ {least}x", f"{factor:.2f}x", met(factor >= least)
    for ours in (row for row in rows if row.case == "assign" and row.method == "ours"):
        share = ours.gflops / find(rows, ours.case, ours.form, ours.L, "matmul").gflops
        label = f"assign, L = {ours.L}, share of the matrix product's GFLOP/s"
        yield label, f"≥ {ASSIGN_RATE_TARGET:.0%}", f"{share:.0%}", met(share >= ASSIGN_RATE_TARGET)
    yield from _decode_targets(rows)
    for row in (row for row in rows if row.case in MEMORY_TARGETS):
        label, most = f"{row.case}, {row.form}, L = {row.L}, over the bytes of v", MEMORY_TARGETS[row.case]
        if row.extra_bytes is None:
            yield label, f"≤ {most}x", "not readable here", "not measured"
        else:
            multiple = memory_multiple(row, sizes)
            yield label, f"≤ {most}x", f"{multiple:.2f}x", met(multiple <= most)
    for form, most in BREAK_EVEN_TARGETS.items():
        if lengths := _compared(rows, form):
            length = faster_from(*lengths)
            measured = "slower at the longest" if length is None else f"{length:,}"
            yield f"ours is faster forward, {form}, from L", f"≤ {most:,}", measured, met((length or most + 1) <= most)


def _decode_targets(rows: list[Row]) -> Iterator[Target]:
    ours = [row.seconds for row in rows if row.case == "decode" and row.method == "ours"]
    peer = next((row for row in rows if row.case == "decode" and row.method == "sdpa"), None)
    if not ours or peer is None:
        return
    factor, spread = peer.seconds / max(ours), max(ours) / min(ours)
    label = f"decode, slowest position, against sdpa over {peer.L:,} keys"
    yield label, f"≥ {DECODE_TARGET}x", f"{factor:.1f}x", met(factor >= DECODE_TARGET)
    label = "decode, time over all positions, max / min"
    yield label, f"≤ {POSITION_TARGET}x", f"{spread:.2f}x", met(spread <= POSITION_TARGET)


def memory_multiple(row: Row, sizes: Sizes) -> float:
    return row.extra_bytes / (4 * sizes.heads * row.L * sizes.width)


def _compared(rows: list[Row], form: str) -> tuple[list[int], list[float]] | None:
    """Lengths at which both were timed, and how much faster ours is; None without the short ones, or only one."""
    pairs = [(row, peer_of(rows, row)) for row in by_length(rows, form, "ours")]
    pairs = [(ours, peer) for ours, peer in pairs if peer is not None]
    if len(pairs) < 2 or min(BREAK_EVEN_TARGETS.values()) <= pairs[0][0].L:
        return None
    return [ours.L for ours, _ in pairs], [peer.seconds / ours.seconds for ours, peer in pairs]


def _break_even_sentence(rows: list[Row], form: str) -> str:
    compared = _compared(rows, form)
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
