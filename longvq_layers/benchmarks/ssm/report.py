"""What the benchmark of the scan prints: times, targets, rates, and what limits the time of each case."""

from longvq_layers.benchmarks.common.markdown import line
from longvq_layers.benchmarks.ssm.rows import ARRAYS, PEERS, TIMED, Row, beside, find, work
from longvq_layers.benchmarks.ssm.targets import targets


def print_report(rows: list[Row], judged: bool) -> None:
    """Print the Markdown tables and what limits each case.

    Args:
        judged: whether the sizes are those of the targets.
    """
    timed = [r for r in rows if r.case in TIMED and r.method == "ours"]
    print(line("case", "B", "H", "L", "ours, ms", *(f"{p}, ms (ours is faster by)" for p in PEERS)))
    print("|:---|---:|---:|---:|---:|" + "---:|" * len(PEERS))
    for ours in timed:
        cells = [_against(ours, find(rows, ours.case, ours.L, peer)) for peer in PEERS]
        print(line(ours.case, ours.B, ours.H, ours.L, f"{ours.seconds * 1e3:.3f}", *cells))
    notes = [f"{r.case}, L = {r.L}, {r.method}: {r.note}." for r in rows if r.note]
    print("\n" + "\n".join(notes) + "\n" if notes else "")

    print("| target | asked | measured | |\n|:---|---:|---:|:---|")
    for what, asked, measured, verdict in targets(rows):
        print(line(what, asked, measured, verdict if judged else "not judged"))

    print("\n| case | L | ours, GFLOP/s | matmul, GFLOP/s | share | ours, GB/s | copy, GB/s | share |")
    print("|:---|---:|---:|---:|---:|---:|---:|---:|")
    for ours in timed:
        matmul, copy = (beside(rows, ours, name) for name in ("matmul", "copy"))
        print(
            line(
                *(ours.case, ours.L),
                *(f"{ours.gflops:.1f}", f"{matmul.gflops:.1f}", f"{ours.gflops / matmul.gflops:.0%}"),
                *(f"{ours.gbytes:.2f}", f"{copy.gbytes:.2f}", f"{ours.gbytes / copy.gbytes:.0%}"),
            )
        )
    print("\n" + "\n".join(_limit(rows, ours) for ours in timed), flush=True)


def _against(ours: Row, peer: Row | None) -> str:
    if peer is None or not peer.timed:
        return "skipped"
    return f"{peer.seconds * 1e3:.3f} ({peer.seconds / ours.seconds:.3g}x)"


def _limit(rows: list[Row], ours: Row) -> str:
    """What limits this case: arithmetic or memory, at the rates that were measured in the same rounds."""
    matmul, copy, clone = (beside(rows, ours, name) for name in ("matmul", "copy", "clone"))
    flops, moved = work(ours.case, ours.B, ours.H, ours.L)
    arithmetic, memory = flops / (matmul.gflops * 1e9), moved / (copy.gbytes * 1e9)
    new_memory = max(clone.seconds - copy.seconds, 0.0) * ARRAYS[ours.case] / 2  # half of the arrays are results
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
