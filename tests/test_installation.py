"""Installing from a clean checkout, with a compiler, without, and as a wheel beside another PyTorch.

    make test-install

Every test installs into an environment of its own, from the package index.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Mapping
from pathlib import Path

import pytest

pytestmark = pytest.mark.install

_ROOT = Path(__file__).resolve().parents[1]
_OTHER_TORCH = "2.11.0"  # the oldest that the package accepts
_NO_COMPILER = {"CXX": "/absent/c++", "CC": "/absent/cc"}

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
    return _run(python, "-c", f"import sys\nsys.path.append({sysconfig.get_path('purelib')!r})\n{code}")


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


# What is asked for, and what the report says then. Without nvcc no architecture can be asked for.
_CUDA = "for CUDA (adaLN)"
_NVCC = shutil.which("nvcc", path=f"{os.environ['PATH']}:/usr/local/cuda/bin") is not None
_CUDA_CASES = {
    "as it is": ({}, _CUDA if _NVCC else "nvcc is not there"),
    "nvcc that does not work": ({"CUDACXX": "/absent/nvcc"}, "nvcc (/absent/nvcc) does not work"),
    "no CUDA": ({"ARD_KERNELS_CUDA": "off"}, "switched off by ARD_KERNELS_CUDA"),
}
if _NVCC:
    _CUDA_CASES["one architecture"] = ({"ARD_KERNELS_CUDA": "on", "ARD_KERNELS_CUDA_ARCHS": "90"}, _CUDA)


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
    assert "nvcc (/absent/nvcc) is not there or does not work" in done.stderr + done.stdout


@pytest.mark.parametrize("options", [(), ("-e",)], ids=["copied", "editable"])
def test_without_a_compiler(checkout: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    python = _python(tmp_path / "venv")
    done = _install(python, *options, checkout, environment=_NO_COMPILER)
    assert done.returncode == 0, done.stderr
    report = _report(python)
    assert "absent" in report
    assert _NO_COMPILER["CXX"] in report


def test_an_editable_installation_is_what_the_last_one_made(checkout: Path, tmp_path: Path) -> None:
    python = _python(tmp_path / "venv")
    for environment, state in ((_NO_COMPILER, "absent"), ({"ARD_KERNELS_CUDA": "off"}, "available"),
                               (_NO_COMPILER, "absent")):  # fmt: skip
        done = _install(python, "-e", checkout, environment=environment)
        assert done.returncode == 0, done.stderr
        assert state in _report(python)
    assert not [*checkout.glob("ard_kernels/_C.cpython*")]


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
