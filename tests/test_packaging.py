"""Installs the package from a fresh copy of the sources, in every way that a user might.

Each test environment sees the torch of the environment that runs the tests, through a .pth file. So only setuptools is
downloaded, for the isolated builds, and a test would notice a torch that an installation replaced.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow

_USE = """
import json, torch, longvq_layers
from longvq_layers import _extension, ops
codes = ops.vq_assign(torch.tensor([[[[0.9, 0.8], [0.1, -0.2]]]]), torch.tensor([[[0.0, 0.0], [1.0, 1.0]]]))
assert codes.tolist() == [[[1, 0]]]
print(json.dumps({
    "package": longvq_layers.__file__, "loaded": _extension.is_loaded(), "error": _extension.load_error(),
    "built": _extension.build_info()["built"], "torch": [torch.__version__, torch.__file__],
}))
"""


def environment(**changes: str | None) -> dict[str, str]:
    """The environment variables of a user who set none of this project's, with changes; None removes a variable."""
    result = {k: v for k, v in os.environ.items() if not k.startswith("LONGVQ_") and k not in ("CXX", "PYTHONPATH")}
    result.update({k: v for k, v in changes.items() if v is not None})
    return result


def run(*command: object, env: dict[str, str] | None = None, cwd: Path, ok: bool = True) -> str:
    done = subprocess.run([str(c) for c in command], env=env or environment(), cwd=cwd, capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert (done.returncode == 0) is ok, output
    return output


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """The files of this checkout without anything that was built in it."""
    copy = tmp_path / "sources"
    ignore = shutil.ignore_patterns(
        ".*", "build", "dist", "*.egg-info", "__pycache__", "*.so", "_build_info.json", "demo_output"
    )
    shutil.copytree(ROOT, copy, ignore=ignore)
    return copy


@pytest.fixture
def user(tmp_path: Path) -> Path:
    """A virtual environment with torch but without longvq_layers; returns its Python."""
    venv.create(tmp_path / "user", with_pip=False)
    python = tmp_path / "user" / "bin" / "python"
    site_packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    (Path(site_packages) / "of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def install(python: Path, sources: Path, *options: str, env: dict[str, str] | None = None, ok: bool = True) -> str:
    command = [python, "-m", "pip", "--disable-pip-version-check", "install", "-v", *options, "."]
    return run(*command, env=env, cwd=sources, ok=ok)


def use(python: Path, tmp_path: Path) -> dict:
    answer = json.loads(run(python, "-W", "error", "-c", _USE, cwd=tmp_path).splitlines()[-1])
    assert Path(answer["package"]).is_relative_to(tmp_path), "the test must use what it installed"
    return answer


def torch_of(python: Path, tmp_path: Path) -> list[str]:
    script = "import torch, json; print(json.dumps([torch.__version__, torch.__file__]))"
    return json.loads(run(python, "-c", script, cwd=tmp_path))


def path_without_compilers(tmp_path: Path) -> str:
    """A PATH with all programs of the present one except compilers."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for folder in os.environ["PATH"].split(os.pathsep):
        for program in Path(folder).iterdir() if Path(folder).is_dir() else []:
            compiler = any(word in program.name for word in ("++", "gcc", "clang")) or program.name in (
                "cc",
                "c89",
                "c99",
            )
            if not compiler and not (programs / program.name).exists():
                (programs / program.name).symlink_to(program)
    assert not any(shutil.which(name, path=str(programs)) for name in ("c++", "g++", "clang++"))
    return str(programs)


@pytest.mark.parametrize("isolation", [True, False], ids=["isolated", "not isolated"])
def test_installs_with_the_library_and_leaves_torch_alone(user, sources, tmp_path, isolation):
    before = torch_of(user, tmp_path)
    output = install(user, sources, *([] if isolation else ["--no-build-isolation"]))
    assert "Installing collected packages: torch" not in output and "Collecting torch" not in output
    answer = use(user, tmp_path)
    assert answer["loaded"] and answer["built"], answer["error"]
    assert answer["torch"] == before == torch_of(user, tmp_path)


def test_longvq_build_0_installs_pure_python(user, sources, tmp_path):
    # The sources also contain the files of an earlier build with the library.
    install(user, sources, "--no-build-isolation")
    assert use(user, tmp_path)["loaded"]
    install(user, sources, "--no-build-isolation", "--force-reinstall", "--no-deps", env=environment(LONGVQ_BUILD="0"))
    answer = use(user, tmp_path)
    assert not answer["loaded"] and not answer["built"]
    assert answer["error"] == "not built: LONGVQ_BUILD=0 when it was installed"
    assert not list(Path(answer["package"]).parent.rglob("*.so"))


@pytest.mark.parametrize("isolation", [True, False], ids=["isolated", "not isolated"])
def test_without_a_compiler_installs_pure_python_and_says_so(user, sources, tmp_path, isolation):
    env = environment(PATH=path_without_compilers(tmp_path))
    output = install(user, sources, *([] if isolation else ["--no-build-isolation"]), env=env)
    assert "WITHOUT its native kernels: no C++ compiler" in output
    answer = use(user, tmp_path)
    assert not answer["loaded"] and "no C++ compiler" in answer["error"]


def test_a_compiler_that_fails_installs_pure_python_with_the_reason(user, sources, tmp_path):
    broken = sources / "csrc" / "registration.cpp"
    broken.write_text("#error this compiler is not good enough\n" + broken.read_text())
    output = install(user, sources, "--no-build-isolation")
    assert "WITHOUT its native kernels" in output
    answer = use(user, tmp_path)
    assert not answer["loaded"] and "this compiler is not good enough" in answer["error"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"LONGVQ_BUILD": "1", "CXX": "a-compiler-that-is-missing"}, "CXX=a-compiler-that-is-missing is not on PATH"),
        ({"LONGVQ_BUILD": "yes"}, "LONGVQ_BUILD must be 0, 1 or unset, got 'yes'"),
    ],
)
def test_a_requested_build_that_fails_is_an_error(user, sources, changes, message):
    assert message in install(user, sources, "--no-build-isolation", env=environment(**changes), ok=False)


def build_wheel(sources: Path, target: Path, **changes: str) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", target, "."]
    run(*command, env=environment(**changes), cwd=sources)
    (wheel,) = target.glob("*.whl")
    return wheel


def test_the_wheel_serves_every_python_on_this_platform(sources, tmp_path):
    wheel = build_wheel(sources, tmp_path / "wheels", LONGVQ_BUILD="1")
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name == f"longvq_layers-0.1.0-py3-none-{platform}.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read("longvq_layers-0.1.0.dist-info/METADATA").decode()
        library = archive.read("longvq_layers/lib/liblongvq.so")
    assert "longvq_layers/_build_info.json" in names and "longvq_layers/py.typed" in names
    assert not [n for n in names if n.split("/")[0] not in ("longvq_layers", "longvq_layers-0.1.0.dist-info")]
    assert "License-Expression: BSD-3-Clause" in metadata
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist: torch")]
    assert required == ["Requires-Dist: torch>=2.10"]
    assert str(tmp_path).encode() not in library and sysconfig.get_path("purelib").encode() not in library


def test_a_pure_wheel_serves_every_platform(sources, tmp_path):
    wheel = build_wheel(sources, tmp_path / "wheels", LONGVQ_BUILD="0")
    assert wheel.name == "longvq_layers-0.1.0-py3-none-any.whl"


def test_the_build_is_reproducible_and_only_compiles_what_changed(sources, tmp_path):
    script = "import sys; sys.path.insert(0, 'csrc/build_support'); import native_library as n; print(n.build()[0])"
    first = run(sys.executable, "-c", script, cwd=sources).splitlines()
    assert len(first) > 5
    library = Path(first[-1])
    content = library.read_bytes()
    assert run(sys.executable, "-c", script, cwd=sources).splitlines() == [str(library)]

    with (sources / "csrc" / "common" / "cpu_capability.cpp").open("a") as file:
        file.write("// changed\n")
    assert len(run(sys.executable, "-c", script, cwd=sources).splitlines()) == 3  # one compilation, one link, the path

    other = shutil.copytree(sources, tmp_path / "other place", ignore=shutil.ignore_patterns("build"))
    again = Path(run(sys.executable, "-c", script, cwd=other).splitlines()[-1])
    assert again.read_bytes() == content


def test_the_sdist_can_be_built_from(user, sources, tmp_path):
    script = "import sys; sys.path.insert(0, 'csrc/build_support'); import backend; backend.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", script, tmp_path, cwd=sources)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {member.split("/", 1)[1] for member in archive.getnames() if "/" in member}
    shipped = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.[chp]*") if p.suffix != ".pyc"}
    assert shipped and shipped <= names
    assert {"LICENSE", "setup.py", "pyproject.toml", "csrc/build_support/backend.py"} <= names
    assert {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "Makefile", "SECURITY.md"} <= names
    assert not [n for n in names if n.endswith(".so") or n.endswith("_build_info.json")]

    run(user, "-m", "pip", "install", "--no-build-isolation", sdist, cwd=tmp_path)
    assert use(user, tmp_path)["loaded"]
