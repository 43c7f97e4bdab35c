"""Exposure bias: how much worse a student predicts from its own states than from the teacher's, and how much
of an error in the newest state is left in the next one. The paper's claim (arXiv 2504.11295) is that the
history damps accumulated error; without it (N = 0) the newest state is all there is to look at."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor
from tqdm import tqdm

from ard.checkpoints import load_student, replacing, write_json
from ard.data import Stream, check_counts, check_folder, check_seed, index_noise
from ard.history_weights import weights_figure, weights_over_training
from ard.models import ARDTransformer
from ard.precision import PrecisionConfig, computing, settled
from ard.runs import plain, versions
from ard.shards import worker_device
from ard.trajectories import TrajectoryStore


@dataclass(frozen=True)
class DiagnoseConfig(PrecisionConfig):
    """Measure the exposure bias of students on recorded trajectories that they were not trained on: the error
    of every step given the teacher's history, given their own, and given their own with a perturbed newest
    state."""

    students: tuple[Path, ...]
    """Folders of the students."""
    trajectories: Path
    """Store of held-out trajectories of the students' teacher (`ard record` with another seed)."""
    out: Path
    """Folder of the report: diagnosis.json, diagnosis.png, and history.png where a student's history started
    closed: what of it is open."""
    names: tuple[str, ...] = ()
    """What to call the students, one name each; default: their history, and their S and kind of state where
    these differ."""
    samples: int | None = None
    """How many of the trajectories; default: all."""
    batch_size: int = 100
    """Samples per pass."""
    sizes: tuple[float, ...] = (0.05, 0.1, 0.2)
    """Root mean squares of the Gaussian perturbations, in the units of the states."""
    seed: int = 0
    """Seed of the perturbations; those of sample i depend on (seed, i) alone."""


@torch.no_grad()
def perturbed_rollout(
    student: ARDTransformer, noise: Tensor, labels: Tensor, perturbations: Tensor
) -> tuple[Tensor, Tensor]:
    """A student's trajectories, and what each prediction had been with another newest state.

    Args:
        noise: (B, C, h, w).
        labels: (B,) int64.
        perturbations: (B, K, S-1, C, h, w); what is added to states 1..S-1, K variants.

    Returns:
        The path (B, S, C, h, w), as from `sample`, and (B, K, S-1, C, h, w): the predictions of states 2..S
        with the state before them perturbed, and that one alone. Earlier states in the history are the
        path's, and so is everything later: a perturbation is seen by one prediction.
    """
    tables, cache = student.modulation(labels), student.cache(len(noise), noise.device)
    path = noise.new_empty(len(noise), student.steps, *noise.shape[1:])
    perturbed = torch.empty_like(perturbations)
    state = noise
    for step in range(student.steps):
        # The path's own pass comes last: it overwrites what the perturbed ones left in the cache.
        for variant in range(perturbations.shape[1] if step else 0):
            moved = state + perturbations[:, variant, step - 1]
            perturbed[:, variant, step - 1] = student.step(moved, step, tables, cache)
        path[:, step] = student.step(state, step, tables, cache)
        state = path[:, step]
    return path, perturbed


def _mean_square(x: Tensor) -> Tensor:
    """(..., C, h, w) -> (...) float64."""
    return x.double().square().mean((-3, -2, -1))


@torch.no_grad()
def _measure(
    student: ARDTransformer, sizes: Sequence[float], states: Tensor, labels: Tensor, directions: Tensor
) -> dict[str, Tensor]:
    """Of each sample. states (B, S+1, C, h, w); directions (B, S-1, C, h, w) standard normal.

    Returns teacher_history, own_history and excess (B, S); perturbed and gain (B, K, S-1).
    """
    targets = states[:, 1:]
    scale = torch.tensor(sizes, device=states.device).view(-1, 1, 1, 1, 1)
    perturbations = scale * directions.unsqueeze(1)  # (B, K, S-1, C, h, w)
    path, perturbed = perturbed_rollout(student, states[:, 0], labels, perturbations)
    forced, own = _mean_square(student(states[:, :-1], labels) - targets), _mean_square(path - targets)
    return {
        "teacher_history": forced,
        "own_history": own,
        "excess": own - forced,
        "perturbed": _mean_square(perturbed - targets[:, None, 1:]),
        "gain": _mean_square(perturbed - path[:, None, 1:]) / _mean_square(perturbations),
    }


def _statistics(values: Tensor) -> dict[str, list[float]]:
    """Mean over samples of (n, steps), and its standard error."""
    n, mean = len(values), values.mean(0)
    return {
        "mean": mean.tolist(),
        "sem": ((values - mean).square().sum(0) / (n * (n - 1))).sqrt().tolist(),
    }


