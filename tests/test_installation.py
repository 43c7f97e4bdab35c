"""Installing from a clean checkout, with a compiler, without, and as a wheel beside another PyTorch.

    make test-install

Every test installs into an environment of its own, from the package index.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import venv
from collections.abc import Mapping
from pathlib import Path

import pytest

pytestmark = pytest.mark.install

_ROOT = Path(__file__).resolve().parents[1]
_OTHER_TORCH = "2.11.0"  # the oldest that the package accepts
_EMPTY = dict.fromkeys(("ARD_KERNELS_NATIVE", "ARD_KERNELS_CUDA", "ARD_KERNELS_CUDA_ARCHS"), "")
_NO_COMPILER = {"CXX": "/absent/c++", "CC": "/absent/cc", **_EMPTY}  # an empty variable is as good as none
_STRICT = ("--config-settings", "editable_mode=strict", "-e")

# The compiled kernels against the definition, and the library whose threads they share.
_USE = """
import torch
from ard_kernels import BlockLayout, block_attention, reference, use_backend
from ard_kernels.backends import native

q, k, v = torch.randn(3, 2, 70, 3, 40).unbind(0)
layout = BlockLayout((30, 40))
with use_backend("native"):
    got = block_attention(q, k, v, layout)
torch.testing.assert_close(got, reference.block_attention(q, k, v, layout), rtol=1e-4, atol=1e-5)
assert native.C.threaded()
print("used with torch", torch.__version__)
"""


def _run(*command: object, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    given = {key: value for key, value in os.environ.items() if not key.startswith("ARD_KERNELS")}
    # Not where the sources are: Python would import them.
    return subprocess.run(
        [str(part) for part in command], env={**given, **(environment or {})}, capture_output=True, text=True,
        cwd=tempfile.gettempdir(),
    )  # fmt: skip


def _python(folder: Path) -> Path:
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


def _install(
    python: Path, *what: str | Path, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Without what the package needs: PyTorch is that of the tests, except where a test has another."""
    return _run(python, "-m", "pip", "install", "--no-deps", *what, environment=environment)


def _beside_ours(python: Path, code: str) -> subprocess.CompletedProcess[str]:
    """With the packages of the tests' environment after its own: an installation of ours may be there too."""
    code = f"import sys\nsys.path.append({sysconfig.get_path('purelib')!r})\n{code}"
    return _run(python, "-c", code, environment={"ARD_KERNELS_ISA": ""})


