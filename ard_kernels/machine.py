"""Which code ran, and on what processor: what makes a number repeatable."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

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
