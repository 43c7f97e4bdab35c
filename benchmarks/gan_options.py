"""What the options of the GAN stage do: a student of the table, finetuned with one changed at a time.

    python -m benchmarks.fashion_table --out runs/table --rows s4-n2-causal-gan --seeds 1
    python -m benchmarks.gan_options --table runs/table --out runs/gan-options

Everything else is as in the table's row "ARD, some layers + GAN", whose seed 0 is the run with the defaults.
What is there already is not made again. Writes gan_options.json, .md and .png.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from matplotlib.figure import Figure

from ard.checkpoints import write_json, write_text
from ard.evaluation import evaluate_checkpoints
from ard.finetuning import finetune
from ard.runs import plain, read_log
from benchmarks.common import environment
from benchmarks.fashion_table import ROWS, TableConfig, curve, gan_config, run_folder, side_by_side

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
    table, out = TableConfig(config.table), _out(config, name)
    every = config.iterations // config.points
    if not (out / "student").exists():
        own = gan_config(table, _ROW.start, 0, out)
        o = replace(
            own.optimisation, iterations=config.iterations, checkpoint_every=every,
            keep_checkpoints=config.points, sample_every=every,
        )  # fmt: skip
        finetune(replace(own, optimisation=o, **OPTIONS[name]))
    evaluate_checkpoints(out, config.table / "held-out", precision="no")


def _known(config: OptionsConfig) -> list[dict[str, Any]]:
    """The student before the stage, and the table's run with the defaults."""
    table = TableConfig(config.table)
    every = config.iterations // config.points
    steps = [*range(every, config.iterations + 1, every)]
    start, run = (run_folder(table, key, 0) for key in (_ROW.start, _ROW.key))
    points = [point for point in curve(run) if point["step"] in steps]
    if missing := sorted({*steps} - {point["step"] for point in points}):
        raise SystemExit(
            f"table: {config.table} has no evaluation of {_ROW.key} at {missing}, accepted is one that has"
        )
    return [
        {"name": "before", "options": {}, "curve": [{**curve(start)[-1], "step": 0}]},
        {"name": "the defaults", "options": {}, "curve": points, "log": read_log(run)},
    ]


def _found(config: OptionsConfig) -> Iterator[dict[str, Any]]:
    """What is finished."""
    for name, options in OPTIONS.items():
        points = curve(_out(config, name))
        if points and points[-1]["step"] == config.iterations:
            yield {
                "name": name, "options": options, "curve": points, "log": read_log(_out(config, name))
            }  # fmt: skip


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
    known = _known(config)
    names = config.only or tuple(OPTIONS)
    side_by_side([[partial(_finetune, config, name) for name in names]], config.jobs, "options")
    rows = [*known, *_found(config)]
    result = {"rows": rows, "config": plain(config), "environment": environment()}
    write_json(config.out / "gan_options.json", result)
    write_text(config.out / "gan_options.md", _markdown(rows))
    _picture(rows, config.out / "gan_options.png")
    print(_markdown(rows))


if __name__ == "__main__":
    main()
