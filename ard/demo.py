"""The whole job at a small scale: record a teacher, distil it in three ways, compare, report."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from ard.assets import ASSETS
from ard.checkpoints import (
    CONFIG,
    WEIGHTS,
    load_student,
    load_teacher,
    read_json,
    replacing,
    save_student,
    sha256,
    write_json,
    write_text,
)
from ard.costs import dit_macs, student_macs
from ard.data import check_counts, check_seed
from ard.demo_report import (
    comparison,
    curves_figure,
    error_figure,
    loss_figure,
    page,
    plot,
    rows_caption,
    strips,
    table,
)
from ard.diffusion import Diffusion, guided
from ard.distilling import DistillConfig, Head, distill
from ard.evaluation import FEWEST, EvaluateConfig, evaluate, evaluate_checkpoints
from ard.history_weights import weights_figure, weights_over_training
from ard.models import ARDTransformer, DiT
from ard.precision import Precision, settled
from ard.recording import RecordConfig, record
from ard.runs import Run, begun, checkpoints, found, versions
from ard.sampling import sample
from ard.shards import worker_device
from ard.training import Optimisation
from ard.trajectories import TrajectoryStore


@dataclass(frozen=True)
class DemoConfig:
    """Distil the embedded Fashion-MNIST teacher of 25 steps into students of 4: by the published recipe, and
    as `ard distill` does by default, without and with history. Write report.html, where they stand beside the
    teacher, its solver of 4 steps and the embedded students of longer runs. A demo that was stopped goes on
    where it was."""

    out: Path = Path("runs/demo")
    """Folder of everything the demo makes."""
    iterations: int = 400
    """Training iterations of each student."""
    samples: int = 2000
    """Trajectories to train on."""
    held_out: int = 500
    """Further trajectories, to evaluate on."""
    steps: int = 4
    """S, the students' steps."""
    history_layers: int = 8
    """N of the students with history (the embedded teacher has 8 layers)."""
    batch_size: int = 24
    """Samples per iteration."""
    lr: float = 1e-3
    """Peak learning rate, after which it falls to zero along a cosine."""
    ema: float = 0.998
    """Decay of the averaged weights."""
    curve_points: int = 4
    """How often each student is evaluated while it trains, the end included."""
    precision: Precision = field(default="auto", metadata={"absent": "bf16"})
    """In which networks compute, in training and everything else; as for the other commands."""
    teacher: Path = ASSETS / "teacher"
    """Folder of the teacher."""
    seed: int = 0
    """Seed of the students' training data and order; the held-out trajectories have the next seed."""


_EMBEDDED = {
    "step distillation (N=0), embedded": "step-distillation",
    "ARD (N=2), embedded": "ard",
    "ARD (N=2) + GAN, embedded": "ard-gan",
}


def _embedded(config: DemoConfig) -> dict[str, Path]:
    """By name, the embedded students, as far as they have the demo's teacher and steps."""
    teacher, found = sha256(config.teacher / WEIGHTS), {}
    for name, key in _EMBEDDED.items():
        folder = ASSETS / "students" / key
        student = read_json(folder / CONFIG)
        if student["trajectories"]["teacher"] == teacher and student["config"]["steps"] == config.steps:
            found[name] = folder
    return found


@dataclass(frozen=True)
class _Trained:
    """A student that the demo trains."""

    name: str
    key: str
    """Its folder."""
    history_layers: int
    head: Head


def _trained(config: DemoConfig) -> list[_Trained]:
    layers = config.history_layers
    return [
        _Trained(f"published recipe, ARD (N={layers})", "published", layers, "direct"),
        _Trained("ours, no history", "ours", 0, "solver"),
        _Trained(f"ours, history (N={layers})", "ours-history", layers, "solver"),
    ]


