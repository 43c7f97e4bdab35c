"""The whole model: a training step against the straightforward student."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ard.costs import student_macs
from ard.models import ARDTransformer, DiT
from benchmarks.common import medians
from benchmarks.suite.record import Recorder, compiled
from benchmarks.train_step import StraightforwardARD, random_student, training_step

_STEPS, HISTORY = 4, 6
_TINY: dict[str, Any] = {
    "input_size": 8, "patch_size": 2, "channels": 4, "width": 32, "depth": 2, "heads": 2, "num_classes": 10,
}  # fmt: skip

# float32 with float32 sums in another order: far below this. A matrix product in TF32: three times it.
_WRONG = 1e-4


def make_teacher(device: str, quick: bool) -> DiT:
    with torch.device(device):
        return DiT(**_TINY) if quick else DiT.from_preset("DiT-XL/2")


def student_config(quick: bool) -> dict[str, Any]:
    """Of the student with history."""
    with torch.device("meta"):
        return ARDTransformer.from_teacher(make_teacher("meta", quick), _STEPS, _depth(HISTORY, quick)).config


def _depth(history: int, quick: bool) -> int:
    return min(history, 1) if quick else history


def make_student(device: str, quick: bool, history: int) -> ARDTransformer:
    teacher, depth = make_teacher(device, quick), _depth(history, quick)
    return random_student(teacher, _STEPS, depth, "causal", torch.device(device))


def make_baseline(device: str, quick: bool, history: int) -> StraightforwardARD:
    return StraightforwardARD(make_student(device, quick, history), torch.bfloat16)


class _WithoutCudnn(nn.Module):
    """A model whose masked attention keeps away from cuDNN, which may have no engine for it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor:
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            found: Tensor = self.model(*inputs)
        return found


def _without_cudnn(device: str, quick: bool) -> nn.Module:
    return _WithoutCudnn(make_baseline(device, quick, HISTORY))


def training_data(config: dict[str, Any], batch: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """States, targets and labels for the student with this configuration."""
    teacher = config["teacher"]
    shape = (batch, config["steps"], teacher["channels"], *teacher["input_size"])
    labels = torch.randint(0, teacher["num_classes"], (batch,), device=device)
    return torch.randn(shape, device=device), torch.randn(shape, device=device), labels


def _release(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# Training

Make = Callable[[], nn.Module]


def training(rec: Recorder) -> None:
    rec.attempt("same function", partial(_same_function, rec), ours=True)
    _release(rec.device)
    _training(rec, under_compile=False)


def training_compiled(rec: Recorder) -> None:
    _training(rec, under_compile=True)


def _training(rec: Recorder, under_compile: bool) -> None:
    """Both sides get autocast to bfloat16 over float32 weights and a fused AdamW.

    The largest batch that fits the baseline is the one both are compared at; without torch.compile, ours is
    also timed at its own.
    """
    ours: Make = partial(make_student, rec.device, rec.quick, HISTORY)
    baseline: Make = partial(make_baseline, rec.device, rec.quick, HISTORY)
    config = student_config(rec.quick)
    limits: dict[str, int] = {}
    for name, make in (("baseline", baseline), ("ours", ours)):
        find = partial(_largest_batch, rec, make, config)
        needs = 0 if rec.quick else 10
        found = rec.attempt(f"{name}: largest batch", find, needs, name == "ours")
        if found is None and name == "baseline":
            _release(rec.device)
            baseline = partial(_without_cudnn, rec.device, rec.quick)
            find = partial(_largest_batch, rec, baseline, config)
            found = rec.attempt("baseline without cuDNN: largest batch", find, needs)
        if found is not None:
            limits[name] = found
        _release(rec.device)
    common = min(limits.values(), default=0)
    runs = [("ours", ours, common), ("baseline", baseline, common)]
    if limits.get("ours", 0) > common and not under_compile:
        runs.append(("ours", ours, limits["ours"]))
    for name, make, batch in runs if common else ():
        what = f"{name}, batch {batch}{', torch.compile' if under_compile else ''}"
        needs = 0 if rec.quick else 60 if under_compile else 10  # 28 layers compile for about a minute
        timed = partial(_time_training, rec, make, config, batch, under_compile)
        taken = rec.attempt(what, timed, needs, name == "ours")
        _release(rec.device)
        if taken is None:
            continue
        seconds, peak = taken
        tflops = 6 * student_macs(config, batch).total / seconds / 1e12  # backward: twice the forward
        share = rec.settings.percent("matmul", tflops)
        rec.row(f"{what}: {1e3 * seconds:.1f} ms a step, {batch / seconds:.1f} samples/s, {tflops:.0f} "
                f"TFLOP/s" + (f" ({share:.0f} % of the ceiling)" if share else "") + f", {peak:.1f} GB",
                side=name, batch=batch, compiled=under_compile, ms=1e3 * seconds, tflops=tflops,
                samples_per_second=batch / seconds, utilisation=share, peak_gb=peak)  # fmt: skip


def _same_function(rec: Recorder) -> None:
    """Outputs and gradients of both, in float32."""
    student = make_student(rec.device, rec.quick, HISTORY)
    states, targets, labels = training_data(student.config, 1, rec.device)
    found = []
    for model in (student, StraightforwardARD(student, torch.float32)):
        named = [p for p in model.parameters() if p.requires_grad]
        out = model(states, labels)
        grads = torch.autograd.grad(F.mse_loss(out, targets), named)
        found.append((out.detach(), torch.cat([g.flatten() for g in grads])))
    for what, a, b in zip(("predictions", "gradients"), *found, strict=True):
        error = float((a - b).norm() / b.norm())
        if not error <= _WRONG:
            raise ArithmeticError(f"{what} differ from the straightforward student's by {error:.1e}")
    rec.say(f"same function as the straightforward student, gradients within {error:.1e}")


def _ladder(quick: bool) -> Iterator[int]:
    yield from (2,) if quick else (128, 112, 96, 80, 64, 56, 48, 40, 32, 24, 16, 8, 4, 2, 1)


def _largest_batch(rec: Recorder, make: Make, config: dict[str, Any]) -> int:
    """The first rung of the ladder on which a training step fits."""
    model = make()
    for batch in _ladder(rec.quick):
        if _fits(model, training_data(config, batch, rec.device)):
            return batch
        for parameter in model.parameters():
            parameter.grad = None
        _release(rec.device)
    raise RuntimeError("not even one sample fits")


def _fits(model: nn.Module, data: tuple[Tensor, Tensor, Tensor]) -> bool:
    try:
        step = training_step(model, *data, False)
        for _ in range(2):  # the second has the optimiser's state beside the activations
            step()
    except RuntimeError as error:  # Triton, loading a kernel onto a full card, has no class of its own for it
        if isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in str(error):
            return False
        raise
    return True


def _time_training(
    rec: Recorder, make: Make, config: dict[str, Any], batch: int, under_compile: bool
) -> tuple[float, float]:
    """Median seconds of a step, and the peak of memory in GB."""
    torch.compiler.reset()
    model = make()
    data = training_data(config, batch, rec.device)
    run = compiled(model, rec.device, dynamic=False) if under_compile else model
    step = training_step(run, *data, False)  # type: ignore[arg-type]
    for _ in range(2):
        step()
    if rec.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = medians({"step": step}, 3 if rec.quick else 7)["step"]
    peak = torch.cuda.max_memory_allocated() / 1e9 if rec.device == "cuda" else 0.0
    return seconds, peak
