"""What docs/recipe.md says of disk, memory and time: computed from shapes, at a throughput that is given.

    python -m benchmarks.recipe --tflops 400

The whole models are on the meta device; one and two layers of the student run once each, on the CPU, for what
autograd keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from ard.costs import dit_macs, student_macs
from ard.models import ARDTransformer, DiT
from ard.models.discriminator import Discriminator
from benchmarks.common import RESULTS, environment, write_json

_GIB = 2**30


@dataclass(frozen=True)
class RecipeConfig:
    """Disk, memory and time of the recipe, computed."""

    preset: str = "DiT-XL/2"
    """Architecture."""
    steps: int = 4
    """S."""
    history_layers: int = 6
    """N."""
    trajectories: int = 100_000
    """Recorded samples."""
    iterations: int = 300_000
    """Of the regression stage, batch 64."""
    gan_iterations: int = 20_000
    """Of the GAN stage, batch 48, all of them with both players."""
    images: int = 1_281_167
    """Real images of the GAN stage: ImageNet's."""
    tflops: float = 400.0
    """Sustained TFLOP/s of one GPU: an assumption, until one was measured."""
    out: Path = RESULTS / "recipe.json"
    """The JSON file."""


def _kept(teacher: dict[str, Any], steps: int, history: int, batch: int, checkpointing: bool) -> int:
    """Bytes that autograd keeps of a batch under bf16 autocast; weights and their casts included."""
    student = ARDTransformer(teacher, steps, min(history, teacher["depth"]))
    student.checkpointing = checkpointing
    states = torch.zeros(batch, steps, student.channels, *student.input_size)
    storages: dict[int, int] = {}
    alive: list[torch.Tensor] = []  # so that no two have the same address

    def pack(x: torch.Tensor) -> torch.Tensor:
        alive.append(x)
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        student(states, torch.zeros(batch, dtype=torch.int64))
    return sum(storages.values())


def kept_per_sample(teacher: dict[str, Any], steps: int, history: int, checkpointing: bool) -> int:
    """Bytes that autograd keeps of one further sample: in the first layer, and in every further one."""

    def grows(depth: int) -> int:
        one, two = (
            _kept({**teacher, "depth": depth}, steps, history, batch, checkpointing) for batch in (1, 2)
        )
        return two - one

    first, second = grows(1), grows(2)
    return first + (teacher["depth"] - 1) * (second - first)


def main() -> None:
    config = tyro.cli(RecipeConfig, config=(tyro.conf.OmitArgPrefixes,))
    with torch.device("meta"):
        teacher = DiT.from_preset(config.preset)
        student = ARDTransformer.from_teacher(teacher, config.steps, config.history_layers)
        discriminator = Discriminator(teacher.width, teacher.depth)
    weights = sum(p.numel() for p in student.parameters() if p.requires_grad)
    heads = sum(p.numel() for p in discriminator.parameters())
    frozen = sum(p.numel() for p in teacher.parameters())
    per_second = config.tflops * 1e12 / 2  # multiply-accumulates
    recording = config.trajectories * 25 * 2 * dit_macs(teacher.config).total
    once = student_macs(student.config).total
    passes = 3 * once  # forward, and twice that backward
    both = 2 * passes + once  # the GAN stage: teacher forced, sampled, and on what was sampled
    # Teacher: both results forward, and back to the student's pixels; heads: three passes, backward of two.
    look = dit_macs(teacher.config).total
    head = teacher.tokens * sum(p.numel() for p in discriminator.parameters() if p.dim() == 3)
    adversarial = both + 3 * look + (3 + 2 * 2 + 1) * head
    state_bytes = teacher.tokens * teacher.patch_size**2 * teacher.channels * 2
    rows = {
        "trajectory_bytes": (2 + 2 * 4) * state_bytes,
        "trajectories_gb": config.trajectories * (2 + 2 * 4) * state_bytes / 1e9,
        "student_weights": weights, "discriminator_weights": heads, "teacher_weights": frozen,
        # Float32: weights, gradients (which DDP reduces where they are), two moments, average; and what bf16
        # autocast keeps of the weights until the backward.
        "regression_state_gib": (20 + 2) * weights / _GIB,
        "gan_state_gib": ((20 + 2) * weights + (16 + 2) * heads + (4 + 2) * frozen) / _GIB,
        "checkpoint_gb": 16 * weights / 1e9,
        "gan_checkpoint_gb": (16 * weights + 12 * heads) / 1e9,
        "latents_gb": config.images * 2 * state_bytes / 1e9,  # of an image and of its mirror image
        "recording_gpu_hours": recording / per_second / 3600,
        "regression_gpu_hours": config.iterations * 64 * passes / per_second / 3600,
        "gan_gpu_hours": config.gan_iterations * 48 * adversarial / per_second / 3600,
    }  # fmt: skip
    for checkpointing in (False, True):
        name = f"kept_mib_per_sample{'_checkpointing' if checkpointing else ''}"
        kept = kept_per_sample(teacher.config, config.steps, config.history_layers, checkpointing)
        rows[name] = kept / 2**20
    write_json(config.out, {"computed": rows, "tflops": config.tflops, "environment": environment()})
    for name, value in rows.items():
        print(f"{name:36} {value:,.2f}" if isinstance(value, float) else f"{name:36} {value:,}")


if __name__ == "__main__":
    main()