def _student_config(config: DemoConfig, student: _Trained) -> DistillConfig:
    every = -(-config.iterations // config.curve_points)
    optimisation = Optimisation(
        iterations=config.iterations,
        batch_size=config.batch_size,
        lr=config.lr,
        lr_schedule="cosine",
        warmup=min(100, config.iterations // 10),
        ema=config.ema,
        precision=config.precision,
        log_every=max(1, min(50, config.iterations // 20)),
        checkpoint_every=every,
        keep_checkpoints=config.curve_points,
        sample_every=every,
        seed=config.seed,
    )
    return DistillConfig(
        teacher=config.teacher,
        trajectories=config.out / "trajectories",
        out=config.out / student.key,
        steps=config.steps,
        history_layers=student.history_layers,
        head=student.head,
        optimisation=optimisation,
    )


def _timed(config: DistillConfig) -> float | None:
    """Train; the seconds of all its iterations, from those that this call makes where a run goes on. None if
    they were made by a call that was stopped before it could tell."""
    path = config.out / "seconds.json"
    steps = [step for step, _ in checkpoints(config.out)]
    began, left = time.perf_counter(), config.optimisation.iterations - max(steps, default=0)
    distill(config)
    if not path.exists():
        taken = time.perf_counter() - began
        write_json(path, taken * config.optimisation.iterations / left if left else None)
    seconds: float | None = read_json(path)
    return seconds


def _seconds(candidates: dict[str, Callable[[], object]], repeats: int = 5) -> dict[str, float]:
    """Median seconds of each, taken in turn after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats + 1):
        for name, function in candidates.items():
            began = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


def demo(config: DemoConfig) -> None:
    began = time.perf_counter()
    counts = ("iterations", "samples", "held_out", "steps", "batch_size", "curve_points")
    check_counts("demo", **{name: getattr(config, name) for name in counts})
    check_seed(config.seed, "demo")
    teacher, diffusion = load_teacher(config.teacher)
    depth = len(teacher.blocks)
    if not 1 <= config.history_layers <= depth:
        raise ValueError(f"demo: history_layers is {config.history_layers}, accepted are 1..{depth}, the "
                         "teacher's layers; the student without history is made anyway")  # fmt: skip
    if config.held_out < FEWEST:
        raise ValueError(f"demo: held_out is {config.held_out}, accepted is an integer >= {FEWEST}")
    before = begun(config.out, config, "precision")
    precision, why = settled(config.precision, worker_device(), config.out, before)
    config = replace(config, precision=precision)
    with contextlib.closing(Run(config.out, "demo", config, precision=why)):
        _demo(config, teacher, diffusion, began)


def _demo(config: DemoConfig, teacher: DiT, diffusion: Diffusion, began: float) -> None:
    held_out, size = config.out / "held-out", -(-config.samples // 4)  # a stopped recording loses a quarter
    recording = RecordConfig(
        config.teacher, config.out / "trajectories", samples=config.samples, steps=config.steps,
        shard_size=size if config.samples > 400 else config.samples, precision=config.precision,
        seed=config.seed,
    )  # fmt: skip
    record(recording)
    kept = tuple(TrajectoryStore(recording.out).manifest["kept"])
    record(
        replace(recording, out=held_out, samples=config.held_out, keep=kept, steps=None,
                shard_size=config.held_out, seed=config.seed + 1)
    )  # fmt: skip
    store = TrajectoryStore(held_out)
    trained = _trained(config)
    seconds = {one.name: _timed(_student_config(config, one)) for one in trained}
    states_of_ours = found(config.out / "ours", "states")  # which both of ours chose
    grid, levels = tuple(states_of_ours["grid"]), states_of_ours["levels"]
    untrained = "solver, untrained"
    student = ARDTransformer.from_teacher(teacher, config.steps, 0, levels=levels)
    save_student(config.out / "untrained", student, store.summary(grid, "xt"))
    others = {untrained: config.out / "untrained", **_embedded(config)}
    folders = {one.name: config.out / one.key / "student" for one in trained} | others
    curves = {
        one.name: evaluate_checkpoints(config.out / one.key, held_out, config.precision) for one in trained
    }
    reports = {name: points[-1] for name, points in curves.items()}
    for name, folder in others.items():
        target = config.out / "evaluations" / folder.name
        reports[name] = evaluate(EvaluateConfig(folder, held_out, out=target, precision=config.precision))
    for one in trained:
        if one.head == "solver":  # which starts there
            curves[one.name] = [{"step": 0, **reports[untrained]}, *curves[one.name]]

    shown = [untrained, *(one.name for one in trained), *[*others][1:]]
    students = {name: load_student(folders[name])[0] for name in shown}
    states, labels = store.states(torch.arange(min(50, len(store))), grid, "xt")
    noise = states[:, 0]
    denoise = guided(teacher, teacher.num_classes, store.manifest["guidance"])
    times = store.manifest["times"]

    def run_teacher() -> object:
        with torch.no_grad():
            return [*diffusion.ddim(denoise, noise, labels, times)]

    taken = _seconds(
        {"teacher": run_teacher, **{n: partial(sample, s, noise, labels) for n, s in students.items()}}
    )
    paths = {name: sample(student, noise, labels) for name, student in students.items()}
    macs = {
        "teacher": 2 * len(times) * dit_macs(teacher.config).total,
        **{name: student_macs(student.config).total for name, student in students.items()},
    }
    any_report = next(iter(reports.values()))
    rows = []
    for name in ("teacher", *students):
        metrics = any_report["teacher"] if name == "teacher" else reports[name]["student"]
        rows.append({
            "name": name, **metrics, "errors": [] if name == "teacher" else reports[name]["errors"],
            "mmac": macs[name] / 1e6, "ms_per_sample": 1000 * taken[name] / len(noise),
            "training_seconds": seconds.get(name),
        })  # fmt: skip
    result = {
        "rows": rows, "grid": grid, "features": any_report["features"], "curves": curves,
        "iterations": config.iterations, "seed": config.seed, "versions": versions(),
        "seconds": time.perf_counter() - began,
    }  # fmt: skip
    write_json(config.out / "demo.json", result)
    ours = {name: path for name, path in paths.items() if students[name].head == "solver"}
    short = {name: path for name, path in paths.items() if name not in _EMBEDDED}
    long = {name: path for name, path in paths.items() if name in _EMBEDDED}
    pictures = {
        "From the same noise": comparison(states[:, -1], short, labels),
        "Quality over seconds": curves_figure(curves, seconds, rows[0]["frechet"]),
        "Trajectories": strips(states, ours),
        "Loss of every step over training": loss_figure({o.name: config.out / o.key for o in trained}),
        "Error against the teacher, per step": error_figure(rows),
    }
    opened = {one.name: weights_over_training(folders[one.name]) for one in trained}
    if any(opened.values()):
        pictures["History that opened"] = plot(weights_figure(opened), tight=False)
    if long:
        pictures["The embedded students"] = comparison(states[:, -1], long, labels)
    for title, data in pictures.items():
        name = title.lower().replace(",", "").replace(" ", "-")
        with replacing(config.out / "pictures" / f"{name}.png") as temporary:
            temporary.write_bytes(data)
    captions = {
        "From the same noise": rows_caption(short, labels),
        "The embedded students": rows_caption(long, labels),
        "Trajectories": "One sample a row. From left to right: noise and states of the teacher, then of "
        f"{', '.join(ours)}.",
        "History that opened": "What a key of an earlier state weighs against one of the newest, which is 0 "
        "at the start.",
    }  # fmt: skip
    write_text(config.out / "report.html", page(config.steps, result, pictures, captions))
    print(table(result))
    print(f"report: {config.out / 'report.html'}")
