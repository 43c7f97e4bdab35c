"""What can happen to a store of shards on a disk."""

from __future__ import annotations

import shutil
from pathlib import Path

DAMAGES = ("truncated", "bit-flipped", "foreign", "misplaced", "unchecked", "missing")


def damage(store: Path, name: str, other: Path) -> str:
    """Damages the second shard of a store (`other` is one like it); returns what must be said of it."""
    shard = store / "shard-000001.safetensors"
    data = bytearray(shard.read_bytes())
    if name == "truncated":
        shard.write_bytes(data[: len(data) // 2])
        return "shard-000001.safetensors: truncated"
    if name == "bit-flipped":
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
        return "shard-000001.safetensors: corrupt, its bytes do not match shard-000001.sha256"
    if name == "foreign":
        for suffix in (".safetensors", ".sha256"):
            shutil.copy((other / shard.name).with_suffix(suffix), shard.with_suffix(suffix))
        return "shard-000001.safetensors: belongs to another recording or place"
    if name == "misplaced":
        for suffix in (".safetensors", ".sha256"):
            shutil.copy((store / "shard-000000.x").with_suffix(suffix), shard.with_suffix(suffix))
        return "it holds samples from 0 on of manifest"
    if name == "unchecked":
        shard.with_suffix(".sha256").unlink()
        return "shard-000001.safetensors: shard-000001.sha256 is missing"
    shard.unlink()
    return "1 shards are missing, first shard-000001.safetensors"
