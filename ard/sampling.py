"""Sampling from a student: S network evaluations, each fed with the ones before it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ard.checkpoints import load_student, replacing
from ard.data import index_noise, to_uint8
from ard.models import ARDTransformer
from ard.pictures import image_grid, save_png


@torch.no_grad()
def sample(student: ARDTransformer, noise: Tensor, labels: Tensor) -> Tensor:
    """The student's trajectories.

    Args:
        noise: (B, C, h, w).
        labels: (B,) int64 in 0..num_classes-1.

    Returns:
        (B, S, C, h, w) in the dtype of the noise: states 1..S. path[:, -1] is the result.

    The history layers keep keys and values of earlier steps, in the autocast dtype where there is one, else
    in the dtype of the weights.
    """
    expected = (student.channels, *student.input_size)
    if noise.dim() != 4 or tuple(noise.shape[1:]) != expected:
        raise ValueError(
            f"sample: noise has shape {tuple(noise.shape)}, accepted is (B, {', '.join(map(str, expected))})"
        )
    if labels.shape != noise.shape[:1]:
        raise ValueError(
            f"sample: labels has shape {tuple(labels.shape)}, accepted is ({len(noise)},), one per noise"
        )
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < student.num_classes:
        raise ValueError(f"sample: labels are {int(labels.min())}..{int(labels.max())}, accepted are "
                         f"0..{student.num_classes - 1}")  # fmt: skip
    device = noise.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else student.pos_embed.dtype
    cache = student.cache(len(noise), dtype, noise.device)
    tables = student.modulation(labels)
    path = noise.new_empty(len(noise), student.steps, *expected)
    state = noise
    for step in range(student.steps):
        path[:, step] = student.step(state, step, tables, cache)
        state = path[:, step]
    return path


@dataclass(frozen=True)
class SampleConfig:
    """Sample from a student: a picture grid, and all images as an .npz for the ADM evaluator.

    A student in a latent space needs its latents decoded by a VAE: then --latents keeps them as they are.
    """

    student: Path
    """Folder of the student."""
    out: Path
    """Folder for samples.png and samples.npz (arr_0: (n, h, w, 1 or 3) uint8; labels: (n,))."""
    samples: int = 100
    """How many."""
    labels: tuple[int, ...] | None = None
    """Classes, repeated as often as needed; default: all in turn."""
    batch_size: int = 100
    """Samples per pass."""
    seed: int = 0
    """Seed of the noise; sample i's noise is a function of (seed, i)."""
    latents: bool = False
    """Write the result's float32 values (n, C, h, w) instead of uint8 images."""


def run(config: SampleConfig) -> None:
    student, _ = load_student(config.student)
    if config.samples < 1 or config.batch_size < 1:
        raise ValueError(
            f"sample: samples is {config.samples}, batch_size {config.batch_size}; accepted are integers >= 1"
        )
    classes = torch.tensor(config.labels if config.labels else range(student.num_classes))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student.to(device)
    made = []
    indices = torch.arange(config.samples)
    for some in tqdm(indices.split(config.batch_size), desc="sample", mininterval=1.0):
        noise = index_noise(some, (student.channels, *student.input_size), config.seed)
        labels = classes[some % len(classes)]
        made.append(sample(student, noise.to(device), labels.to(device))[:, -1].cpu())
    results = torch.cat(made)
    save_png(config.out / "samples.png", image_grid(results[:100], columns=min(10, config.samples)))
    images = results if config.latents else to_uint8(results).permute(0, 2, 3, 1)
    with replacing(config.out / "samples.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, arr_0=images.numpy(), labels=classes[indices % len(classes)].numpy())
    print(f"samples: {config.out / 'samples.png'}, {config.out / 'samples.npz'}")
