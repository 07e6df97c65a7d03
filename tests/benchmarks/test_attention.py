"""The benchmark of attention runs, refuses wrong results and judges targets; its measurements are not asserted."""

import csv
from dataclasses import replace

import pytest
import torch

from longvq_layers import ops
from longvq_layers.benchmarks.attention import checks, decode, measure, memory, targets
from longvq_layers.benchmarks.attention.problem import FULL, QUICK
from longvq_layers.benchmarks.attention.rows import PEERS, Row
from longvq_layers.benchmarks.attention.work import PARTS, step_work, work
from longvq_layers.benchmarks.common.break_even import faster_from
from tests.benchmarks.command_line import run

BIDIRECTIONAL, CAUSAL = QUICK.forms


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """A function that runs `attention --quick` with more options and a fixed memory, and returns the rows."""
    monkeypatch.setattr(memory, "extra_bytes", lambda *args: 1000)

    def call(*options):
        run(
            monkeypatch, "attention", "--quick", *["--repeats", "1", "--threads", "1", "--out"], str(tmp_path), *options
        )
        with (tmp_path / "results.csv").open() as file:
            return list(csv.DictReader(file))

    return call


def test_every_case_prints_its_table(quick, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    rows = quick()
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    tables = [line for line in lines if line.startswith(("|:--", "|--"))]
    assert len(tables) == 5
    # Cells of each line are as many as those of the head.
    width = 0
    for line in lines:
        width = line.count("|") if line.startswith(("| case", "| one", "| | form", "| target")) else width
        assert line.count("|") == width, line
    starts = [f"| forward | {form} | {length} |" for form in ("bidirectional", "causal") for length in QUICK.sweep]
    starts += ["| forward + backward | bidirectional | 256 |", "| forward + backward | causal | 256 |"]
    starts += [
        "| bfloat16 | bidirectional | 256 |",
        "| assign | both | 256 |",
        "| 16 |",
        "| memory of backward | causal",
    ]
    for start in starts:
        assert any(line.startswith(start) for line in lines), start
    assert not any(line.endswith("met |") for line in lines)  # targets are for the full sizes
    assert printed.count("Forward, ") == 2  # break-even of both forms
    assert (tmp_path / "attention.png").stat().st_size > 10_000

    columns = "case form L method seconds rounds gflops gbytes extra_bytes served note B heads width codes window"
    assert list(rows[0]) == [*columns.split(), "threads", "torch"]
    assert all(float(row["seconds"]) > 0 for row in rows if not row["case"].startswith("memory"))
    assert {row["method"] for row in rows if row["case"] == "parts"} >= set(PARTS["forward + backward"])
    lengths = [int(row["L"]) for row in rows if row["case"] == "forward" and row["method"] == "sdpa"]
    assert sorted(lengths) == sorted(2 * QUICK.sweep)  # nothing twice


def test_the_sweep_leaves_the_peer_out_when_a_call_takes_too_long(quick, capsys):
    rows = quick("--cases", "sweep", "--longest-call", "0", "--backend", "torch")
    peer = [row for row in rows if row["method"] == "sdpa" and row["form"] == "causal"]
    assert [bool(row["seconds"]) for row in peer] == [True] + [False] * (len(QUICK.sweep) - 1)
    assert all("more than 0 s" in row["note"] for row in peer[1:])
    assert "| forward | causal | 128 | torch |" in (printed := capsys.readouterr().out)
    assert "not timed" in printed and {row["served"] for row in rows if row["method"] == "ours"} == {"torch"}


def test_a_backend_without_bfloat16_is_reported(quick, monkeypatch, capsys):
    def refuse(sizes, form, backend, dtype=torch.float32):
        if dtype == torch.bfloat16:
            raise NotImplementedError("there is no such kernel")

    monkeypatch.setattr(checks, "check", refuse)
    rows = quick("--cases", "bfloat16", "assign")
    assert [row["note"] for row in rows if row["case"] == "bfloat16"] == ["not measured, there is no such kernel"]
    monkeypatch.setattr(measure, "CASES", {"assign": lambda *args: refuse(None, None, None, torch.bfloat16)})
    with pytest.raises(SystemExit, match="nothing to measure: there is no such kernel"):
        quick("--cases", "assign")


@pytest.mark.parametrize("form", QUICK.forms, ids=lambda form: form.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_refuses_to_time_a_wrong_result(monkeypatch, form, dtype):
    assert checks.check(QUICK, form, "torch", dtype) < checks.TOLERANCE[dtype]
    right = ops.vq_attention
    changes = [lambda out, q, v: out * 1.1, lambda out, q, v: out + 0.1 * (q - q.detach())]
    changes += [lambda out, q, v: out + 0.1 * (v - v.detach()), lambda out, q, v: out * torch.nan]
    for change, name in zip(changes, ("out", "dq", "dv", "out"), strict=True):
        wrong = lambda q, k, v, *args, change=change, **options: change(right(q, k, v, *args, **options), q, v)  # noqa: E731
        monkeypatch.setattr(ops, "vq_attention", wrong)
        with pytest.raises(AssertionError, match=f"{name}: ours differs"):
            checks.check(QUICK, form, "torch", dtype)


def test_refuses_to_time_wrong_decoding(monkeypatch):
    decoder = decode.Decoder(QUICK, "auto")
    decode.check(decoder)
    right = ops.vq_attention_step
    monkeypatch.setattr(ops, "vq_attention_step", lambda *args, **options: right(*args, **options) + 0.1)
    with pytest.raises(AssertionError, match="decoding differs"):
        decode.check(decoder)


def test_operations_of_a_size_by_hand():
    sizes = replace(FULL, num_heads=1, head_dim=2, num_codes=3, window=4)
    bidirectional, causal = sizes.forms
    length = 5
    assert work(("assignment",), sizes, causal, length) == (2 * 5 * 3 * 2, 4 * 5 * 2)
    assert work(PARTS["forward"], sizes, bidirectional, length)[0] == 2 * 5 * 3 * 2 + 2 * 5 * 3 * (2 + 2)
    assert work(PARTS["forward"], sizes, causal, length)[0] == 2 * 5 * 3 * 2 + 2 * 5 * (3 + 4) * (2 + 2)
    assert work(("backward",), sizes, causal, length)[0] == 2.5 * work(("forward, codes given",), sizes, causal, 5)[0]
    assert step_work(sizes) == (2 * 3 * 2 + 2 * 7 * 4, 4 * (3 + 7) * 2)


def rows_for_targets(factor):
    """All targets, each met by `factor` if that is above 1."""
    for (case, form, length), least in targets.SPEED_TARGETS.items():
        yield Row(case, form, length, "ours", 1.0, gflops=targets.ASSIGN_RATE_TARGET * factor)
        yield Row(case, form, length, PEERS[case], least * factor)
    yield Row("assign", "both", 16384, "matmul", 1.0, gflops=1.0)
    yield from (Row("forward", "bidirectional", n, "ours", 1.0) for n in (512, 2048))
    # crosses at 1024 for a factor of 1
    yield from (Row("forward", "bidirectional", n, "sdpa", s * factor) for n, s in ((512, 0.5), (2048, 2.0)))
    yield Row("decode", "causal", 1024, "ours", 1.0)
    yield Row("decode", "causal", 16384, "ours", targets.POSITION_TARGET / factor)
    yield Row("decode", "causal", 16384, "sdpa", 20 * targets.POSITION_TARGET * factor)
    array = 4 * FULL.num_heads * FULL.head_dim * 16384
    for case, most in targets.MEMORY_TARGETS.items():
        yield Row(case, "causal", 16384, "ours", extra_bytes=int(most * array / factor))


def test_targets_are_met_or_not():
    good, bad = (list(targets.targets(list(rows_for_targets(factor)), FULL)) for factor in (1.02, 0.98))
    assert len(good) == len(bad) == len(targets.SPEED_TARGETS) + 1 + 2 + 2 + 1
    assert {line[-1] for line in good} == {"met"} and {line[-1] for line in bad} == {"not met"}


def test_a_target_without_a_measurement_is_not_met():
    rows = [
        Row("forward", "bidirectional", 16384, "ours", 1.0),
        Row("forward", "bidirectional", 16384, "sdpa", note="left out"),
        Row("memory of forward", "causal", 16384, "ours"),
        Row("bfloat16", "bidirectional", 16384, "ours", note="no kernel"),
    ]
    assert [line[-1] for line in targets.targets(rows, FULL)] == ["not measured", "not measured"]


def test_the_break_even_length_needs_short_lengths():
    def compared(lengths, times):
        rows = [Row("forward", "bidirectional", n, "ours", 1.0) for n in lengths]
        rows += [Row("forward", "bidirectional", n, "sdpa", s) for n, s in zip(lengths, times, strict=True)]
        return [line[2] for line in targets.targets(rows, FULL) if "from L" in line[0]]

    assert compared([4096, 16384], [5.0, 20.0]) == []
    assert compared([512, 1024], [2.0, 4.0]) == ["512"]
    assert compared([512, 1024], [0.2, 0.4]) == ["slower at the longest"]


def test_faster_from():
    assert faster_from([512, 1024], [0.5, 2.0]) == 724  # halfway in log length
    assert faster_from([512, 1024], [1.0, 2.0]) == 512
    assert faster_from([512, 1024, 2048], [2.0, 0.5, 2.0]) == 1448  # becomes and stays
    assert faster_from([512, 1024], [2.0, 0.5]) is None


def test_memory_beyond_the_results_of_a_known_call():
    def call():
        result, scratch = torch.ones(2**26, dtype=torch.uint8), torch.ones(2**26, dtype=torch.uint8)
        return result + scratch[0]  # a second buffer of that size is freed

    extra = memory.beyond_results(call, 2**26)
    if extra is not None:  # three buffers at once, one of them the result
        assert extra == pytest.approx(2**27, rel=0.25)


@pytest.mark.parametrize("case", ["forward", "backward"])
def test_memory_is_measured_in_a_process_of_its_own(case):
    """The dense reference has to hold all scores."""
    sizes = replace(QUICK, num_heads=1, long=2048)
    extra = memory.extra_bytes(case, sizes, BIDIRECTIONAL, "reference", 1)
    assert extra is None or 4 * 2048**2 <= extra < 2**28
