"""What the benchmark of the scan writes: rows, tables with targets, what bounds the time."""

from collections.abc import Iterable
from dataclasses import dataclass

from longvq_layers.benchmarks.results import met
from longvq_layers.benchmarks.ssm_peers import MODES

TIMED = ("forward", "forward + backward")
PEERS = ("vandermonde", "fft", "torch", "copy", "clone")

# (case, length) -> least speed-up over a peer
SPEED_TARGETS = {
    ("forward", 4096): {"vandermonde": 100, "fft": 4},
    ("forward", 16384): {"vandermonde": 200, "fft": 8},
    ("forward + backward", 4096): {"vandermonde": 40, "fft": 3},
}
STEP_TARGET = 50e-6  # seconds a token, at most
SCALING_TARGET = 1.3  # longest over shortest time per element, at most
MEMORY_TARGET = 3.0  # times the bytes of u, at most

# Multiply-adds of the plain recurrence per channel, step and complex mode. Forward: λx + u takes 4, Re(w x) takes 2.
# Backward: the states again (4: keeping them would take 2N times the memory of u), their gradients λβ + w·dy (6),
# du (1), dw (2) and dλ (4).
_MULTIPLY_ADDS = {"forward": 6, "step": 6, "scaling": 6, "forward + backward": 6 + 17}
# Arrays of the size of u that have to be read or written at least: u, y; u, y, dy, du.
_ARRAYS = {"forward": 2, "scaling": 2, "forward + backward": 4}


@dataclass(frozen=True)
class Row:
    """One measurement. Rates are GFLOP/s and GB/s of the plain recurrence, whatever the method itself computes."""

    case: str
    B: int
    H: int
    L: int
    method: str
    seconds: float | None = None  # median; of one call, of one token for "step"
    rounds: int | None = None
    gflops: float | None = None
    gbytes: float | None = None
    difference: float | None = None  # from ours, relative to the largest value
    extra_bytes: int | None = None
    note: str = ""


def work(case: str, batch: int, channels: int, length: int) -> tuple[float, float]:
    """Floating point operations and bytes that the plain recurrence needs."""
    elements = batch * channels * length
    flops = 2.0 * _MULTIPLY_ADDS[case] * elements * MODES
    # A step reads decay, weight and state and writes the state: complex64 all.
    return flops, 4.0 * 8 * elements * MODES if case == "step" else 4.0 * _ARRAYS[case] * elements


def find(rows: Iterable[Row], case: str, length: int | None = None, method: str = "ours") -> Row | None:
    return next((r for r in rows if r.case == case and r.method == method and length in (None, r.L)), None)


def print_report(rows: list[Row], judged: bool) -> None:
    """The Markdown tables and what bounds each case; `judged`: whether the sizes are those that the targets are for."""
    timed = [r for r in rows if r.case in TIMED and r.method == "ours"]
    print("| case | B | H | L | ours, ms | " + " | ".join(f"{p}, ms (ours is faster by)" for p in PEERS) + " |")
    print("|:---|---:|---:|---:|---:|" + "---:|" * len(PEERS))
    for ours in timed:
        cells = [_against(ours, find(rows, ours.case, ours.L, peer)) for peer in PEERS]
        print(
            f"| {ours.case} | {ours.B} | {ours.H} | {ours.L} | {ours.seconds * 1e3:.3f} | " + " | ".join(cells) + " |"
        )
    notes = [f"{r.case}, L = {r.L}, {r.method}: {r.note}." for r in rows if r.note]
    print("\n" + "\n".join(notes) + "\n" if notes else "")

    print("| target | asked | measured | |\n|:---|---:|---:|:---|")
    for what, asked, measured, verdict in _targets(rows):
        print(f"| {what} | {asked} | {measured} | {verdict if judged else 'not judged'} |")

    print("\n| case | L | ours, GFLOP/s | matmul, GFLOP/s | share | ours, GB/s | copy, GB/s | share |")
    print("|:---|---:|---:|---:|---:|---:|---:|---:|")
    for ours in timed:
        matmul, copy = (find(rows, ours.case, ours.L, name) for name in ("matmul", "copy"))
        print(
            f"| {ours.case} | {ours.L} | {ours.gflops:.1f} | {matmul.gflops:.1f} | {ours.gflops / matmul.gflops:.0%} "
            f"| {ours.gbytes:.2f} | {copy.gbytes:.2f} | {ours.gbytes / copy.gbytes:.0%} |"
        )
    print("\n" + "\n".join(_gap(rows, ours) for ours in timed), flush=True)


