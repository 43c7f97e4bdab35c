"""Weights from elsewhere as folders that the other commands take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ard.checkpoints import load_weights, read_tensors, save_teacher
from ard.diffusion import Diffusion, Prediction, Schedule
from ard.models import DiT


@dataclass(frozen=True)
class ConvertConfig:
    """Make a teacher's folder from the weights of a public DiT (.pt with plain tensors, or .safetensors)."""

    weights: Path
    """The file of weights. It is never executed: a pickle that holds anything but tensors is refused."""
    out: Path
    """Folder to write."""
    preset: str = "DiT-XL/2"
    """Architecture: DiT-{S,B,L,XL}/{2,4,8}."""
    input_size: int = 32
    """Height and width of the latent: 32 for 256 px, 64 for 512 px."""
    num_classes: int = 1000
    """Number of classes, the null class not counted."""
    noise_schedule: Schedule = "linear"
    """Noise schedule it was trained with."""
    prediction: Prediction = "eps"
    """What it predicts."""


def convert(config: ConvertConfig) -> None:
    tensors = read_tensors(config.weights)
    model = DiT.from_preset(config.preset, config.input_size, num_classes=config.num_classes)
    load_weights(model, tensors, config.weights)
    save_teacher(config.out, model, Diffusion(config.noise_schedule, config.prediction))
    print(f"teacher: {config.out}")
