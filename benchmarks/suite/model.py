"""The whole model: a training step against the straightforward student, and sampling with and without
history."""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ard.costs import student_macs
from ard.models import ARDTransformer, DiT
from ard.models.student import student_times
from ard.sampling import sample
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
    """Both sides get autocast to bfloat16 over float32 weights and a fused AdamW.

    The largest batch that fits the baseline is the one both are compared at; ours is also timed at its own.
    """
    ours: Make = partial(make_student, rec.device, rec.quick, HISTORY)
    baseline: Make = partial(make_baseline, rec.device, rec.quick, HISTORY)
    config = student_config(rec.quick)
    rec.attempt("same function", partial(_same_function, rec), ours=True)
    _release(rec.device)
    limits: dict[str, int] = {}
    for name, make in (("baseline", baseline), ("ours", ours)):
        find = partial(_largest_batch, rec, make, config)
        found = rec.attempt(f"{name}: largest batch", find, 0 if rec.quick else 10, name == "ours")
        if found is not None:
            limits[name] = found
        _release(rec.device)
    common = min(limits.values(), default=0)
    runs = [("baseline", baseline, common, False), ("ours", ours, common, False)]
    if limits.get("ours", 0) > common:
        runs.append(("ours", ours, limits["ours"], False))
    runs += [("ours", ours, common, True), ("baseline", baseline, common, True)]
    for name, make, batch, under_compile in runs if common else ():
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


# Sampling


def sampling(rec: Recorder) -> None:
    """Latency of 4 steps, from the call to the result on the device: what a user waits for."""
    students = {n: make_sampler(rec.device, rec.quick, n) for n in (0, HISTORY)}
    work = [student_macs(student.config).total for student in students.values()]
    flops = 100 * (work[1] / work[0] - 1)
    for batch in (1, 2) if rec.quick else (1, 64):
        data = {n: sampling_data(student, batch, rec.device) for n, student in students.items()}
        kinds = ["eager", *(["cuda graph"] if rec.device == "cuda" else [])]
        if rec.device == "cuda":
            rec.attempt(f"batch {batch}: graph", partial(_same_bits, students, data), ours=True)
        for kind in kinds:
            run = partial(_latency, rec, students, data, kind, flops)
            rec.attempt(f"batch {batch}, {kind}", run, 0 if rec.quick else 5, ours=True)
    for batch in (2,) if rec.quick else (1, 64):
        data = {n: sampling_data(student, batch, rec.device) for n, student in students.items()}
        what, run = f"batch {batch}, compiled", partial(_latency_compiled, rec, students, data, flops)
        rec.attempt(what, run, 0 if rec.quick else 60)


def make_sampler(device: str, quick: bool, history: int) -> ARDTransformer:
    """Weights in bfloat16, and the times that it is conditioned on as they are: 999 is not a bfloat16."""
    student = make_student(device, quick, history).eval().requires_grad_(False).to(torch.bfloat16)
    student.times = student_times(student.steps).to(device)
    return student


def sampling_data(student: ARDTransformer, batch: int, device: str) -> tuple[Tensor, Tensor]:
    noise = torch.randn(batch, student.channels, *student.input_size, device=device, dtype=torch.bfloat16)
    return noise, torch.randint(0, student.num_classes, (batch,), device=device)


Students = dict[int, ARDTransformer]
Data = dict[int, tuple[Tensor, Tensor]]


def _same_bits(students: Students, data: Data) -> None:
    for n, student in students.items():
        eager, graph = (sample(student, *data[n], cuda_graph=on) for on in (False, True))
        if not torch.equal(eager, graph):
            raise ArithmeticError(f"N={n}: the CUDA graph's samples differ from the eager path's")


def _latency(rec: Recorder, students: Students, data: Data, kind: str, flops: float) -> None:
    """With and without history in alternation, so that their difference means something."""
    graph = kind.endswith("cuda graph")
    runs: dict[str, Callable[[], object]] = {
        str(n): partial(sample, student, *data[n], cuda_graph=graph) for n, student in students.items()
    }
    for _ in range(2):
        for run in runs.values():
            run()
    batch = len(data[0][0])
    repeats = 3 if rec.quick else 31 if batch == 1 else 11
    # Twice: the difference between the two is the noise of the overhead.
    twice = [medians(runs, repeats) for _ in range(2)]
    overheads = [100 * (times[str(HISTORY)] / times["0"] - 1) for times in twice]
    ms = {n: 1e3 * statistics.mean(times[n] for times in twice) for n in runs}
    with_history = ms[str(HISTORY)]
    rec.row(f"batch {batch}, {kind}: N=0 {ms['0']:.2f} ms, N={HISTORY} {with_history:.2f} ms, history costs "
            f"{overheads[0]:+.2f} and {overheads[1]:+.2f} % of time, {flops:.3f} % of operations",
            batch=batch, kind=kind, ms=ms, overhead_percent=overheads, flops_percent=flops)  # fmt: skip


def _latency_compiled(rec: Recorder, students: Students, data: Data, flops: float) -> None:
    """Every layer compiled: one piece of code serves all layers, where a compiled model would be one for each
    of the four steps."""
    torch.compiler.reset()
    # Copies have no CUDA graphs of uncompiled layers.
    students = {n: copy.deepcopy(student) for n, student in students.items()}
    started = time.monotonic()
    # A layer's code is specialised to its step, to having history, and to the first layers' numbers.
    with torch._dynamo.config.patch(recompile_limit=64):
        for n, student in students.items():
            for layer in student.blocks:
                layer.forward = compiled(layer.forward, rec.device)  # type: ignore[method-assign]
            sample(student, *data[n], cuda_graph=False)
        rec.say(f"compiled in {time.monotonic() - started:.0f} s")
        _latency(rec, students, data, "compiled", flops)
        if rec.device == "cuda":
            _latency(rec, students, data, "compiled, cuda graph", flops)
    torch.compiler.reset()
