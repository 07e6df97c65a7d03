"""`csrc/build_support/cuda_library.py`: when it builds the CUDA kernels, for which GPUs, and how it reads ptxas."""

import re
from pathlib import Path
from types import SimpleNamespace

import cuda_library
import pytest
from native_library import BuildError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def torch_of(tmp_path):
    def make(version_py):
        (tmp_path / "version.py").write_text(version_py)
        return SimpleNamespace(root=tmp_path)

    return make


@pytest.fixture
def nvcc(tmp_path, monkeypatch):
    """CUDA_HOME is set to a folder with an nvcc that only prints its version."""
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.delenv("FORCE_CUDA", raising=False)
    compiler = tmp_path / "cuda" / "bin" / "nvcc"
    compiler.parent.mkdir(parents=True)
    compiler.write_text("#!/bin/sh\necho Cuda compilation tools, release 13.0, V13.0.88\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    return compiler


WITHOUT, WITH = "cuda: Optional[str] = None\n", "cuda: Optional[str] = '13.0'\n"


def test_built_where_torch_has_cuda_and_there_is_nvcc(torch_of, nvcc):
    assert cuda_library.why_not(torch_of(WITH)) is None
    assert "without CUDA" in cuda_library.why_not(torch_of(WITHOUT))
    assert "nvcc is of CUDA 13.0.88, this torch of CUDA 12" in cuda_library.why_not(torch_of(WITH.replace("13", "12")))
    nvcc.unlink()
    assert "no nvcc" in cuda_library.why_not(torch_of(WITH))


def test_force_cuda(torch_of, nvcc, monkeypatch):
    monkeypatch.setenv("FORCE_CUDA", "1")
    assert cuda_library.why_not(torch_of(WITHOUT)) is None
    nvcc.unlink()
    assert "FORCE_CUDA=1, but there is no nvcc" in cuda_library.why_not(torch_of(WITHOUT))


def test_cudacxx_comes_before_cuda_home(nvcc, monkeypatch):
    assert cuda_library.find_nvcc() == str(nvcc)
    monkeypatch.setenv("CUDACXX", "/nowhere/nvcc")
    assert cuda_library.find_nvcc() is None


def test_architectures(monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert cuda_library.architectures() == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=compute_80",
        "-gencode=arch=compute_90a,code=sm_90a",
    ]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6 12.0+PTX")
    assert cuda_library.architectures() == [
        "-gencode=arch=compute_86,code=sm_86",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(BuildError, match=r"must be numbers like .* got 'Hopper'"):
        cuda_library.architectures()


def test_kernels_in_the_log_of_ptxas():
    log = """
ptxas info    : Compiling entry function '_Z1aIfEv' for 'sm_80'
ptxas info    : Function properties for _Z1aIfEv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers
ptxas info    : Compiling entry function '_Z1bv' for 'sm_90a'
ptxas info    : Function properties for _Z1bv
    16 bytes stack frame, 20 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 16 bytes cumulative stack size
"""
    assert cuda_library.kernels_of(log) == [
        cuda_library.Kernel("_Z1aIfEv", "sm_80", 40, 0, 0),
        cuda_library.Kernel("_Z1bv", "sm_90a", 255, 16, 20),
    ]


def test_kernels_need_neither_torch_nor_cuda_headers_to_be_called():
    """What the operators include of the kernels is plain C++."""
    csrc = ROOT / "csrc"
    pending, seen = [csrc / "cuda" / kernel / "params.h" for kernel in ("vq", "ssm")], set()
    while pending:
        header = pending.pop()
        seen.add(header.resolve().relative_to(csrc).as_posix())
        for include in re.findall(r"#include (.*)", header.read_text()):
            assert include.startswith('"') or include == "<cstdint>", (header, include)
            if include.startswith('"'):
                pending.append(header.parent / include.strip('"'))
    assert seen == {
        "common/dtype.h",
        "cuda/common/sequences.h",
        "cuda/ssm/params.h",
        "cuda/vq/params.h",
        "vq/attention_options.h",
    }
    for source in (csrc / "cuda").rglob("*.cu"):
        assert "torch" not in source.read_text(), source