def _report(python: Path) -> str:
    done = _beside_ours(python, "import runpy\nrunpy.run_module('ard_kernels', run_name='__main__')")
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("native"))
    return line


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files that git knows, as they are now."""
    folder = tmp_path / "checkout"
    for name in _run("git", "-C", _ROOT, "ls-files", "-z").stdout.split("\0"):
        if name and (_ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(_ROOT / name, folder / name)
    return folder


def _edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.fixture
def quick(checkout: Path) -> Path:
    """A checkout that compiles one instruction set."""
    _edit(checkout / "CMakeLists.txt", "portable;avx2;avx512;avx512_bf16;amx", "portable")
    return checkout


def _builder(folder: Path) -> Path:
    """An environment with what pip installs into one of its own, a new one each time."""
    python = _python(folder)
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text())
    done = _run(python, "-m", "pip", "install", *project["build-system"]["requires"])
    assert done.returncode == 0, done.stderr
    return python


def _write_tool(path: Path, script: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


# What is asked for, and what the report says then. Without nvcc no architecture can be asked for.
_CUDA = "for CUDA (adaLN, compute capabilities"
_NVCC = shutil.which("nvcc", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
_CUDA_CASES = {
    "as it is": ({}, _CUDA if _NVCC else "nvcc is not there"),
    "nvcc that is not there": ({"CUDACXX": "/absent/nvcc"}, "nvcc (/absent/nvcc) failed: "),
    "no CUDA": ({"ARD_KERNELS_CUDA": "off"}, "switched off by ARD_KERNELS_CUDA"),
}
if _NVCC:
    _CUDA_CASES["one architecture"] = (
        {"ARD_KERNELS_CUDA": "on", "ARD_KERNELS_CUDA_ARCHS": "90"},
        f"{_CUDA} 90)",
    )


@pytest.mark.parametrize("case", _CUDA_CASES)
def test_with_a_compiler(checkout: Path, tmp_path: Path, case: str) -> None:
    environment, reported = _CUDA_CASES[case]
    python = _python(tmp_path / "venv")
    done = _install(python, checkout, environment=environment)
    assert done.returncode == 0, done.stderr
    report = _report(python)
    assert "available" in report
    assert reported in report
    used = _beside_ours(python, _USE)
    assert used.returncode == 0, used.stderr


def test_where_cuda_is_demanded_and_nvcc_does_not_work(checkout: Path, tmp_path: Path) -> None:
    python = _python(tmp_path / "venv")
    done = _install(python, checkout, environment={"ARD_KERNELS_CUDA": "on", "CUDACXX": "/absent/nvcc"})
    assert done.returncode != 0
    assert "demanded, but the build with nvcc (/absent/nvcc) failed" in done.stderr + done.stdout


def _path_without_nvcc(folder: Path) -> str:
    """PATH, with links to all other tools for a folder that has nvcc."""
    places = [Path(place) for place in os.environ["PATH"].split(os.pathsep)]
    for i, place in enumerate(places):
        if (place / "nvcc").exists():
            places[i] = folder / str(i)
            places[i].mkdir(parents=True)
            for tool in place.iterdir():
                if tool.name != "nvcc":
                    (places[i] / tool.name).symlink_to(tool)
    return os.pathsep.join(map(str, places))


def test_with_a_compiler_and_without_nvcc(quick: Path, tmp_path: Path) -> None:
    _edit(quick / "setup.py", "/usr/local/cuda/bin", "/absent")
    environment = {"PATH": _path_without_nvcc(tmp_path / "tools"), "CUDACXX": "", "CUDA_HOME": ""}
    python = _python(tmp_path / "venv")
    done = _install(python, quick, environment={**environment, "ARD_KERNELS_CUDA": "on"})
    assert done.returncode != 0
    assert "CUDA kernels are demanded, but nvcc is not there" in done.stderr + done.stdout
    done = _install(python, quick, environment=environment)
    assert done.returncode == 0, done.stderr
    report = _report(python)
    assert "available" in report
    assert "nvcc is not there" in report


def _refusing(nvcc: Path, what: str, said: str, otherwise: str) -> None:
    """An nvcc that knows one of our architectures, and fails where its arguments say `what`."""
    _write_tool(
        nvcc,
        f"""case "$*" in
