"""A tiny teacher, its trajectories and a student, made once for the whole session; tests must not write to
them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from tiny import randomise, tiny_teacher

from ard.checkpoints import save_student, save_teacher
from ard.diffusion import Diffusion
from ard.models import ARDTransformer
from ard.recording import RecordConfig, record
from ard.trajectories import TrajectoryStore


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps the first precision that it was asked for as long as the process lives."""
    yield
    AcceleratorState._reset_state()


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "teacher"
    save_teacher(folder, tiny_teacher(), Diffusion("linear", "v"))
    return folder


@pytest.fixture(scope="session")
def recording(teacher: Path) -> RecordConfig:
    """3 shards, the last one short, of 2 passes of the solver each."""
    config = RecordConfig(
        teacher, teacher.parent / "trajectories", samples=44, shard_size=16, batch_size=8, precision="no"
    )
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
    save_student(folder, model, store.summary(store.grid(4), "x0"))
    return folder
