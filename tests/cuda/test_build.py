"""`csrc/build_support/cuda_library.py`: when the CUDA kernels are built, for what, and what it reads from ptxas."""

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
    """A CUDA_HOME with a compiler that does nothing."""
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


def test_nvcc_by_name_comes_first(nvcc, monkeypatch):
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
    with pytest.raises(BuildError, match="got 'Hopper', expected numbers"):
        cuda_library.architectures()


def test_what_ptxas_says():
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
    """The launcher interface: what the operators include of the kernels is plain C++."""
    launch = (ROOT / "csrc" / "cuda" / "launch.h").read_text()
    includes = [line for line in launch.splitlines() if line.startswith("#include")]
    assert includes == ["#include <cstdint>", '#include "../common/dtype.h"']
    for source in (ROOT / "csrc" / "cuda").glob("*.cu"):
        assert "torch" not in source.read_text(), source
