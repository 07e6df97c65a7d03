"""The targets of attention, and whether a run met them."""

from collections.abc import Iterator

from longvq_layers.benchmarks.attention.problem import Sizes
from longvq_layers.benchmarks.attention.rows import (
    PEERS,
    Row,
    beside,
    by_length,
    decoded,
    find,
    memory_multiple,
    peer_of,
)
from longvq_layers.benchmarks.common.break_even import faster_from
from longvq_layers.benchmarks.common.memory import NOT_READABLE
from longvq_layers.benchmarks.common.results import met

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

Target = tuple[str, str, str, str]
"""What, asked, measured, verdict."""


def targets(rows: list[Row], sizes: Sizes) -> Iterator[Target]:
    """A line for every target whose size was measured."""
    for (case, form, length), least in SPEED_TARGETS.items():
        ours = find(rows, case, form, length)
        if ours is None or not ours.timed:
            continue
        label, peer = f"{case}, {form}, L = {length}, against {PEERS[case]}", peer_of(rows, ours)
        if peer is None:
            yield label, f"≥ {least}x", "", "not measured"
        else:
            factor = peer.seconds / ours.seconds
            yield label, f"≥ {least}x", f"{factor:.2f}x", met(factor >= least)
    for ours in (row for row in rows if row.case == "assign" and row.method == "ours"):
        share = ours.gflops / beside(rows, ours, "matmul").gflops
        label = f"assign, L = {ours.L}, share of the matrix product's GFLOP/s"
        yield label, f"≥ {ASSIGN_RATE_TARGET:.0%}", f"{share:.0%}", met(share >= ASSIGN_RATE_TARGET)
    yield from _decode_targets(rows)
    for row in (row for row in rows if row.case in MEMORY_TARGETS):
        label, most = f"{row.case}, {row.form}, L = {row.L}, over the bytes of v", MEMORY_TARGETS[row.case]
        if row.extra_bytes is None:
            yield label, f"≤ {most}x", NOT_READABLE, "not measured"
        else:
            multiple = memory_multiple(row.extra_bytes, row.L, sizes)
            yield label, f"≤ {most}x", f"{multiple:.2f}x", met(multiple <= most)
    for form, most in BREAK_EVEN_TARGETS.items():
        if compared := speed_ups(rows, form):
            start = faster_from(*compared)
            measured = "slower at the longest" if start is None else f"{start:,}"
            verdict = met(start is not None and start <= most)
            yield f"ours is faster forward, {form}, from L", f"≤ {most:,}", measured, verdict


def _decode_targets(rows: list[Row]) -> Iterator[Target]:
    ours, peers = [row.seconds for row in decoded(rows)], decoded(rows, "sdpa")
    if not ours or not peers:
        return
    peer = peers[0]
    factor, spread = peer.seconds / max(ours), max(ours) / min(ours)
    label = f"decode, slowest position, against sdpa over {peer.L:,} keys"
    yield label, f"≥ {DECODE_TARGET}x", f"{factor:.1f}x", met(factor >= DECODE_TARGET)
    label = "decode, time over all positions, max / min"
    yield label, f"≤ {POSITION_TARGET}x", f"{spread:.2f}x", met(spread <= POSITION_TARGET)


def speed_ups(rows: list[Row], form: str) -> tuple[list[int], list[float]] | None:
    """Lengths at which ours and the peer were timed, with the speed-ups.

    None with fewer than two lengths, or without one below the target: there is then nothing to interpolate.
    """
    pairs = [(ours, peer) for ours in by_length(rows, form, "ours") if (peer := peer_of(rows, ours)) is not None]
    if len(pairs) < 2 or min(BREAK_EVEN_TARGETS.values()) <= pairs[0][0].L:
        return None
    return [ours.L for ours, _ in pairs], [peer.seconds / ours.seconds for ours, peer in pairs]