def _against(ours: Row, peer: Row | None) -> str:
    if peer is None or peer.seconds is None:
        return "skipped"
    return f"{peer.seconds * 1e3:.3f} ({peer.seconds / ours.seconds:.3g}x)"


def _targets(rows: list[Row]) -> Iterable[tuple[str, str, str, str]]:
    """Lines (what, asked, measured, met or not); without a size that has a target, the figure alone."""
    for ours in (r for r in rows if r.case in TIMED and r.method == "ours"):
        for peer, least in SPEED_TARGETS.get((ours.case, ours.L), {}).items():
            other = find(rows, ours.case, ours.L, peer)
            label = f"{ours.case}, L = {ours.L}, against {peer}"
            if other is None or other.seconds is None:
                yield label, f"≥ {least}x", "skipped", "not measured"
            else:
                factor = other.seconds / ours.seconds
                yield label, f"≥ {least}x", f"{factor:.1f}x", met(factor >= least)
    if step := find(rows, "step"):
        label = f"step, H = {step.H}, one token"
        yield label, f"< {STEP_TARGET * 1e6:.0f} µs", f"{step.seconds * 1e6:.1f} µs", met(step.seconds < STEP_TARGET)
    if growth := find(rows, "step memory"):
        measured = "not readable here" if growth.extra_bytes is None else f"{growth.extra_bytes / 1024:.0f} KiB"
        yield f"growth of resident memory over {growth.L:,} tokens", "", measured, ""
    if scaling := [r for r in rows if r.case == "scaling"]:
        times = [per_element(r) for r in scaling]
        ratio = max(times) / min(times)
        label = f"forward time per element, L = {scaling[0].L:,} to {scaling[-1].L:,}, max / min"
        yield label, f"≤ {SCALING_TARGET}x", f"{ratio:.2f}x", met(ratio <= SCALING_TARGET)
    for row in (r for r in rows if r.case == "memory"):
        label = f"extra memory of forward + backward, B = {row.B}, L = {row.L}, over the bytes of u"
        asked = f"≤ {MEMORY_TARGET:g}x"
        if row.extra_bytes is None:
            yield label, asked, "not readable here", "not measured"
        else:
            yield label, asked, f"{memory_multiple(row):.2f}x", met(memory_multiple(row) <= MEMORY_TARGET)


def per_element(row: Row) -> float:
    return row.seconds / (row.B * row.H * row.L)


def memory_multiple(row: Row) -> float:
    return row.extra_bytes / (4 * row.B * row.H * row.L)


def _gap(rows: list[Row], ours: Row) -> str:
    """What bounds this case, from the ceilings measured beside it."""
    matmul, copy, clone = (find(rows, ours.case, ours.L, name) for name in ("matmul", "copy", "clone"))
    flops, moved = work(ours.case, ours.B, ours.H, ours.L)
    arithmetic, memory = flops / (matmul.gflops * 1e9), moved / (copy.gbytes * 1e9)
    new_memory = max(clone.seconds - copy.seconds, 0.0) * _ARRAYS[ours.case] / 2  # half of the arrays are results
    balance = matmul.gflops / copy.gbytes
    bound, bound_name = max((arithmetic, "arithmetic"), (memory, "memory"))
    text = (
        f"{ours.case}, L = {ours.L}: {ours.seconds * 1e3:.3f} ms. Moving the {moved / 1e6:.3g} MB that have to be "
        f"moved takes {memory * 1e3:.3f} ms at the rate of the copy ({memory / ours.seconds:.0%} of the time), finding "
        f"new memory for the results {new_memory * 1e3:.3f} ms ({new_memory / ours.seconds:.0%}). The recurrence is "
        f"{flops / 1e9:.3g} GFLOP; at the rate of the matrix product it takes {arithmetic * 1e3:.3f} ms "
        f"({arithmetic / ours.seconds:.0%}). It does {flops / moved:.0f} operations a byte where the machine balances "
        f"at {balance:.0f}, so {bound_name} bounds it, at {bound * 1e3:.3f} ms. "
    )
    if ours.seconds < bound:
        return text + "Ours takes less: it does not do all the operations of the plain recurrence.\n"
    rest = max(ours.seconds - bound - new_memory, 0.0)
    return text + (
        f"Ours takes {ours.seconds / bound:.1f} times that; {rest * 1e3:.3f} ms ({rest / ours.seconds:.0%}) are "
        "neither that bound nor new memory: operations beyond the count, or arithmetic below the rate of the matrix "
        "product, which loads a number once for many multiply-adds.\n"
    )
