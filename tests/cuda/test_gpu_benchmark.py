"""The GPU benchmark, run on a CPU: everything works but the kernels themselves."""

import argparse

import pytest
import torch

from longvq_layers.benchmarks import gpu, gpu_checks


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

    monkeypatch.setattr(gpu.gpu_times, "PARTS", {"broken": broken, "good": lambda device, quick: iter(["all is well"])})
    with pytest.raises(SystemExit, match="failed: broken"):
        gpu.run(arguments(tmp_path, "--device", "cpu", "--quick"))
    written = (tmp_path / "gpu.md").read_text()
    assert "a line" in written and "ValueError: what went wrong" in written and "all is well" in written


def test_the_budget_leaves_parts_out(tmp_path):
    with pytest.raises(SystemExit, match="failed: machine"):
        gpu.run(arguments(tmp_path, "--device", "cpu", "--quick", "--budget", "-1"))
    assert (tmp_path / "gpu.md").read_text().count("left out") >= 5


def test_the_kernels_pass_its_checks(on_host):
    assert "vq_attention dk " in gpu_checks.run("cpu", count=2, namespace=on_host)


def test_differing_layers_are_found(monkeypatch):
    assert "| LongVQBlock | 0 | 0 |" in gpu_checks.layers("cpu")
    right = gpu_checks._run_layer
    calls = []

    def wrong(*args):
        calls.append(args)
        y, *gradients = right(*args)
        return [y + (len(calls) == 4) * 1e-6, *gradients]

    monkeypatch.setattr(gpu_checks, "_run_layer", wrong)
    with pytest.raises(AssertionError, match=r"differ from the CPU:\n\| VQAttention, causal, exact"):
        gpu_checks.layers("cpu")


def test_its_checks_find_a_wrong_kernel(on_host):
    class Wrong:
        def __getattr__(self, name):
            return getattr(on_host, name)

        def ssm_scan(self, *args):
            y, state = on_host.ssm_scan(*args)
            return y.clone().index_fill_(1, torch.tensor(0), 3.0), state

    with pytest.raises(AssertionError, match=r"ssm_scan y \w+: .* in call"):
        gpu_checks.run("cpu", count=1, namespace=Wrong())


def test_error_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="there is no GPU"):
        gpu.run(arguments(tmp_path))
