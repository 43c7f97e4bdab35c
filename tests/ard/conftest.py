"""A tiny teacher, its trajectories and a student, made once for the whole session; tests must not write to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ard.checkpoints import save_student, save_teacher
from ard.diffusion import Diffusion
from ard.models import ARDTransformer, DiT
from ard.trajectories import RecordConfig, TrajectoryStore, record

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


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "teacher"
    save_teacher(folder, tiny_teacher(), Diffusion("linear", "v"))
    return folder


@pytest.fixture(scope="session")
def recording(teacher: Path) -> RecordConfig:
    """3 shards, the last one short, of 2 passes of the solver each."""
    config = RecordConfig(teacher, teacher.parent / "trajectories", samples=44, shard_size=16, batch_size=8)
    record(config)
    return config


@pytest.fixture(scope="session")
def store(recording: RecordConfig) -> TrajectoryStore:
    return TrajectoryStore(recording.out)


@pytest.fixture(scope="session")
def student(teacher: Path, store: TrajectoryStore) -> Path:
    model = ARDTransformer.from_teacher(tiny_teacher(), steps=4, history_layers=2)
    randomise(model, 1)
    folder = teacher.parent / "student"
    save_student(folder, model, {**store.summary(), "grid": list(store.grid(4)), "state": "x0"})
    return folder
