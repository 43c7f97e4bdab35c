"""The whole job at a small scale: record a teacher, distil it with and without history, compare, report."""

from __future__ import annotations

import base64
import contextlib
import html
import io
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from ard.assets import ASSETS
from ard.checkpoints import (
    CONFIG,
    WEIGHTS,
    load_student,
    load_teacher,
    read_json,
    replacing,
    sha256,
    write_json,
    write_text,
)
from ard.costs import dit_macs, student_macs
from ard.data import CLASSES, check_counts, check_seed
from ard.diffusion import Diffusion, guided
from ard.distilling import DistillConfig, distill
from ard.evaluation import FEWEST, EvaluateConfig, evaluate, evaluate_checkpoints
from ard.models import DiT
from ard.pictures import image_grid
from ard.precision import Precision, settled
from ard.runs import Run, begun, read_log, versions
from ard.sampling import sample
from ard.shards import worker_device
from ard.training import Optimisation
from ard.trajectories import RecordConfig, TrajectoryStore, record


@dataclass(frozen=True)
class DemoConfig:
    """Distil the embedded Fashion-MNIST teacher twice at the same budget, without history (step distillation)
    and with (ARD), and write report.html, where they stand beside the embedded students of longer runs. A
    demo that was stopped goes on where it was."""

    out: Path = Path("runs/demo")
    """Folder of everything the demo makes."""
    iterations: int = 600
    """Training iterations of each student."""
    samples: int = 2000
    """Trajectories to train on."""
    held_out: int = 500
    """Further trajectories, to evaluate on."""
    steps: int = 4
    """S, the students' steps."""
    history_layers: int = 8
    """N of the ARD student (the embedded teacher has 8 layers)."""
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


def _student_config(config: DemoConfig, name: str, layers: int) -> DistillConfig:
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
        out=config.out / name,
        steps=config.steps,
        history_layers=layers,
        optimisation=optimisation,
    )


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
    held_out = config.out / "held-out"
    for folder, count, seed in ((config.out / "trajectories", config.samples, config.seed),
                                (held_out, config.held_out, config.seed + 1)):  # fmt: skip
        size = -(-count // 4) if count > 400 else count  # a stopped recording loses at most a quarter
        recording = RecordConfig(config.teacher, folder, samples=count, shard_size=size, seed=seed)
        record(replace(recording, precision=config.precision))
    names = {"step distillation (N=0)": 0, f"ARD (N={config.history_layers})": config.history_layers}
    runs = {name: config.out / ("ard" if layers else "step-distillation") for name, layers in names.items()}
    for name, layers in names.items():
        distill(_student_config(config, runs[name].name, layers))
    curves = {name: evaluate_checkpoints(run, held_out, config.precision) for name, run in runs.items()}
    embedded = _embedded(config)
    reports = {name: points[-1] for name, points in curves.items()}
    for name, folder in embedded.items():
        target = config.out / "embedded" / folder.name
        reports[name] = evaluate(EvaluateConfig(folder, held_out, out=target, precision=config.precision))

    folders = {**{name: run / "student" for name, run in runs.items()}, **embedded}
    students = {name: load_student(folder)[0] for name, folder in folders.items()}
    store = TrajectoryStore(held_out)
    grid = store.grid(config.steps)
    shown = torch.arange(min(50, len(store)))
    states, labels = store.states(shown, grid, "x0")
    noise = states[:, 0]
    denoise = guided(teacher, teacher.num_classes, store.manifest["guidance"])
    times = store.manifest["times"]

    def run_teacher() -> object:
        with torch.no_grad():
            return [*diffusion.ddim(denoise, noise, labels, times)]

    seconds = _seconds(
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
            "mmac": macs[name] / 1e6, "ms_per_sample": 1000 * seconds[name] / len(shown),
        })  # fmt: skip
    excess = {row["name"]: row["frechet"] - rows[0]["frechet"] for row in rows}
    pairs = [[*some][:2] for some in (names, embedded) if some]  # step distillation and ARD
    ratios = [excess[history] / excess[alone] for alone, history in pairs]
    result = {
        "rows": rows, "excess_ratios": ratios, "features": any_report["features"], "curves": curves,
        "iterations": config.iterations, "seed": config.seed, "versions": versions(),
        "seconds": time.perf_counter() - began,
    }  # fmt: skip
    write_json(config.out / "demo.json", result)
    pictures = {
        "From the same noise": _comparison(states[:, -1], paths, labels),
        "Trajectories": _strips(states, paths),
        "Frechet distance over training": _curves_figure(curves, rows[0]["frechet"]),
        "Loss of every step over training": _loss_figure(runs),
        "Error against the teacher, per step": _error_figure(rows),
    }
    for title, data in pictures.items():
        name = title.lower().replace(",", "").replace(" ", "-")
        with replacing(config.out / "pictures" / f"{name}.png") as temporary:
            temporary.write_bytes(data)
    write_text(config.out / "report.html", _report(config, result, pictures))
    print(_table(result))
    print(f"report: {config.out / 'report.html'}")