def _names(config: DiagnoseConfig, loaded: list[tuple[ARDTransformer, dict[str, Any]]]) -> list[str]:
    if config.names:
        return [*config.names]
    names = []
    steps, states = {s.steps for s, _ in loaded}, {trained["state"] for _, trained in loaded}
    for student, trained in loaded:
        history = f"N={student.history_layers} {student.mask}"
        if student.history_layers == 0:
            history = "N=0 (step distillation)"
        parts = ["KD" if student.steps == 1 else history]
        parts += [f"S={student.steps}"] if len(steps) > 1 else []
        parts += [f"{trained['state']} states"] if len(states) > 1 else []
        names.append(", ".join(parts))
    return [
        f"{name}, {folder}" if names.count(name) > 1 else name
        for name, folder in zip(names, config.students, strict=True)
    ]


def _check(config: DiagnoseConfig) -> None:
    """What can be said before anything is read."""
    students = [folder.resolve() for folder in config.students]
    if not students or len(set(students)) < len(students):
        raise ValueError(
            f"diagnose: students are {[str(s) for s in config.students]}, accepted are one or more folders, "
            "each once"
        )
    if config.names and (len(config.names) != len(students) or len(set(config.names)) != len(students)):
        raise ValueError(f"diagnose: names are {config.names}, accepted are {len(students)} different ones, "
                         "one a student")  # fmt: skip
    if not config.sizes or not all(0 < size < math.inf for size in config.sizes):
        raise ValueError(f"diagnose: sizes are {config.sizes}, accepted are one or more numbers > 0")
    check_counts("diagnose", batch_size=config.batch_size)
    check_seed(config.seed, "diagnose")
    check_folder("diagnose", config.out)


def diagnose(config: DiagnoseConfig) -> dict[str, Any]:
    """Write diagnosis.json and diagnosis.png; returns what the former holds.

    Errors are mean squares over the elements of a state; `mean` and `sem`, the standard error of the mean,
    are over samples. Step s predicts state s.

        teacher_history   error of steps 1..S given the teacher's states, as in training
        own_history       given the student's own states, as in sampling
        excess            own_history - teacher_history, of the same samples: the exposure bias
        perturbed         for each size and of `steps` 2..S, with the newest of the own states perturbed:
                          the error, and the gain: mean square of the prediction's change over that of
                          the perturbation
        history_weights   (N, H, P) of a student whose history started closed, else None: what a key of an
                          earlier block weighs, for the pairs of blocks (2, 1), (3, 1), (3, 2), ...

    Raises:
        ValueError: an argument that is not accepted, a student of another teacher than the trajectories', or
            one whose predictions are not finite; the message names it. Nothing is written then.
    """
    _check(config)
    device = worker_device()
    config = replace(config, precision=settled(config.precision, device)[0])
    store = TrajectoryStore(config.trajectories)
    count = len(store) if config.samples is None else config.samples
    if not 2 <= count <= len(store):
        raise ValueError(
            f"diagnose: samples is {count}, accepted are 2..{len(store)}, what {store.folder} holds"
        )
    loaded = [load_student(folder) for folder in config.students]
    for folder, (student, trained) in zip(config.students, loaded, strict=True):
        store.of_student(folder, student, trained)
    rows, opened = [], {}
    with tqdm(total=count * len(loaded), desc="diagnose", unit="sample", mininterval=1.0) as bar:
        for folder, name, (student, trained) in zip(
            config.students, _names(config, loaded), loaded, strict=True
        ):
            student.to(device)
            parts = defaultdict(list)
            for indices in torch.arange(count).split(config.batch_size):
                states, labels = store.states(indices, tuple(trained["grid"]), trained["state"])
                shape = (student.steps - 1, *states.shape[2:])
                directions = index_noise(indices, shape, config.seed, Stream.DIAGNOSE)
                inputs = (x.to(device) for x in (states, labels, directions))
                with computing(config.precision, device):
                    measured = _measure(student, config.sizes, *inputs)
                for key, value in measured.items():
                    parts[key].append(value.cpu())
                bar.update(len(indices))
            student.cpu()
            values = {key: torch.cat(some) for key, some in parts.items()}
            if not all(value.isfinite().all() for value in values.values()):
                raise ValueError(f"{folder}: the student's predictions are not finite")
            opened[name] = weights_over_training(folder)
            rows.append({
                "name": name, "student": str(folder), "steps": student.steps,
                "history_layers": student.history_layers, "mask": student.mask, "state": trained["state"],
                "grid": list(trained["grid"]),
                "trained_with_the_same_noise": store.has_noise_of(trained),
                **{key: _statistics(values[key]) for key in ("teacher_history", "own_history", "excess")},
                "perturbed": [
                    {"size": size, "steps": list(range(2, student.steps + 1)),
                     "error": _statistics(values["perturbed"][:, k]),
                     "gain": _statistics(values["gain"][:, k])}
                    for k, size in enumerate(config.sizes)
                ],
                "history_weights": opened[name][-1][1].tolist() if opened[name] else None,
            })  # fmt: skip
    report = {"students": rows, "samples": count, "config": plain(config), "versions": versions()}
    write_json(config.out / "diagnosis.json", report)
    with replacing(config.out / "diagnosis.png") as temporary:
        _picture(report).savefig(temporary, format="png", dpi=130)
    if any(opened.values()):
        with replacing(config.out / "history.png") as temporary:
            weights_figure(opened).savefig(temporary, format="png", dpi=130)
    return report