*list-gpu-arch*) echo compute_75; echo compute_90 ;;
*{what}*) printf '%b\\n' {shlex.quote(said)} >&2; exit 1 ;;
*) {otherwise} ;;
esac""",
    )


def _cuda_home(folder: Path) -> tuple[Path, dict[str, str]]:
    """Where an nvcc is to be, and what makes it the one: CUDA_HOME comes before PATH, where the real one may
    be."""
    _write_tool(folder / "tools" / "nvidia-smi", "exit 1")  # the default architectures, also on a GPU
    (folder / "cuda" / "bin").mkdir(parents=True)
    path = f"{folder / 'tools'}{os.pathsep}{os.environ['PATH']}"
    home = {"CUDA_HOME": str(folder / "cuda"), "CUDACXX": "", "PATH": path}
    return folder / "cuda" / "bin" / "nvcc", home


def test_why_an_nvcc_fails_is_said_in_its_words(quick: Path, tmp_path: Path) -> None:
    python = _python(tmp_path / "venv")
    nvcc, environment = _cuda_home(tmp_path)
    long = "/usr/include/crt/host_config.h:138:2: error: #error -- unsupported GNU version! gcc later than 13"
    for said, reported in (
        ("nvcc fatal   : 1 'x\"; #%%", "nvcc fatal : 1 'x'' '%%"),
        ("sh: 1: cicc: not found", "sh: 1: cicc: not found"),
        (long, long.replace("#", "'")),
        ("\\344: Fehler", "': Fehler"),  # bytes that are no UTF-8
    ):
        _refusing(nvcc, "arch=", said, "exit 2")
        done = _install(python, "-v", "-e", quick, environment=environment)
        assert done.returncode == 0, done.stderr
        assert f"nvcc ({nvcc}) does not know sm_80, sm_100" in done.stderr + done.stdout
        report = _report(python)
        assert "available" in report
        assert f"nvcc ({nvcc}) failed: " in report
        assert reported in report


def test_an_nvcc_that_fails_costs_the_cuda_kernels_alone_until_it_is_mended(
    quick: Path, tmp_path: Path
) -> None:
    """One that compiles nothing, and says nothing, ends in CMake; then, with a real one, our source fails and
    at last nothing."""
    python = _python(tmp_path / "venv")
    nvcc, environment = _cuda_home(tmp_path)
    stages = [("nothing", 'for last; do :; done; touch "$last"', f"nvcc ({nvcc}) failed: CMake Error")]
    if _NVCC:
        real = f'exec {_NVCC} "$@"'
        stages += [
            ("adaln", real, f"nvcc ({nvcc}) failed: ptxas error : 2"),
            ("nothing", real, f"{_CUDA} 90)"),
        ]
    for refused, otherwise, reported in stages:
        _refusing(nvcc, refused, "ptxas error   : 2", otherwise)
        done = _install(python, "-e", quick, environment=environment)
        assert done.returncode == 0, done.stderr
        report = _report(python)
        assert "available" in report
        assert reported in report


def test_an_assembler_that_is_older_than_the_compiler_costs_its_instructions_alone(
    checkout: Path, tmp_path: Path
) -> None:
    """One that knows no tiles; nothing but their kernels and the portable ones are built here."""
    _edit(checkout / "CMakeLists.txt", "portable;avx2;avx512;avx512_bf16;amx", "portable;amx")
    real = _run("gcc", "-print-prog-name=as").stdout.strip()
    _write_tool(
        tmp_path / "tools" / "as",
        f"""for file; do :; done
if grep -q tilerelease "$file"; then echo "$file: Error: no such instruction" >&2; exit 1; fi
exec {real} "$@\"""",
    )
    environment = {"CC": "gcc", "CXX": f"g++ -B{tmp_path / 'tools'}", "ARD_KERNELS_CUDA": "off"}
    python = _python(tmp_path / "venv")
    done = _install(python, checkout, environment=environment)
    assert done.returncode == 0, done.stderr
    assert "available" in _report(python)
    named = _beside_ours(python, "from ard_kernels import _C; print(_C.instruction_sets())")
    assert named.stdout == "['portable']\n"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("fast", "accepted are compute capabilities"),
        ("75", "80 or newer"),
        ("90 199", "does not know sm_199"),
    ],
)
def test_architectures_without_kernels_are_an_error(
    checkout: Path, tmp_path: Path, given: str, said: str
) -> None:
    python, nvcc = _python(tmp_path / "venv"), tmp_path / "tools" / "nvcc"
    _write_tool(nvcc, "echo compute_80; echo compute_90")
    done = _install(python, checkout, environment={"ARD_KERNELS_CUDA_ARCHS": given, "CUDACXX": str(nvcc)})
    assert done.returncode != 0
    assert "ARD_KERNELS_CUDA_ARCHS" in done.stderr + done.stdout
    assert said in done.stderr + done.stdout


