"""The suite's timings through pytest-benchmark: `pytest --benchmark-only`.

On the device that is there: real shapes on a GPU, small ones on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ard.sampling import sample
from ard_kernels.backends import implementations, native
from ard_kernels.layout import Mask
from benchmarks.common import synchronize
from benchmarks.suite import adaln, attention, model, sampling
from benchmarks.suite.timing import Prepare
from benchmarks.train_step import training_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUICK = DEVICE == "cpu"


def _time(benchmark: Any, prepare: Prepare) -> None:
    """A call from launch to result; what `prepare` does beforehand is not timed."""
    count = iter(range(10**9))

    def call(run: Callable[[], object]) -> None:
        run()
        synchronize()

    def setup() -> tuple[tuple[Callable[[], object]], dict[str, Any]]:
        run = prepare(next(count))
        synchronize()
        return (run,), {}

    benchmark.pedantic(call, setup=setup, rounds=5 if QUICK else 30, warmup_rounds=2)


# What there is by name: tests are collected without a tensor, and without a look at the GPU.


def _backends(family: str) -> list[str]:
    """Triton's interpreter is not timed. On a GPU there is no compiled attention, and the compiled adaLN only
    where it was built."""
    there = {"eager", "native"} if QUICK else {"eager", "triton"}
    if not QUICK and family == "adaln" and native.CUDA_REASON is None:
        there.add("native")
    return [name for name in implementations(family) if name in there]


def _attention_candidates(shape: attention.Shape, mask: Mask) -> list[attention.Candidate]:
    mine = [attention.our_candidate(name, shape, mask) for name in _backends("attention")]
    flex = attention.flex_candidate(shape, mask, DEVICE)
    return [*mine, *attention.dense_candidates(shape, mask), flex]


_ATTENTION = {
    f"{shape} {mask} {candidate.name}": (shape, candidate)
    for mask in ("causal", "diagonal")
    for shape in attention.shapes(QUICK)
    for candidate in _attention_candidates(shape, mask)  # type: ignore[arg-type]
}


def _exists(candidate: attention.Candidate, phase: str) -> bool:
    """On a CPU there is no cuDNN, FlexAttention has no backward, and the packages have nothing."""
    if DEVICE == "cuda" or candidate.ours or candidate.name.startswith(("sdpa flash", "sdpa dense mask")):
        return True
    return candidate.name.startswith("flex") and phase == "forward"


@pytest.mark.parametrize(
    ("name", "phase"),
    [(name, phase) for name, (shape, candidate) in _ATTENTION.items() for phase in candidate.phases(shape)
     if _exists(candidate, phase)],
)  # fmt: skip
def test_attention(benchmark: Any, name: str, phase: str) -> None:
    shape, candidate = _ATTENTION[name]
    benchmark.group = f"{name.removesuffix(candidate.name)}{phase}"
    inputs = attention.padded(attention.make_inputs(shape, DEVICE, 0), shape, candidate.pad)
    _time(benchmark, attention.prepared(candidate.build(), [inputs], phase))


_ADALN = {
    f"{shape} {name}": (shape, build)
    for shape in adaln.shapes(QUICK)
    for name, (build, _) in adaln.candidates(shape, DEVICE, _backends("adaln")).items()
}


@pytest.mark.parametrize("phase", adaln.PHASES)
@pytest.mark.parametrize("name", _ADALN)
def test_adaln(benchmark: Any, name: str, phase: str) -> None:
    shape, build = _ADALN[name]
    benchmark.group = f"adaLN {shape} {phase}"
    sets = [adaln.make_inputs(shape, DEVICE, seed) for seed in range(2)]
    _time(benchmark, adaln.prepared(build(), sets, phase))


@pytest.mark.parametrize("make", [model.make_student, model.make_baseline])
def test_training_step(benchmark: Any, make: Callable[..., Any]) -> None:
    benchmark.group = "training step"
    data = model.training_data(model.student_config(QUICK), 2 if QUICK else 16, DEVICE)
    step = training_step(make(DEVICE, QUICK, model.HISTORY), *data, compiled=False)
    _time(benchmark, lambda i: step)


@pytest.mark.parametrize("history", [0, model.HISTORY])
@pytest.mark.parametrize("batch", [1, 2 if QUICK else 64])
def test_sampling(benchmark: Any, batch: int, history: int) -> None:
    benchmark.group = f"4-step sampling, batch {batch}"
    student = sampling.make_sampler(DEVICE, QUICK, history)
    data = sampling.sampling_data(student, batch, DEVICE)
    _time(benchmark, lambda i: lambda: sample(student, *data))
