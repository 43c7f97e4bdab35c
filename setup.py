"""Builds ard_kernels._C with CMake and ninja; everything else is in pyproject.toml.

Without a C++ compiler the package is installed all the same, without compiled kernels, and
`python -m ard_kernels` says why. ARD_KERNELS_NATIVE=off leaves them out, =on makes a failure an error;
ARD_KERNELS_CUDA likewise for those that need nvcc, for the GPUs named by ARD_KERNELS_CUDA_ARCHS ("80 90").
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

_ROOT = Path(__file__).parent.resolve()
_CHOICES = ("auto", "on", "off")
_ARCHITECTURES, _OLDEST = "80;90;100", 80  # of NVIDIA GPUs that the CUDA kernels are made for


class _CMake(build_ext):
    def build_extension(self, ext: Extension) -> None:
        choice, cuda = _choice("ARD_KERNELS_NATIVE"), _choice("ARD_KERNELS_CUDA")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        absent = target.parent / "_C.absent"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        absent.unlink(missing_ok=True)
        try:
            if choice == "off":
                raise RuntimeError("switched off by ARD_KERNELS_NATIVE when the package was installed")
            self._build(target, cuda)
            self.made = target
        except (ImportError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
            if "on" in (choice, cuda):
                raise
            reason = _one_line(error)
            absent.write_text(reason + "\n")
            self.made = absent
            print(f"ard_kernels: no compiled kernels: {reason}", file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        """Of an editable installation: the kernels or why there are none, in place of what was there."""
        for ext in self.extensions:
            here = Path(self.get_ext_fullpath(ext.name))
            for old in (here, here.with_name("_C.absent")):
                old.unlink(missing_ok=True)
            self.copy_file(str(self.made), str(here.with_name(self.made.name)))

    def _build(self, target: Path, cuda: str) -> None:
        import pybind11

        # Of this Python and these compilers, which CMake asks for once. Kept: a second installation compiles
        # what has changed.
        here = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        build = _ROOT / "build" / f"cmake-{here}-{_compilers()}"
        build.mkdir(parents=True, exist_ok=True)
        _run(
            "cmake", "-G", "Ninja", "-S", _ROOT, "-B", build,
            f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_MAKE_PROGRAM={_ninja()}",
            f"-DARD_CUDA={cuda}", f"-DARD_CUDA_ARCHS={_architectures()}",
        )  # fmt: skip
        _run("cmake", "--build", build)
        (built,) = build.glob("_C.*" + target.suffix)
        self.copy_file(str(built), str(target))


def _compilers() -> str:
    """Another word for other compilers."""
    names = [os.environ.get(name, "") for name in ("CC", "CXX", "CUDACXX", "CUDAHOSTCXX", "CUDA_HOME")]
    names += [shutil.which(name) or "" for name in ("c++", "nvcc")]
    return hashlib.sha256("\0".join(names).encode()).hexdigest()[:8]


def _choice(name: str) -> str:
    choice = os.environ.get(name, "auto")
    if choice not in _CHOICES:
        raise SystemExit(f"environment variable {name} is {choice!r}, accepted are {', '.join(_CHOICES)}")
    return choice


def _architectures() -> str:
    """Those of the environment variable, else of the GPUs here, else all that the kernels are made for."""
    given = os.environ.get("ARD_KERNELS_CUDA_ARCHS")
    if given is not None:
        names = given.replace(",", " ").replace(";", " ").split()
        if not names or not all(re.fullmatch(r"[0-9]+[af]?", name) for name in names):
            raise SystemExit(f"environment variable ARD_KERNELS_CUDA_ARCHS is {given!r}, accepted are "
                             "compute capabilities such as '80 90 100'")  # fmt: skip
        return ";".join(names)
    try:
        seen = subprocess.run(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"],
                              capture_output=True, text=True, check=True).stdout  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        seen = ""
    found = {int(line.replace(".", "")) for line in seen.split() if re.fullmatch(r"[0-9]+[.][0-9]", line)}
    return ";".join(str(name) for name in sorted(found) if name >= _OLDEST) or _ARCHITECTURES


def _ninja() -> Path:
    """Named anew every time: an isolated build has one of its own, in a folder that is gone afterwards."""
    found = shutil.which("ninja")
    if found is None:
        raise RuntimeError("ninja is not there")
    return Path(found)


def _run(*command: object) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    sys.stdout.write(done.stdout)
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise RuntimeError(_reason(done.stdout + done.stderr) or f"{command[0]} ended with {done.returncode}")


def _reason(log: str) -> str:
    """What a build's log says first about why it failed."""
    lines = [line.strip() for line in log.splitlines()]
    for i, line in enumerate(lines):
        if line.startswith("CMake Error"):
            return " ".join(part for part in lines[i : i + 4] if part)
        if "error:" in line:
            return line
    return ""


def _one_line(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{error.filename} is not there"
    return " ".join(str(error).split())


setup(ext_modules=[Extension("ard_kernels._C", sources=[])], cmdclass={"build_ext": _CMake})