@pytest.mark.parametrize("options", [(), ("-e",), _STRICT], ids=["copied", "editable", "strict"])
def test_without_a_compiler(checkout: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    python = _python(tmp_path / "venv")
    done = _install(python, *options, checkout, environment=_NO_COMPILER)
    assert done.returncode == 0, done.stderr
    report = _report(python)
    assert "absent" in report
    assert _NO_COMPILER["CXX"] in report


@pytest.mark.parametrize("options", [("-e",), _STRICT], ids=["editable", "strict"])
def test_an_editable_installation_is_what_the_last_one_made(
    quick: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    python = _python(tmp_path / "venv")
    for environment, state in ((_NO_COMPILER, "absent"), ({"ARD_KERNELS_CUDA": "off"}, "available"),
                               (_NO_COMPILER, "absent")):  # fmt: skip
        done = _install(python, *options, quick, environment=environment)
        assert done.returncode == 0, done.stderr
        assert state in _report(python)
    assert not [*quick.glob("ard_kernels/_C.cpython*")]


def test_a_second_installation_compiles_what_has_changed(quick: Path, tmp_path: Path) -> None:
    python = _builder(tmp_path / "venv")
    environment = {"ARD_KERNELS_CUDA": "off", "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
    made: list[dict[str, int]] = []
    for _ in range(2):
        (quick / "csrc" / "cpu" / "parallel.cpp").touch()
        done = _install(python, "--no-build-isolation", "-e", quick, environment=environment)
        assert done.returncode == 0, done.stderr
        made.append({path.name: path.stat().st_mtime_ns for path in quick.glob("build/cmake-*/**/*.o")})
    first, second = made
    assert first.keys() == second.keys() == {"bindings.cpp.o", "parallel.cpp.o", "kernels.cpp.o"}
    assert [name for name in first if second[name] != first[name]] == ["parallel.cpp.o"]


def test_without_a_compiler_where_the_kernels_are_demanded(checkout: Path, tmp_path: Path) -> None:
    python = _python(tmp_path / "venv")
    done = _install(python, checkout, environment={**_NO_COMPILER, "ARD_KERNELS_NATIVE": "on"})
    assert done.returncode != 0
    assert _NO_COMPILER["CXX"] in done.stderr + done.stdout


def test_switched_off(checkout: Path, tmp_path: Path) -> None:
    python = _python(tmp_path / "venv")
    done = _install(python, checkout, environment={"ARD_KERNELS_NATIVE": "off"})
    assert done.returncode == 0, done.stderr
    report = _report(python)
    assert "absent" in report
    assert "ARD_KERNELS_NATIVE" in report


def test_a_wheel_of_an_sdist(quick: Path, tmp_path: Path) -> None:
    python = _builder(tmp_path / "builder")
    pack = f"import os\nos.chdir({str(quick)!r})\nfrom setuptools import build_meta\n"
    packed = _run(python, "-c", f"{pack}build_meta.build_sdist({str(tmp_path)!r})")
    assert packed.returncode == 0, packed.stderr
    (sdist,) = tmp_path.glob("*.tar.gz")
    built = _run(python, "-m", "pip", "wheel", "--no-deps", "-w", tmp_path, sdist,
                 environment={"ARD_KERNELS_CUDA": "off"})  # fmt: skip
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    python = _python(tmp_path / "venv")
    assert _install(python, wheel).returncode == 0
    used = _beside_ours(python, _USE)
    assert used.returncode == 0, used.stderr


def test_a_wheel_beside_another_pytorch(checkout: Path, tmp_path: Path) -> None:
    built = _run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", tmp_path / "wheels", checkout)
    assert built.returncode == 0, built.stderr
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    python = _python(tmp_path / "venv")
    done = _run(python, "-m", "pip", "install", f"torch=={_OTHER_TORCH}", "numpy", "safetensors")
    assert done.returncode == 0, done.stderr
    assert _install(python, wheel).returncode == 0
    used = _run(python, "-c", _USE)
    assert used.returncode == 0, used.stderr
    assert f"used with torch {_OTHER_TORCH}" in used.stdout
