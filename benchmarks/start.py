"""Where a student starts, what its history adds and when it opens: quality over iterations and over compute.

    python -m benchmarks.start --out runs/start

Students of one teacher, alike but for what a row says, trained on the same trajectories and evaluated on
others of a seed that no choice was made on. What is there is not made again. Writes start.json, start.md and
start.png.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from matplotlib import colormaps
from matplotlib.figure import Figure

from ard.assets import ASSETS
from ard.checkpoints import load_student, load_teacher, save_student, write_json, write_text
from ard.costs import student_macs
from ard.distilling import DistillConfig, Head, HistoryStart, distill
from ard.evaluation import EvaluateConfig, evaluate, evaluate_checkpoints
from ard.grids import chosen_grid
from ard.models import ARDTransformer
from ard.precision import Precision
from ard.recording import RecordConfig, record
from ard.training import Optimisation
from ard.trajectories import State, TrajectoryStore
from benchmarks.common import environment
from benchmarks.fashion_table import curve, side_by_side


@dataclass(frozen=True)
class Row:
    """A student of the table."""

    head: Head
    state: State
    history_layers: int = 0
    start: HistoryStart = "open"
    rollout: float = 0.0

    @property
    def key(self) -> str:
        """A folder's name."""
        history = f"n{self.history_layers}" + (f"-{self.start}" if self.history_layers else "")
        own = f"-rollout{self.rollout:g}" if self.rollout else ""
        return f"{self.head}-{self.state}-{history}{own}"

    @property
    def name(self) -> str:
        history = f"N = {self.history_layers}" + (f", {self.start} at first" if self.history_layers else "")
        return f"{self.head}, {self.state}, {history}" + (", own states" if self.rollout else "")


ROWS = tuple(
    Row(head, state, layers, start, rollout)
    for rollout in (0.0, 0.5)
    for head, state in (("direct", "x0"), ("direct", "xt"), ("solver", "xt"))
    for layers, start in ((0, "open"), (2, "closed"), (8, "closed"), (8, "open"))
)


@dataclass(frozen=True)
class StartConfig:
    """Solver and direct heads, history that starts closed or open, own states or the teacher's."""

    out: Path = Path("runs/start")
    """Folder of everything; what is there is not made again."""
    teacher: Path = ASSETS / "teacher"
    """Folder of the teacher."""
    iterations: int = 2400
    """Of every student; a cosine ends there."""
    rows: tuple[str, ...] = ()
    """Only these, by key; default: all."""
    seeds: int = 3
    """Of every row."""
    steps: int = 4
    """S."""
    batch_size: int = 24
    """Samples per iteration."""
    lr: float = 1e-3
    """Peak learning rate."""
    samples: int = 12_000
    """Trajectories to train on."""
    held_out: int = 5000
    """Further trajectories, to evaluate on."""
    held_out_seed: int = 5
    """Their seed."""
    points: int = 4
    """How often a student is evaluated while it trains."""
    precision: Precision = "bf16"
    """Of recording and training; students are evaluated in float32."""
    compile: bool = False
    """torch.compile the students."""
    jobs: int = 2
    """Students trained side by side, with one thread each."""
    collect: bool = False
    """Make nothing, write the table of what is finished."""


def _chosen(config: StartConfig) -> list[Row]:
    return [row for row in ROWS if not config.rows or row.key in config.rows]


def _folder(config: StartConfig, row: Row, seed: int) -> Path:
    return config.out / row.key / f"seed-{seed}"


def _record(config: StartConfig) -> None:
    recording = RecordConfig(
        config.teacher, config.out / "trajectories", samples=config.samples, steps=config.steps,
        precision=config.precision,
    )  # fmt: skip
    record(recording)
    kept = tuple(TrajectoryStore(recording.out).manifest["kept"])
    record(
        dataclasses.replace(recording, out=config.out / "held-out", samples=config.held_out, keep=kept,
                            steps=None, seed=config.held_out_seed)
    )  # fmt: skip


def _untrained(config: StartConfig) -> None:
    """The teacher's solver of as many steps."""
    store, target = TrajectoryStore(config.out / "trajectories"), config.out / "untrained"
    if (target / "evaluation.json").exists():
        return
    teacher, _ = load_teacher(config.teacher)
    grid, entry = chosen_grid(teacher, store, config.steps)
    levels = [entry, *store.levels(grid)[1:]]
    student = ARDTransformer.from_teacher(teacher, config.steps, 0, levels=levels)
    save_student(target / "student", student, store.summary(grid, "xt"))
    evaluate(EvaluateConfig(target / "student", config.out / "held-out", out=target, precision="no"))


