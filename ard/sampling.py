"""Sampling from a student: S network evaluations, each fed with the ones before it."""

from __future__ import annotations

import torch
from torch import Tensor

from ard.models import ARDTransformer


@torch.no_grad()
def sample(student: ARDTransformer, noise: Tensor, labels: Tensor) -> Tensor:
    """The student's trajectories.

    Args:
        noise: (B, C, h, w).
        labels: (B,) int64 in 0..num_classes-1.

    Returns:
        (B, S, C, h, w) in the dtype of the noise: states 1..S. path[:, -1] is the result.

    The history layers keep keys and values of earlier steps, in the autocast dtype where there is one, else in the
    dtype of the weights.
    """
    expected = (student.channels, *student.input_size)
    if noise.dim() != 4 or tuple(noise.shape[1:]) != expected:
        raise ValueError(f"sample: noise has shape {tuple(noise.shape)}, accepted is (B, {', '.join(map(str, expected))})")
    if labels.shape != noise.shape[:1]:
        raise ValueError(f"sample: labels has shape {tuple(labels.shape)}, accepted is ({len(noise)},), one per noise")
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
