"""Builds ard_kernels._C with CMake and ninja; everything else is in pyproject.toml.

Without a C++ compiler the package is installed all the same, without compiled kernels; where nvcc is absent
or fails, without those for CUDA. `python -m ard_kernels` says why. ARD_KERNELS_NATIVE=off leaves them out,
=on makes a failure an error; ARD_KERNELS_CUDA likewise for those that need nvcc, for the GPUs named by
ARD_KERNELS_CUDA_ARCHS ("80 90"). An empty variable is as good as none.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

_ROOT = Path(__file__).parent.resolve()
_CHOICES = ("auto", "on", "off")
_ARCHITECTURES, _OLDEST = ["80", "90", "100"], 80  # of NVIDIA GPUs that the CUDA kernels are made for
_FAILURES = (ImportError, OSError, RuntimeError, ValueError)


class _CMake(build_ext):
    def build_extension(self, ext: Extension) -> None:
        choice, cuda, asked = _choice("ARD_KERNELS_NATIVE"), _choice("ARD_KERNELS_CUDA"), _asked_for()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        absent = target.parent / "_C.absent"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        absent.unlink(missing_ok=True)
        try:
            if choice == "off":
                raise RuntimeError("switched off by ARD_KERNELS_NATIVE when the package was installed")
            self._build(target, cuda, asked)
            self.made = target
        except _FAILURES as error:
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

    def get_outputs(self) -> list[str]:
        return [str(self.made)]

    def get_output_mapping(self) -> dict[str, str]:
        """Of an editable installation: what was made, and its copy, to which editable_mode=strict links."""
        places = [Path(self.get_ext_fullpath(ext.name)) for ext in self.extensions if self.inplace]
        return {str(self.made): str(here.with_name(self.made.name)) for here in places}

    def _build(self, target: Path, cuda: str, asked: list[str]) -> None:
        """With CUDA kernels where nvcc makes them; else with the reason, unless they are demanded."""
        nvcc = _nvcc()
        if cuda == "off":
            reason = "switched off by ARD_KERNELS_CUDA when the package was installed"
        elif not nvcc:
            reason = "nvcc is not there"
        else:
            try:
                known = _architectures(nvcc, asked)
                _compiles(nvcc, known[0])
                architectures = ";".join(known)
                self._compile(target, nvcc, "-DARD_CUDA=on", f"-DARD_CUDA_ARCHS={architectures}",
                              f"-DCMAKE_CUDA_COMPILER={nvcc}")  # fmt: skip
                return
            except _FAILURES as error:
                reason = f"the build with nvcc ({nvcc}) failed: {_one_line(error)}"
        if cuda == "on":
            raise RuntimeError(f"CUDA kernels are demanded, but {reason}")
        # Without what would not pass through CMake and a command line into a C++ string.
        plain = re.sub(r"[^ -~]|[\"\\;$#]", "'", reason)
        self._compile(target, nvcc, "-DARD_CUDA=off", f"-DARD_NO_CUDA={plain}")

    def _compile(self, target: Path, nvcc: str, *options: str) -> None:
        import pybind11

        # Of this Python and these compilers, which CMake asks for once. Kept: a second installation compiles
        # what has changed, and one without CUDA keeps what one with CUDA compiled for the CPU.
        here = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        build = _ROOT / "build" / f"cmake-{here}-{_compilers(nvcc)}"
        build.mkdir(parents=True, exist_ok=True)
        _run(
            "cmake", "-G", "Ninja", "-S", _ROOT, "-B", build,
            f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_MAKE_PROGRAM={_ninja()}", *options,
        )  # fmt: skip
        _run("cmake", "--build", build)
        (built,) = build.glob("_C.*" + target.suffix)
        self.copy_file(str(built), str(target))


def _nvcc() -> str:
    """That of CUDACXX, else of CUDA_HOME, of PATH, or where NVIDIA installs it; empty where there is none."""
    named, home = os.environ.get("CUDACXX"), os.environ.get("CUDA_HOME")
    if named:
        return shutil.which(named) or named
    places = [f"{home}/bin"] if home else []
    places += [os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(places)) or ""


def _compilers(nvcc: str) -> str:
    """Another word for other compilers, and for others in the same place."""
    names = [nvcc, shutil.which("c++") or ""]
    names += [os.environ.get(name, "") for name in ("CC", "CXX", "CUDAHOSTCXX")]
    for command in ([nvcc], shlex.split(os.environ.get("CXX") or "c++")):
        with contextlib.suppress(OSError):
            names.append(_captured(*command, "--version").stdout)
    return hashlib.sha256("\0".join(names).encode()).hexdigest()[:8]


def _choice(name: str) -> str:
    choice = os.environ.get(name) or "auto"
    if choice not in _CHOICES:
        raise SystemExit(f"environment variable {name} is {choice!r}, accepted are {', '.join(_CHOICES)}")
    return choice


def _asked_for() -> list[str]:
    """The architectures that the environment variable names."""
    given = os.environ.get("ARD_KERNELS_CUDA_ARCHS", "")
    names = given.replace(",", " ").replace(";", " ").split()
    if not all(re.fullmatch(r"[0-9]+[af]?", name) and _number(name) >= _OLDEST for name in names):
        raise SystemExit(f"environment variable ARD_KERNELS_CUDA_ARCHS is {given!r}, accepted are "
                         f"compute capabilities such as '80 90 100', {_OLDEST} or newer")  # fmt: skip
    return list(dict.fromkeys(names))


def _architectures(nvcc: str, asked: list[str]) -> list[str]:
    """Those asked for; else, as far as nvcc knows them, of the GPUs here, without one all that are ours."""
    known = {int(number) for number in re.findall(r"compute_([0-9]+)", _run(nvcc, "--list-gpu-arch"))}
    wanted = asked or _of_gpus() or _ARCHITECTURES
    unknown = [name for name in wanted if _number(name) not in known]
    if unknown:
        message = f"nvcc ({nvcc}) does not know sm_{', sm_'.join(unknown)}"
        if asked:
            raise SystemExit(f"environment variable ARD_KERNELS_CUDA_ARCHS: {message}")
        if unknown == wanted:
            raise RuntimeError(message)
        print(f"ard_kernels: CUDA kernels for the other architectures: {message}", file=sys.stderr)
    return [name for name in wanted if name not in unknown]


def _compiles(nvcc: str, architecture: str) -> None:
    """An error in nvcc's own words if it does not: CMake would say no more than that it knows no such
    compiler."""
    flags = shlex.split(os.environ.get("CUDAFLAGS", ""))
    if host := os.environ.get("CUDAHOSTCXX"):
        flags += ["-ccbin", host]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "empty.cu")
        source.touch()
        _run(nvcc, *flags, f"-arch=sm_{architecture}", "-c", source, "-o", source.with_suffix(".o"))


def _number(architecture: str) -> int:
    return int(architecture.rstrip("af"))


def _of_gpus() -> list[str]:
    """The architectures of the GPUs here that the kernels are for."""
    try:
        asked = _captured("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    except OSError:
        return []
    seen = "" if asked.returncode else asked.stdout
    found = {int(line.replace(".", "")) for line in seen.split() if re.fullmatch(r"[0-9]+[.][0-9]", line)}
    return [str(number) for number in sorted(found) if number >= _OLDEST]


def _ninja() -> Path:
    """Named anew every time: an isolated build has one of its own, in a folder that is gone afterwards."""
    found = shutil.which("ninja")
    if found is None:
        raise RuntimeError("ninja is not there")
    return Path(found)


def _captured(*command: object) -> subprocess.CompletedProcess[str]:
    """With messages in English, whose "error" is looked for, and whatever bytes they have."""
    words = [str(part) for part in command]
    english = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(words, capture_output=True, text=True, errors="replace", env=english)


def _run(*command: object) -> str:
    done = _captured(*command)
    sys.stdout.write(done.stdout)
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise RuntimeError(_reason(done.stdout + done.stderr) or f"{command[0]} ended with {done.returncode}")
    return done.stdout


def _reason(log: str) -> str:
    """What a build's log says first about why it failed: a compiler or assembler, which CMake may quote, else
    CMake, else its last line."""
    lines = [line.strip() for line in log.splitlines()]
    for line in lines:
        # "x.cpp:1:2: error: ...", "x.cu(1): error #20-D: ...", "nvcc fatal   : ...", "ptxas error   : ..."
        cmake = line.startswith("CMake Error")
        if not cmake and re.search(r"\b(error|fatal)( #\S+)? *:", line, re.IGNORECASE):
            return line
    for i, line in enumerate(lines):
        if line.startswith("CMake Error"):
            return " ".join(part for part in lines[i : i + 4] if part)
    return next((line for line in reversed(lines) if line), "")


def _one_line(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{error.filename} is not there"
    return " ".join(str(error).split())


setup(ext_modules=[Extension("ard_kernels._C", sources=[])], cmdclass={"build_ext": _CMake})