def _summary(result: dict[str, Any]) -> str:
    ratio, *embedded = (f"{ratio:.2f}" for ratio in result["excess_ratios"])
    return (
        f"{result['iterations']} iterations each, seed {result['seed']}, "
        f"{result['rows'][0]['samples']} held-out samples; Frechet distance in the features of: "
        f"{result['features']}. Excess over the teacher, ARD / step distillation: {ratio}"
        + "".join(f"; of the embedded students, trained for 20,000 iterations: {ratio}" for ratio in embedded)
        + "."
    )


_COLUMNS = ("", "Frechet", "precision", "recall", "MMAC", "ms/sample", "error per step")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["name"],
        f"{row['frechet']:.2f}",
        f"{row['precision']:.3f}",
        f"{row['recall']:.3f}",
        f"{row['mmac']:.1f}",
        f"{row['ms_per_sample']:.2f}",
        " ".join(f"{e:.4f}" for e in row["errors"]),
    )


def _table(result: dict[str, Any]) -> str:
    columns = list(zip(_COLUMNS, *(_cells(row) for row in result["rows"]), strict=True))
    padded = []
    for i, cells in enumerate(columns):
        width = max(map(len, cells))
        padded.append([cell.ljust(width) if i == 0 else cell.rjust(width) for cell in cells])
    body = "\n".join("  ".join(line) for line in zip(*padded, strict=True))
    return f"\n{body}\n{_summary(result)}"


def _comparison(teacher: Tensor, paths: dict[str, Tensor], labels: Tensor) -> bytes:
    rows = [teacher[:20], *(path[:20, -1] for path in paths.values())]
    return _png(image_grid(torch.cat(rows), columns=min(20, len(labels))))


def _strips(states: Tensor, paths: dict[str, Tensor]) -> bytes:
    """One sample a row: the teacher's states, then each student's, all from the same noise."""
    strips = [states, *(torch.cat([states[:, :1], path], 1) for path in paths.values())]
    wide = torch.cat(strips, 1)[:8]
    return _png(image_grid(wide.flatten(0, 1), columns=wide.shape[1]))


def _png(picture: Tensor, zoom: int = 2) -> bytes:
    image = Image.fromarray(picture.numpy())
    buffer = io.BytesIO()
    image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST).save(buffer, "png")
    return buffer.getvalue()


def _plot(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.tight_layout()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _curves_figure(curves: dict[str, list[dict[str, Any]]], teacher: float) -> bytes:
    figure = Figure(figsize=(6, 3.5))
    axes = figure.subplots()
    for name, points in curves.items():
        axes.plot(
            [p["step"] for p in points], [p["student"]["frechet"] for p in points], marker="o", label=name
        )
    axes.axhline(teacher, color="grey", linestyle=":", label="teacher")
    axes.set(xlabel="iteration", ylabel="Frechet distance", yscale="log")
    axes.legend()
    return _plot(figure)


def _loss_figure(runs: dict[str, Path]) -> bytes:
    figure = Figure(figsize=(10, 3.5))
    panels = figure.subplots(1, len(runs), sharey=True)
    for axes, (name, folder) in zip(panels, runs.items(), strict=True):
        log = read_log(folder)
        for s in range(len(log[0]["terms"])):
            axes.plot(
                [line["step"] for line in log], [line["terms"][s] for line in log], label=f"step {s + 1}"
            )
        axes.set(title=name, xlabel="iteration", yscale="log")
        axes.legend()
    panels[0].set_ylabel("mean squared error (teacher forced)")
    return _plot(figure)


def _error_figure(rows: list[dict[str, Any]]) -> bytes:
    figure = Figure(figsize=(6, 3.5))
    axes = figure.subplots()
    for row in rows[1:]:
        axes.plot(range(1, len(row["errors"]) + 1), row["errors"], marker="o", label=row["name"])
    axes.set(
        xlabel="step", ylabel="mean squared error (own roll-out)", xticks=range(1, len(rows[1]["errors"]) + 1)
    )
    axes.legend()
    return _plot(figure)


_CAPTIONS = {
    "From the same noise": "Rows: teacher, then {names}. Columns: classes in turn ({classes}).",
    "Trajectories": "One sample a row. From left to right: noise and states of the teacher, then of {names}.",
}


def _report(config: DemoConfig, result: dict[str, Any], pictures: dict[str, bytes]) -> str:
    names = " and ".join(html.escape(row["name"]) for row in result["rows"][1:])
    head = "".join(f"<th>{c}</th>" for c in _COLUMNS)
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(c)}</td>' for c in _cells(row))}</tr>" for row in result["rows"]
    )
    figures = "".join(
        f"<h2>{title}</h2><p>"
        + _CAPTIONS.get(title, "").format(names=names, classes=", ".join(CLASSES["fashion-mnist"]))
        + f'</p><img alt="{title}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
        for title, data in pictures.items()
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>ARD demo</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em}}
img{{max-width:100%;image-rendering:pixelated}}
td,th{{padding:.2em .8em;text-align:right;border-bottom:1px solid #ddd}}
td:first-child{{text-align:left}}</style>
<h1>Autoregressive distillation of a diffusion transformer</h1>
<p>{html.escape(_summary(result))} A student's cost is that of {config.steps} network evaluations.</p>
<table><tr>{head}</tr>{body}</table>
{figures}
<p>{html.escape(str(result["versions"]))}; the demo took {result["seconds"]:.0f} s.</p>
</html>
"""
