"""Sampling from a DiT-XL/2 student with and without history: latency of 4 steps, from the call to the result
on the device, which is what a user waits for."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ard.costs import student_macs
from ard.models import ARDTransformer
from ard.models.student import student_times
from ard.sampling import sample
from benchmarks.common import medians
from benchmarks.suite.model import HISTORY, make_student
from benchmarks.suite.record import Recorder, compiled

Students = dict[int, ARDTransformer]
"""By the number of layers with history."""
Data = dict[int, tuple[Tensor, Tensor]]


def sampling(rec: Recorder) -> None:
    students = _students(rec)
    for batch in (1, 2) if rec.quick else (1, 64):
        data = _data(rec, students, batch)
        kinds = ["eager"]
        if rec.device == "cuda":
            kinds.append("cuda graph")
            rec.attempt(f"batch {batch}: graph", partial(_same_bits, students, data), ours=True)
        for kind in kinds:
            run = partial(_latency, rec, students, data, kind)
            rec.attempt(f"batch {batch}, {kind}", run, 0 if rec.quick else 5, ours=True)


def sampling_compiled(rec: Recorder) -> None:
    students = _students(rec)
    for batch in (2,) if rec.quick else (1, 64):
        run = partial(_latency_compiled, rec, students, _data(rec, students, batch))
        rec.attempt(f"batch {batch}, compiled", run, 0 if rec.quick else 60)


def _students(rec: Recorder) -> Students:
    return {n: make_sampler(rec.device, rec.quick, n) for n in (0, HISTORY)}


def _data(rec: Recorder, students: Students, batch: int) -> Data:
    return {n: sampling_data(student, batch, rec.device) for n, student in students.items()}


def make_sampler(device: str, quick: bool, history: int) -> ARDTransformer:
    """Weights in bfloat16, and the times that it is conditioned on as they are: 999 is not a bfloat16."""
    student = make_student(device, quick, history).eval().requires_grad_(False).to(torch.bfloat16)
    student.times = student_times(student.steps).to(device)
    return student


def sampling_data(student: ARDTransformer, batch: int, device: str) -> tuple[Tensor, Tensor]:
    noise = torch.randn(batch, student.channels, *student.input_size, device=device, dtype=torch.bfloat16)
    return noise, torch.randint(0, student.num_classes, (batch,), device=device)


def _same_bits(students: Students, data: Data) -> None:
    for n, student in students.items():
        eager, graph = (sample(student, *data[n], cuda_graph=on) for on in (False, True))
        if not torch.equal(eager, graph):
            raise ArithmeticError(f"N={n}: the CUDA graph's samples differ from the eager path's")


def _latency(rec: Recorder, students: Students, data: Data, kind: str) -> None:
    """With and without history in alternation, so that their difference means something."""
    graph = kind.endswith("cuda graph")
    runs: dict[str, Callable[[], object]] = {
        str(n): partial(sample, student, *data[n], cuda_graph=graph) for n, student in students.items()
    }
    for _ in range(2):
        for run in runs.values():
            run()
    batch = len(data[0][0])
    work = [student_macs(student.config).total for student in students.values()]
    flops = 100 * (work[1] / work[0] - 1)
    repeats = 3 if rec.quick else 31 if batch == 1 else 11
    # Twice: the difference between the two is the noise of the overhead.
    twice = [medians(runs, repeats) for _ in range(2)]
    overheads = [100 * (times[str(HISTORY)] / times["0"] - 1) for times in twice]
    ms = {n: 1e3 * statistics.mean(times[n] for times in twice) for n in runs}
    with_history = ms[str(HISTORY)]
    rec.row(f"batch {batch}, {kind}: N=0 {ms['0']:.2f} ms, N={HISTORY} {with_history:.2f} ms, history costs "
            f"{overheads[0]:+.2f} and {overheads[1]:+.2f} % of time, {flops:.3f} % of operations",
            batch=batch, kind=kind, ms=ms, overhead_percent=overheads, flops_percent=flops)  # fmt: skip


def _latency_compiled(rec: Recorder, students: Students, data: Data) -> None:
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
        _latency(rec, students, data, "compiled")
        if rec.device == "cuda":
            _latency(rec, students, data, "compiled, cuda graph")
    torch.compiler.reset()