def print_report(report: dict[str, Any]) -> None:
    """The errors and gains of every step as a table on stdout."""
    steps = max(row["steps"] for row in report["students"])
    lines: list[tuple[str, list[str]]] = []

    def add(title: str, values: dict[str, list[float]]) -> None:
        cells = [f"{m:.4f} ±{e:.4f}" for m, e in zip(values["mean"], values["sem"], strict=True)]
        blank = [""] * (row["steps"] - len(cells))  # the first state is the noise, and nothing perturbs it
        lines.append((f"  {title}", blank + cells))

    for row in report["students"]:
        lines.append((row["name"], []))
        for title in ("teacher_history", "own_history", "excess"):
            add(title.replace("_", " "), row[title])
        for measure in ("error", "gain"):
            for entry in row["perturbed"]:
                add(f"{measure}, newest state perturbed by {entry['size']:g}", entry[measure])
    width = max(len(title) for title, _ in lines)
    print(
        f"mean squared error against the teacher, {report['samples']} samples, ±: standard error of the mean"
    )
    print(" " * width + "".join(f"{f'step {s + 1}':>17}" for s in range(steps)))
    for title, cells in lines:
        print((title.ljust(width) + "".join(f"{cell:>17}" for cell in cells)).rstrip())
    for row in report["students"]:
        if row["trained_with_the_same_noise"]:
            print(f"{row['name']}: was trained from noise of the same seed; these are not held-out samples")


def _curve(axes: Axes, x: Sequence[float], values: dict[str, list[float]], color: str, **style: Any) -> None:
    """A curve with its standard errors."""
    axes.errorbar(x, values["mean"], values["sem"], color=color, marker="o", capsize=3, **style)


def _picture(report: dict[str, Any]) -> Figure:
    """Errors and gains of all students, one colour each. Steps of students with different S are laid over
    the same trajectory: step s of S stands at s/S."""
    rows = report["students"]
    figure = Figure(figsize=(11, 8.5), layout="constrained")
    panels = figure.subplots(2, 2)
    errors, excess, gains, final = panels.flat
    for i, row in enumerate(rows):
        color, at = f"C{i}", [step / row["steps"] for step in range(1, row["steps"] + 1)]
        entries = sorted(row["perturbed"], key=lambda entry: float(entry["size"]))
        _curve(errors, at, row["teacher_history"], color, linestyle=":", markerfacecolor="white")
        _curve(errors, at, row["own_history"], color)
        _curve(excess, at, row["excess"], color)
        if row["steps"] > 1:
            for k, entry in enumerate(entries):
                _curve(gains, at[1:], entry["gain"], color, alpha=(k + 1) / len(entries))
            ends = [row["own_history"], *(entry["error"] for entry in entries)]
            last = {key: [values[key][-1] for values in ends] for key in ("mean", "sem")}
            _curve(final, [0, *(entry["size"] for entry in entries)], last, color)
    errors.plot([], [], "ko:", markerfacecolor="white", label="given the teacher's history")
    errors.plot([], [], "ko-", label="given its own")
    errors.legend()
    for axes, level in ((excess, 0), (gains, 1)):  # nothing added; as much out as in
        axes.axhline(level, color="grey", linewidth=1)
    errors.set(title="Error of each step", ylabel="mean squared error against the teacher")
    excess.set(title="Exposure bias: error that its own history adds", ylabel="own - teacher's history")
    sizes = ", ".join(f"{size:g}" for size in sorted(report["config"]["sizes"]))
    gains.set(title=f"What is left of a perturbation of the newest state\n(rms {sizes}: pale to full colour)",
              ylabel="mean square out / in")  # fmt: skip
    final.set(title="Error of the result, newest state perturbed", xlabel="rms of the perturbation",
              ylabel="mean squared error against the teacher")  # fmt: skip
    different = {row["steps"] for row in rows}
    ticks = sorted({Fraction(step, steps) for steps in different for step in range(1, steps + 1)})
    one = len(different) == 1
    for axes in (errors, excess, gains):
        axes.set_xticks([float(t) for t in ticks], [str(i + 1 if one else t) for i, t in enumerate(ticks)])
        axes.set_xlabel("step" if one else "step / S")
    for axes in panels.flat:
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        axes.grid(alpha=0.3)
    students = [Line2D([], [], color=f"C{i}", marker="o", label=row["name"]) for i, row in enumerate(rows)]
    figure.legend(handles=students, loc="outside upper center", ncols=min(len(rows), 4))
    return figure
