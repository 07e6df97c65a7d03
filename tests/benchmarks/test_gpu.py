"""The run on a GPU, with its parts on the CPU; only the CUDA kernels are missing."""

import argparse

import pytest
import torch

from longvq_layers.benchmarks.gpu import checks, layers
from longvq_layers.benchmarks.gpu import command as gpu


def arguments(tmp_path, *words):
    parser = argparse.ArgumentParser()
    gpu.add_arguments(parser)
    return parser.parse_args(["--out", str(tmp_path), *words])


def test_all_parts_run(tmp_path, capsys):
    gpu.run(arguments(tmp_path, "--device", "cpu", "--quick"))
    written = (tmp_path / "gpu.md").read_text()
    assert "FAILED" not in written and "failed" not in written
    for part in ("ssm_scan", "vq_attention", "a training step of LongVQ", "decoding", "| ours, torch | forward |"):
        assert part in written


def test_failing_parts_are_reported_and_the_others_run(tmp_path, monkeypatch):
    def broken(device, quick):
        yield "a line"
        raise ValueError("what went wrong")

    monkeypatch.setattr(gpu.times, "PARTS", {"broken": broken, "good": lambda device, quick: iter(["all is well"])})
    with pytest.raises(SystemExit, match="failed: broken"):
        gpu.run(arguments(tmp_path, "--device", "cpu", "--quick"))
    written = (tmp_path / "gpu.md").read_text()
    assert "a line" in written and "ValueError: what went wrong" in written and "all is well" in written


def test_the_budget_leaves_parts_out(tmp_path):
    with pytest.raises(SystemExit, match="failed: machine"):
        gpu.run(arguments(tmp_path, "--device", "cpu", "--quick", "--budget", "-1"))
    assert (tmp_path / "gpu.md").read_text().count("left out") >= 5


def test_differing_layers_are_found(monkeypatch):
    assert "| LongVQBlock | 0 | 0 |" in layers.check("cpu")
    right = layers._run_layer
    calls = []

    def wrong(*args):
        calls.append(args)
        y, *gradients = right(*args)
        return [y + (len(calls) == 4) * 1e-6, *gradients]

    monkeypatch.setattr(layers, "_run_layer", wrong)
    with pytest.raises(AssertionError, match=r"differ from the CPU:\n\| VQAttention, causal, exact"):
        layers.check("cpu")


def test_its_checks_find_a_wrong_kernel():
    right = torch.ops.longvq_torch

    class Wrong:
        def __getattr__(self, name):
            return getattr(right, name)

        def ssm_scan(self, *args):
            y, state = right.ssm_scan(*args)
            return y.clone().index_fill_(1, torch.tensor(0), 3.0), state

    with pytest.raises(AssertionError, match=r"ssm_scan y \w+: .* in call"):
        checks.run("cpu", count=1, namespace=Wrong())


def test_error_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="there is no GPU"):
        gpu.run(arguments(tmp_path))
