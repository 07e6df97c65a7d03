"""Loading the compiled library, and every way in which loading can fail.

Each failure is produced in a copy of the package and in a new process, because a library can't be unloaded.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import native_library
import pytest

import longvq_layers
from longvq_layers import _extension

PACKAGE = Path(longvq_layers.__file__).parent

# This must hold for every failure: the import works, results are right, and backend="native" gives the reason.
_PROBE = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import longvq_layers
import torch
from longvq_layers import _extension, info, ops

k, codebook = torch.randn(1, 2, 30, 8), torch.randn(2, 9, 8)
expected = (k.unsqueeze(-2) - codebook.unsqueeze(-3)).square().sum(-1).argmin(-1)
assert torch.equal(ops.vq_assign(k, codebook), expected)
try:
    ops.vq_assign(k, codebook, backend="native")
    native = None
except NotImplementedError as error:
    native = str(error)
_extension.load()
print(json.dumps({
    "package": longvq_layers.__file__,
    "loaded": _extension.is_loaded(),
    "error": _extension.load_error(),
    "capability": _extension.cpu_capability(),
    "native": native,
    "info": info.report(),
    "warnings": [str(w.message) for w in caught if "native kernels" in str(w.message)],
}))
"""


def probe(package: Path, **environment: str) -> dict:
    """Import the copy of the package in a fresh process and report what happened."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("LONGVQ_")}
    done = subprocess.run(
        [sys.executable, "-c", _PROBE],
        env={**inherited, "PYTHONPATH": str(package.parent), **environment},
        cwd=package.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert Path(answer["package"]).parent == package
    return answer


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the installed package, which tests may damage."""
    copy = tmp_path / "longvq_layers"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    assert (copy / "lib" / "liblongvq.so").exists(), f"these tests need the library: {_extension.load_error()}"
    return copy


def assert_served_by_torch(answer: dict, cause: str, warned: bool) -> None:
    assert not answer["loaded"] and answer["capability"] is None
    assert cause in answer["error"]
    assert cause in answer["native"]
    assert cause in answer["info"]
    assert len(answer["warnings"]) == (1 if warned else 0)
    assert not warned or cause in answer["warnings"][0]


def compile_library(source: str, target: Path, *flags: str) -> None:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    assert compiler, "this test compiles a small library and needs a C++ compiler"
    target.unlink(missing_ok=True)
    command = [*compiler.split(), "-shared", "-fPIC", "-x", "c++", "-", "-o", str(target), *flags]
    subprocess.run(command, input=source, text=True, check=True)


def test_loads():
    assert _extension.is_loaded() and _extension.load_error() is None
    assert _extension.cpu_capability() in ("default", "avx2", "avx512")
    info = _extension.build_info()
    assert info["built"] is True
    assert info["stable_abi_target"] == "2.10"
    assert _extension.cpu_capability() in info["instruction_sets"]
    assert info["torch"] and info["compiler"]
    assert info["cuda"]["built"] or info["cuda"]["reason"]


def test_loading_twice_is_harmless():
    assert _extension.load() and _extension.load()


def test_an_intact_copy_loads_silently(package):
    answer = probe(package)
    assert answer["loaded"] and answer["error"] is None and answer["native"] is None and not answer["warnings"]
    assert answer["capability"] in answer["info"]


def test_disabled_by_the_environment(package):
    answer = probe(package, LONGVQ_DISABLE_EXTENSION="1")
    assert_served_by_torch(answer, "disabled by LONGVQ_DISABLE_EXTENSION=1", warned=False)


def test_never_built(package):
    shutil.rmtree(package / "lib")
    (package / "_build_info.json").write_text(json.dumps({"built": False, "reason": "no C++ compiler on PATH"}))
    assert_served_by_torch(probe(package), "not built: no C++ compiler on PATH", warned=False)


def test_built_but_missing(package):
    shutil.rmtree(package / "lib")
    assert_served_by_torch(probe(package), "missing", warned=True)


@pytest.mark.parametrize("content", [b"", b"this is no library, but longer than a header"], ids=["empty", "text"])
def test_corrupt(package, content):
    (package / "lib" / "liblongvq.so").unlink()
    (package / "lib" / "liblongvq.so").write_bytes(content)
    assert_served_by_torch(probe(package), "corrupt", warned=True)


def test_built_for_another_architecture(package):
    library = package / "lib" / "liblongvq.so"
    content = bytearray(library.read_bytes())
    here, other = (0x3E, 0xB7) if content[18] == 0x3E else (content[18], 0x3E)
    assert content[18] == here
    content[18] = other  # e_machine of the ELF header
    library.unlink()
    library.write_bytes(content)
    assert_served_by_torch(probe(package), "built for another architecture", warned=True)


def test_undefined_symbol(package):
    source = 'extern "C" void a_function_torch_lacks(); struct Load { Load() { a_function_torch_lacks(); } } load;'
    compile_library(source, package / "lib" / "liblongvq.so")
    answer = probe(package)
    assert_served_by_torch(answer, "undefined symbol", warned=True)
    assert "a_function_torch_lacks" in answer["error"]


