"""A teacher of two layers with weights that show mistakes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ard.models import DiT

# 16 tokens a state. Width 32 keeps a pass at about a millisecond.
TINY: dict[str, Any] = {
    "input_size": 28, "patch_size": 7, "channels": 1, "width": 32, "depth": 2, "heads": 2, "num_classes": 10,
    "learn_sigma": False,
}  # fmt: skip


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Weights without zeros: a fresh DiT predicts zero whatever its input is."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def tiny_teacher(seed: int = 0, **options: Any) -> DiT:
    teacher = DiT(**{**TINY, **options})
    randomise(teacher, seed)
    return teacher
