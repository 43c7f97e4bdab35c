"""What the Triton and CUDA kernels compile to, on a machine that needs no GPU.

    python -m ard_kernels compile-report [--arch 90] [--json FILE]

Every production configuration of the Triton kernels is compiled ahead of time and its machine code read with
the cuobjdump that Triton carries: registers a thread, spilled bytes, stack, shared memory, and the number of
warpgroup matrix instructions (HGMMA, sm_90). The CUDA kernels are read from ard_kernels._C, for the
architectures that they were built for; their dynamic shared memory, (3, D) floats at most, is not counted. A
kernel that spills or misses the tensor cores is found here.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 90, 100)

# Shared memory one thread block can have, bytes (CUDA C++ Programming Guide, "Technical Specifications per
# Compute Capability").
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}

_FAMILIES = ("attention", "adaln")


@dataclass(frozen=True)
class Production:
    """One kernel as it is launched in practice."""

    name: str
    kernel: Any
    """The function under @triton.jit."""
    signature: dict[str, str]
    """Triton type of every argument that is not a compile-time constant: "*bf16", "i32", ..."""
    constexprs: dict[str, Any]
    options: dict[str, int]
    """num_warps, num_stages."""
    divisible: tuple[str, ...] = ()
    """Integer arguments that are multiples of 16 in practice; pointers always are."""


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one `Production` on one architecture."""

    name: str
    arch: int
    warps: int
    registers: int
    """Per thread."""
    spilled: int
    """Bytes of local memory a thread uses."""
    stack: int
    """Bytes of stack a thread uses."""
    shared: int
    """Bytes of shared memory a block uses, static and dynamic."""
    hgmma: int
    """Warpgroup matrix instructions in the machine code (sm_90)."""
    wide_loads: int
    """Global loads of 16 bytes a thread, asynchronous copies included."""
    narrow_loads: int
    """Global loads of less than 4 bytes a thread."""
    trap: bool = False
    """It does nothing but stop: Triton makes that of tiles for which tensor memory has no room (sm_100)."""
    warnings: tuple[str, ...] = field(default=())
    """What ptxas says about serialised matrix instructions (C7510 and its like)."""


def productions(arch: int) -> Iterator[Production]:
    """Every production configuration of every family on sm_`arch`."""
    for family in _FAMILIES:
        yield from importlib.import_module(f"ard_kernels.backends.{family}_triton").production_kernels(arch)


def compile_one(production: Production, arch: int) -> Compiled:
    """Compiles ahead of time for sm_`arch`. Raises what the compiler raises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = production.kernel.arg_names
    signature = {name: production.signature.get(name, "constexpr") for name in names}
    divisible = [n for n, t in production.signature.items() if t.startswith("*") or n in production.divisible]
    source = ASTSource(
        fn=production.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in production.constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=production.options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder) / "kernel.cubin", Path(folder) / "kernel.ptx"
        cubin.write_bytes(compiled.asm["cubin"])
        ptx.write_text(compiled.asm["ptx"])
        usage = _run(tools / "cuobjdump", "--dump-resource-usage", cubin)
        sass = _run(tools / "cuobjdump", "--dump-sass", cubin)
        ptxas = "ptxas-blackwell" if arch >= 100 else "ptxas"
        messages = _run(tools / ptxas, f"-arch=sm_{arch}{'a' if arch >= 90 else ''}", ptx,
                        "-o", Path(folder) / "again.cubin")  # fmt: skip
    counts = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    loads = re.findall(r"\b(?:LDG|LDGSTS)\.([A-Z0-9_.]+)", sass)
    return Compiled(
        name=production.name,
        arch=arch,
        warps=production.options["num_warps"],
        registers=counts["REG"],
        spilled=counts["LOCAL"],
        stack=counts["STACK"],
        shared=counts["SHARED"] + compiled.metadata.shared,
        hgmma=len(re.findall(r"\bHGMMA\b", sass)),
        wide_loads=sum(".128" in f".{load}" for load in loads),
        narrow_loads=sum(bool(re.search(r"\.[US](8|16)\b", f".{load}")) for load in loads),
        trap="EXIT" not in sass,
        warnings=tuple(sorted(set(re.findall(r"C75\d\d[^\n]*", messages)))),
    )


_TYPES = {"f": "fp32", "NS_4bf16E": "bf16", "S2_": "bf16"}
_KERNEL = re.compile(r"4cuda\d+(forward|backward|add_slices)I(.*?)EEv")


def _cuda_name(mangled: str) -> tuple[str, int]:
    """A CUDA kernel's name for readers, and its most warps."""
    match = _KERNEL.search(mangled)
    if match is None:
        return mangled, 0
    kind, rest = match.groups()
    names = [_TYPES[part] for part in re.findall(r"f|NS_4bf16E|S2_", rest.partition("L")[0])]
    numbers = [int(n) for n in re.findall(r"L[ib](\d+)E", rest + "E")]
    if kind == "add_slices":
        return f"adaln cuda add_slices {names[0]}", 8
    types = "bf16" if names == ["bf16", "bf16"] else "/".join(names)
    if kind == "forward":
        vectors, gate, norm = numbers
        return f"adaln cuda forward D={128 * vectors} {types}{' gate' * gate}{' norm' * norm}", 4
    _, gate, norm, cluster = numbers
    return f"adaln cuda backward{' cluster' * cluster} {types}{' gate' * gate}{' norm' * norm}", 5


