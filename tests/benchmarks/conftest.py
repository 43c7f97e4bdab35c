"""Timings run on demand: `pytest --benchmark-only`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import ard_kernels
from ard_kernels.backends import Status


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("benchmark_only", default=False):
        return
    timings = [item for item in items if "benchmark" in getattr(item, "fixturenames", ())]
    config.hook.pytest_deselected(items=timings)
    items[:] = [item for item in items if item not in timings]


@pytest.fixture
def eager_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter takes half a second for what the suite does hundreds of times."""
    monkeypatch.setattr(ard_kernels, "backends", lambda: {"eager": Status(True, "")})


@pytest.fixture(autouse=True)
def forget_compiled() -> Iterator[None]:
    yield
    torch.compiler.reset()