def _train(config: StartConfig, row: Row, seed: int) -> None:
    torch.set_num_threads(1)
    out, every = _folder(config, row, seed), -(-config.iterations // config.points)
    if not (out / "student").exists():
        o = Optimisation(
            iterations=config.iterations, batch_size=config.batch_size, lr=config.lr, lr_schedule="cosine",
            checkpoint_every=every, keep_checkpoints=config.points, sample_every=0, seed=seed,
            precision=config.precision, compile=config.compile,
        )  # fmt: skip
        distill(
            DistillConfig(
                config.teacher, out, config.out / "trajectories", steps=config.steps, head=row.head,
                state=row.state, history_layers=row.history_layers, history_start=row.start,
                rollout=row.rollout, optimisation=o,
            )
        )  # fmt: skip
    evaluate_checkpoints(out, config.out / "held-out", precision="no")


def _collect(config: StartConfig) -> dict[str, Any]:
    untrained = json.loads((config.out / "untrained" / "evaluation.json").read_text())
    rows = []
    for row in _chosen(config):
        curves = {}
        for seed in range(config.seeds):
            points = curve(_folder(config, row, seed))
            if points and points[-1]["step"] == config.iterations:
                curves[str(seed)] = points
        if curves:
            student, _ = load_student(_folder(config, row, int(next(iter(curves)))) / "student")
            macs = student_macs(student.config).total
            # Forward and backward of a sample, and the roll-out's forward of those that have one.
            training = macs * (3 + row.rollout) * config.batch_size
            rows.append({"name": row.name, "key": row.key, **dataclasses.asdict(row), "curves": curves,
                         "mmac": macs / 1e6, "gmac_an_iteration": training / 1e9})  # fmt: skip
    options = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return {
        "rows": rows, "teacher": untrained["teacher"], "config": options, "environment": environment(),
        "untrained": {**untrained["student"], "errors": untrained["errors"]},
    }  # fmt: skip


def _spread(values: list[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _markdown(result: dict[str, Any]) -> str:
    base = result["teacher"]["frechet"]
    steps = [point["step"] for point in next(iter(result["rows"][0]["curves"].values()))]
    titles = [f"excess, {step:,}" for step in steps]
    lines = [
        f"| | seeds | {' | '.join(titles)} | error per step | recall | consistency | GMAC an iteration |",
        "|---" * (6 + len(steps)) + "|",
    ]
    one = result["untrained"]
    cells = ["solver, untrained", "", *[""] * (len(steps) - 1), f"{one['frechet'] - base:.1f}",
             " ".join(f"{e:.4f}" for e in one["errors"]), f"{one['recall']:.3f}",
             f"{one['consistency']:.3f}", ""]  # fmt: skip
    lines.append("| " + " | ".join(cells) + " |")
    for row in result["rows"]:
        curves = list(row["curves"].values())
        ends = [points[-1] for points in curves]
        cells = [row["name"], str(len(curves))]
        cells += [_spread([points[i]["frechet"] - base for points in curves], 2) for i in range(len(steps))]
        errors = zip(*(end["errors"] for end in ends), strict=True)
        cells.append(" ".join(f"{statistics.mean(some):.4f}" for some in errors))
        cells += [_spread([end[name] for end in ends], 3) for name in ("recall", "consistency")]
        cells.append(f"{row['gmac_an_iteration']:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _picture(result: dict[str, Any]) -> Figure:
    """Excess over iterations and over compute, means over seeds."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    base = result["teacher"]["frechet"]
    for i, row in enumerate(result["rows"]):
        curves = list(row["curves"].values())
        steps = [point["step"] for point in curves[0]]
        excess = [
            statistics.mean(points[k]["frechet"] - base for points in curves) for k in range(len(steps))
        ]
        for axes, each in zip(panels, (1.0, row["gmac_an_iteration"] / 1000), strict=True):
            axes.plot(
                [each * step for step in steps], excess, marker=".", color=colormaps["tab20"](i % 20),
                linestyle="--" if row["rollout"] else "-", label=row["name"],
            )  # fmt: skip
    panels[0].set(xlabel="iterations", ylabel="Frechet distance, excess over the teacher", yscale="log")
    panels[1].set(xlabel="TMAC of training", yscale="log")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    return figure


def main() -> None:
    config = tyro.cli(StartConfig, config=(tyro.conf.OmitArgPrefixes,))
    if unknown := set(config.rows) - {row.key for row in ROWS}:
        raise SystemExit(
            f"rows: {sorted(unknown)} are unknown, accepted are {', '.join(r.key for r in ROWS)}"
        )
    if not config.collect:
        _record(config)
        _untrained(config)
        stages: list[list[Callable[[], None]]] = [
            [partial(_train, config, row, seed) for seed in range(config.seeds) for row in _chosen(config)]
        ]
        side_by_side(stages, config.jobs, "start")
    result = _collect(config)
    write_json(config.out / "start.json", result)
    write_text(config.out / "start.md", _markdown(result))
    _picture(result).savefig(config.out / "start.png", dpi=110)
    print(_markdown(result))


if __name__ == "__main__":
    main()
