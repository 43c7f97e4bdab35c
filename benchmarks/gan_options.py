"""What the options of the GAN stage do: a student of the table, finetuned with one changed at a time.

    python -m benchmarks.fashion_table --out runs/table --rows s4-n2-causal-gan --seeds 1
    python -m benchmarks.gan_options --table runs/table --out runs/gan-options

Everything else is as in the table's row "ARD, some layers + GAN", whose seed 0 is the run with the defaults.
What is there already is not made again. Writes gan_options.json, .md and .png.
"""

from __future__ import annotations

import multiprocessing
import os
import re
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from matplotlib.figure import Figure
from tqdm import tqdm

from ard.assets import ASSETS
from ard.checkpoints import read_json, write_json, write_text
from ard.evaluation import evaluate_checkpoints
from ard.finetuning import FinetuneConfig, finetune
from ard.runs import plain, read_log
from benchmarks.common import environment
from benchmarks.fashion_table import ROWS, TableConfig, _folder, _optimisation

(_ROW,) = (row for row in ROWS if row.key == "s4-n2-causal-gan")

# What differs from the defaults, by what it is called.
OPTIONS: dict[str, dict[str, Any]] = {
    "weight 3": {"gan_weight": 3.0},
    "through 2 steps": {"gradient_steps": 2},
    "through 4 steps": {"gradient_steps": 4},
    "teacher's states": {"history": "teacher"},
    "teacher's states, weight 1": {"history": "teacher", "gan_weight": 1.0},
    "looks at t = 250, noised": {"discriminator_time": "fixed", "fixed_time": 250},
    "looks at random t, noised": {"discriminator_time": "random"},
    "looks at t = 999, not noised": {
        "discriminator_time": "fixed",
        "fixed_time": 999,
        "discriminator_noise": False,
    },
}


@dataclass(frozen=True)
class OptionsConfig:
    """The GAN stage with one option changed at a time."""

    table: Path = Path("runs/table")
    """Folder of a finished table row s4-n2-causal-gan: the student to start from, its trajectories, and the
    run with the defaults."""
    out: Path = Path("runs/gan-options")
    """Folder of everything; what is there is not made again."""
    iterations: int = 1000
    """Of each run, at the same constant learning rate as the table's."""
    points: int = 2
    """How often each is evaluated; the table's run must have been there, too."""
    only: tuple[str, ...] = ()
    """Only these, by name; default: all."""
    jobs: int = 2
    """Runs side by side, with one thread each."""


def _out(config: OptionsConfig, name: str) -> Path:
    return config.out / "-".join(re.findall(r"[\w']+", name))


def _finetune(config: OptionsConfig, name: str) -> None:
    """One run, evaluated at every checkpoint."""
    torch.set_num_threads(1)
    table = TableConfig(config.table)
    out = _out(config, name)
    every = config.iterations // config.points
    if not (out / "student").exists():
        options = {"gan_weight": table.gan_weight, **OPTIONS[name]}
        o = replace(
            _optimisation(table, 0, gan=True), iterations=config.iterations, checkpoint_every=every,
            keep_checkpoints=config.points, sample_every=every,
        )  # fmt: skip
        finetune(
            FinetuneConfig(
                ASSETS / "teacher", _folder(table, _ROW.start, 0), "fashion-mnist", out,
                config.table / "trajectories", gan_warmup=table.gan_warmup, gan_ramp=table.gan_ramp,
                optimisation=o, **options,
            )
        )  # fmt: skip
    evaluate_checkpoints(out, config.table / "held-out")


def _points(reports: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"step": step, **report["student"], "errors": report["errors"]}
        for step, report in sorted(reports.items())
    ]


def _reports(run: Path) -> dict[int, dict[str, Any]]:
    found = sorted(run.glob("evaluations/step-*/evaluation.json"))
    return {int(path.parent.name.removeprefix("step-")): read_json(path) for path in found}


def _collect(config: OptionsConfig) -> list[dict[str, Any]]:
    """The student before the stage, the table's run with the defaults, and what is finished of the others."""
    table = TableConfig(config.table)
    every = config.iterations // config.points
    steps = range(every, config.iterations + 1, every)
    before = _points(_reports(_folder(table, _ROW.start, 0)))[-1]
    defaults = _reports(_folder(table, _ROW.key, 0))
    if missing := sorted({*steps} - {*defaults}):
        raise SystemExit(
            f"table: {config.table} has no evaluation of {_ROW.key} at {missing}, accepted is one that has"
        )
    rows: list[dict[str, Any]] = [
        {"name": "before", "options": {}, "curve": [{**before, "step": 0}]},
        {
            "name": "the defaults",
            "options": {},
            "curve": _points({step: defaults[step] for step in steps}),
            "log": read_log(_folder(table, _ROW.key, 0)),
        },
    ]
    for name, options in OPTIONS.items():
        reports = _reports(_out(config, name))
        if config.iterations in reports:
            log = read_log(_out(config, name))
            rows.append({"name": name, "options": options, "curve": _points(reports), "log": log})
    return rows


def _markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| | steps | Frechet | recall | consistency | error, first step | error, last step |",
             "|---" * 7 + "|"]  # fmt: skip
    for row in rows:
        for i, point in enumerate(row["curve"]):
            cells = [
                "" if i else row["name"], f"{point['step']:,}", f"{point['frechet']:.2f}",
                *(f"{point[name]:.3f}" for name in ("recall", "consistency")),
                f"{point['errors'][0]:.4f}", f"{point['errors'][-1]:.4f}",
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Every run's Frechet distance, and what the log of the run with the defaults says."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    before, *others = rows
    log = others[0]["log"]
    for i, row in enumerate(others):
        points = [*before["curve"], *row["curve"]]
        steps, distances = [p["step"] for p in points], [p["frechet"] for p in points]
        left.plot(steps, distances, color=f"C{i}", marker=".", label=row["name"])
    left.set(title="Frechet distance", xlabel="step", yscale="log")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    steps = [line["step"] for line in log]
    for name, label in (("real", "of real images"), ("made", "of the student's")):
        middle.plot(steps, [line[name] for line in log], label=label)
    middle.set(title="Mean logits of the discriminator, the defaults", xlabel="step")
    middle.legend()
    right.plot(steps, [line["regression"] for line in log])
    right.set(title="Regression loss, the defaults", xlabel="step", yscale="log")
    figure.savefig(path, dpi=110)


def main() -> None:
    config = tyro.cli(OptionsConfig, config=(tyro.conf.OmitArgPrefixes,))
    if unknown := set(config.only) - set(OPTIONS):
        raise SystemExit(f"only: {sorted(unknown)} are unknown, accepted are {', '.join(OPTIONS)}")
    if config.iterations % config.points:
        raise SystemExit(
            f"points is {config.points}, accepted are divisors of iterations, {config.iterations}"
        )
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes to come
    names = config.only or tuple(OPTIONS)
    with (
        ProcessPoolExecutor(config.jobs, multiprocessing.get_context("spawn")) as pool,
        tqdm(total=len(names), desc="options") as bar,
    ):
        for done in as_completed([pool.submit(_finetune, config, name) for name in names]):
            done.result()
            bar.update()
    rows = _collect(config)
    result = {"rows": rows, "config": plain(config), "environment": environment()}
    write_json(config.out / "gan_options.json", result)
    write_text(config.out / "gan_options.md", _markdown(rows))
    _picture(rows, config.out / "gan_options.png")
    print(_markdown(rows))


if __name__ == "__main__":
    main()
