"""Which code ran, and on what processor: what makes a number repeatable."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
"""Of the repository, where the package is used from one."""


def git(*arguments: str) -> str | None:
    """What git says in the repository; None without git, or where this is no repository of its own."""
    try:
        command = ["git", "-C", str(ROOT), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 and (ROOT / ".git").exists() else None


def cpu_name() -> str:
    """The processor's name, family and model: names alone do not tell a Zen 4 from a Zen 5."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" not in found:
        return platform.processor() or platform.machine()
    return f"{found['model name']}, family {found.get('cpu family')} model {found.get('model')}"


# oneDNN multiplies bfloat16 for PyTorch on CPUs. Under these limits it emulates what it has no instruction
# for: DiT's layers took 2 to 12 times as long as in float32 (a Xeon with AMX, limited).
_ONEDNN_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
_WITHOUT_BF16 = {
    "sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2", "avx512_core", "avx512_core_vnni"
}  # fmt: skip
_BF16_CAPABILITY = (8, 0)  # compute capability: the first with matrix instructions for bfloat16


def prefers_bf16(device: torch.device) -> tuple[bool, str]:
    """Return whether matrix products of bfloat16 are faster than those of float32, and the reason in words.

    True for GPUs from compute capability 8.0 on, and for processors with AVX512-BF16 or AMX that oneDNN is
    allowed to use. Nothing is timed: the answer is the same in every process on a machine.
    """
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        has = "has" if capability >= _BF16_CAPABILITY else "has no"
        name = ".".join(map(str, capability))
        return capability >= _BF16_CAPABILITY, f"compute capability {name} {has} bfloat16 matrix products"
    if device.type != "cpu":
        return False, f"bfloat16 was not measured on {device.type}"
    for variable in _ONEDNN_LIMITS:
        if os.environ.get(variable, "").lower() in _WITHOUT_BF16:
            return False, f"{variable} is {os.environ[variable]}, which has no bfloat16 products"
    if not torch.backends.mkldnn.is_available():
        return False, "this PyTorch was built without oneDNN, which multiplies bfloat16 on CPUs"
    if torch.cpu._is_amx_tile_supported():
        return True, "the processor has AMX"
    if torch.cpu._is_avx512_bf16_supported():
        return True, "the processor has AVX512-BF16"
    return False, "the processor has neither AVX512-BF16 nor AMX: bfloat16 products are emulated"