def test_a_library_of_something_else(package):
    compile_library('extern "C" int something_else() { return 1; }', package / "lib" / "liblongvq.so")
    assert_served_by_torch(probe(package), "it is not the library of longvq_layers", warned=True)


def test_a_library_that_registers_nothing(package):
    source = """
    extern "C" const char* longvq_cpu_capability_error() { return 0; }
    extern "C" const char* longvq_cpu_operators() { return "vq_assign"; }
    """
    compile_library(source, package / "lib" / "liblongvq.so")
    assert_served_by_torch(probe(package), "did not register longvq::vq_assign", warned=True)


def test_another_library_by_name(package):
    """The named library is used, although the package has none."""
    library = (package / "lib" / "liblongvq.so").rename(package.parent / "another.so")
    for name in (str(library), library.name):  # relative to the working directory, not to the linker's folders
        answer = probe(package, LONGVQ_LIBRARY=name)
        assert answer["loaded"] and answer["error"] is None and answer["native"] is None and not answer["warnings"]
        assert f"file                     {library}" in answer["info"]
    answer = probe(package, LONGVQ_LIBRARY=str(library), LONGVQ_DISABLE_EXTENSION="1")
    assert_served_by_torch(answer, "disabled by LONGVQ_DISABLE_EXTENSION=1", warned=False)


# In each case the package's own library is intact, but must not be loaded instead of the named library.
def test_another_library_that_is_missing(package):
    path = package.parent / "nowhere.so"
    answer = probe(package, LONGVQ_LIBRARY=str(path))
    assert_served_by_torch(answer, f"missing: LONGVQ_LIBRARY={path} does not exist", warned=True)


def test_another_library_that_is_none(package):
    path = package.parent / "text.so"
    path.write_text("this is no library, but longer than a header")
    answer = probe(package, LONGVQ_LIBRARY=str(path))
    assert_served_by_torch(answer, f"LONGVQ_LIBRARY={path} does not load: corrupt", warned=True)


@pytest.fixture(scope="module")
def best_capability() -> str:
    return probe(PACKAGE)["capability"]


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_capability_override_is_honoured_or_refused(best_capability, capability):
    order = ("default", "avx2", "avx512")
    answer = probe(PACKAGE, LONGVQ_CPU_CAPABILITY=capability)
    if order.index(capability) <= order.index(best_capability):
        assert answer["loaded"] and answer["capability"] == capability
    else:
        assert_served_by_torch(answer, f"LONGVQ_CPU_CAPABILITY={capability} is not available", warned=True)


def test_unknown_capability_is_refused():
    answer = probe(PACKAGE, LONGVQ_CPU_CAPABILITY="avx1024")
    assert_served_by_torch(
        answer, "LONGVQ_CPU_CAPABILITY must be one of default, avx2, avx512, got avx1024", warned=True
    )
    assert "must be one of default, avx2, avx512" in answer["error"]


@pytest.mark.slow
def test_a_capability_that_the_build_lacks_is_refused(package):
    """A library compiled without AVX2 and AVX-512 refuses them like a CPU that does not have them."""
    torch = native_library.find_torch()
    assert torch is not None
    root = PACKAGE.parent
    sources = [str(root / p) for p in native_library.sources("*.cpp", but=native_library.CUDA)]
    target = package / "lib" / "liblongvq.so"
    target.unlink()
    command = [*(native_library.find_compiler() or []), *native_library.COMMON_FLAGS, "-O0", "-DLONGVQ_ISA=default"]
    command += ["-isystem", str(torch.include), *sources, "-o", str(target), f"-L{torch.lib}"]
    subprocess.run([*command, *native_library.LINK_FLAGS], check=True)
    assert probe(package)["capability"] == "default"
    answer = probe(package, LONGVQ_CPU_CAPABILITY="avx2")
    assert_served_by_torch(answer, "LONGVQ_CPU_CAPABILITY=avx2 is not available", warned=True)


def test_info_runs_as_a_command():
    done = subprocess.run([sys.executable, "-m", "longvq_layers.info"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in (longvq_layers.__version__, "torch", "instruction set", "threads", "vq_attention", "reference"):
        assert word in done.stdout


def test_the_library_needs_no_python():
    """The same library works for every Python version: it must not link libpython or torch's Python layer."""
    dynamic = subprocess.run(["readelf", "-d", _extension.LIBRARY], capture_output=True, text=True, check=True).stdout
    needed = [line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line]
    assert any(name.startswith("libtorch_cpu") for name in needed)
    assert not [name for name in needed if "python" in name or name.startswith("libc10")]
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", _extension.LIBRARY], capture_output=True, text=True, check=True
    ).stdout
    names = [line.split()[-1] for line in symbols.splitlines()]
    assert not [name for name in names if name.startswith(("Py", "_Py"))]
    # Only the C shim of torch: C++ symbols of at:: or c10:: would need the same version of torch.
    assert not [name for name in names if name.startswith(("_ZN2at", "_ZN3c10", "_ZNK2at", "_ZNK3c10", "_ZN5torch"))]
    assert [name for name in names if name.startswith(("aoti_torch_", "torch_"))]