def built_for_cuda() -> Iterator[Compiled]:
    """The CUDA kernels of ard_kernels._C, on every architecture that they were built for; none without."""
    import triton

    from ard_kernels.backends import native

    if native.CUDA_REASON is not None:
        return
    assert native.C is not None
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    arch, name = 0, ""
    for line in _run(cuobjdump, "--dump-resource-usage", str(native.C.__file__)).splitlines():
        if found := re.match(r"arch = sm_(\d+)", line):
            arch = int(found.group(1))
        elif found := re.match(r" *Function (\S+):", line):
            name = found.group(1)
        elif "REG:" in line:
            counts = {key: int(n) for key, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
            readable, warps = _cuda_name(name)
            yield Compiled(readable, arch, warps, counts["REG"], counts["LOCAL"], counts["STACK"],
                           counts["SHARED"], 0, 0, 0)  # fmt: skip


def _run(tool: Path, *arguments: str | Path) -> str:
    done = subprocess.run([str(tool), *map(str, arguments)], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def unavailable() -> str | None:
    """Why no report can be made here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    import triton

    if triton.knobs.runtime.interpret:
        return "Triton's interpreter is on; unset TRITON_INTERPRET"
    return None


def faults(row: Compiled) -> list[str]:
    """What makes a kernel unfit: spills, stack, too much shared memory, serialised or missing wgmma."""
    found = []
    if row.spilled or row.stack:
        found.append(f"{row.spilled} bytes spilled, {row.stack} bytes of stack")
    if row.shared > SHARED_LIMIT[row.arch]:
        found.append(f"{row.shared} bytes of shared memory, accepted are {SHARED_LIMIT[row.arch]}")
    # In float32 tiles are narrower than a warpgroup's 64 rows.
    products = re.match(r"attention (forward|dq|dkv|fused)(?! fp32)", row.name)
    if row.arch == 90 and products and not row.hgmma:
        found.append("no warpgroup matrix instruction")
    if row.trap:
        found.append("no room for its tiles: compiled to a trap")
    return found + list(row.warnings)


def compile_all(architectures: Sequence[int] = ARCHITECTURES, only: str = "") -> Iterator[Compiled]:
    """Compiles every production whose name contains `only`, several at a time, in order."""
    jobs = [(p.name, arch) for arch in architectures for p in productions(arch) if only in p.name]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(_compile_named, *zip(*jobs, strict=True)) if jobs else ()


def _compile_named(name: str, arch: int) -> Compiled:
    return compile_one(next(p for p in productions(arch) if p.name == name), arch)


def table(rows: Sequence[Compiled]) -> str:
    """The report as text."""
    head = f"{'kernel':52} sm   warps  regs  spill  stack  shared KiB  HGMMA  16-byte / narrow loads"
    lines = []
    for r in rows:
        line = f"{r.name:52} {r.arch:<4} {r.warps:5} {r.registers:5} {r.spilled:6} {r.stack:6} "
        line += f"{r.shared / 1024:11.1f} {r.hgmma:6}  {r.wide_loads} / {r.narrow_loads}"
        lines.append("  ".join([line, *r.warnings]))
    return "\n".join([head, *lines])


def as_json(rows: Sequence[Compiled]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]
