"""CUDA kernels that were never tested on a GPU: `backend="auto"` does not choose them, `"native"` warns."""

import re
import warnings

import pytest
import torch

from longvq_layers import _extension, info
from longvq_layers.ops import _dispatch

CUDA = torch.device("cuda")


@pytest.mark.parametrize("op", ["vq_assign", "vq_attention", "ssm_scan"])
def test_auto_chooses_torch(monkeypatch, op):
    monkeypatch.setattr(_extension, "_cuda_library", object())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _dispatch.choose(op, "auto", CUDA, (torch.float32,)) == "torch"


def test_native_by_name_warns(monkeypatch):
    monkeypatch.setattr(_extension, "_cuda_library", object())
    with pytest.warns(RuntimeWarning, match="never on a GPU"):
        assert _dispatch.choose("ssm_scan", "native", CUDA, (torch.bfloat16,)) == "native"


def test_native_declines_with_the_reason(monkeypatch):
    monkeypatch.setattr(_extension, "_cuda_library", None)
    monkeypatch.setattr(_extension, "_cuda_error", "there is no GPU that this torch can use")
    with pytest.raises(NotImplementedError, match="CUDA kernels is not loaded: there is no GPU"):
        _dispatch.choose("ssm_scan", "native", CUDA, (torch.float32,))
    with pytest.raises(NotImplementedError, match="ssm_step has compiled kernels for cpu, not for cuda"):
        _dispatch.choose("ssm_step", "native", CUDA, (torch.float32,))


def test_a_missing_cuda_library_does_not_warn(monkeypatch, tmp_path):
    monkeypatch.setattr(_extension, "_cuda_library", None)
    monkeypatch.setattr(_extension, "_cuda_error", None)
    monkeypatch.setattr(_extension, "CUDA_LIBRARY", tmp_path / "missing.so")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not _extension.load_cuda()
    assert _extension.cuda_load_error().startswith("not built: ")


def test_info_reports_the_cuda_kernels(monkeypatch):
    monkeypatch.setattr(_extension, "_cuda_library", None)
    monkeypatch.setattr(_extension, "_cuda_error", "there is no GPU")
    assert re.search(r"CUDA kernels +no, there is no GPU", info.report())
    monkeypatch.setattr(_extension, "_cuda_library", object())
    assert re.search(r'CUDA kernels +loaded, for backend="native" only: no GPU has tested them', info.report())
