"""Every row of the published table (arXiv 2504.11295, tables 1 and 2), on Fashion-MNIST.

    python -m benchmarks.fashion_table --out runs/table

Students of the embedded teacher, alike but for what a row says, trained on the same trajectories and
evaluated on others. Rows that carry a claim are trained with several seeds. Whatever is there already is not
made again: a table that was stopped, or is asked for more seeds or rows, goes on; so does one of which only
table.json is left (`--known`). Writes table.json, table.md and table.png.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from matplotlib import colormaps
from matplotlib.figure import Figure
from tqdm import tqdm

from ard.assets import ASSETS
from ard.checkpoints import load_teacher, read_json, write_json, write_text
from ard.costs import dit_macs, student_macs
from ard.data import to_uint8
from ard.diffusion import guided
from ard.distilling import DistillConfig, distill
from ard.evaluation import Judged, evaluate_checkpoints
from ard.features import Statistics, classifier_extractor
from ard.finetuning import FinetuneConfig, finetune
from ard.models import ARDTransformer
from ard.recording import RecordConfig, record
from ard.sampling import sample
from ard.training import Optimisation
from ard.trajectories import TrajectoryStore
from ard_kernels.layout import Mask
from benchmarks.common import environment, medians

_LAYERS = 8  # of the embedded teacher
_SOME = 2  # as a share of them, the paper's 6 of 28


@dataclass(frozen=True)
class Row:
    """A student of the table, and what is published of the corresponding ImageNet-256 one."""

    name: str
    steps: int
    history_layers: int = 0
    mask: Mask = "causal"
    gan: bool = False
    rollout: float = 0.0
    claim: bool = False
    """Trained with all seeds."""
    published: tuple[float, float, float, float] | None = None
    """FID, precision, recall, GMAC."""

    @property
    def key(self) -> str:
        """A folder's name."""
        own = (
            f"s{self.steps}-n{self.history_layers}-{self.mask}"
            if self.history_layers
            else f"s{self.steps}-n0"
        )
        return own + ("-gan" if self.gan else "") + (f"-rollout{self.rollout:g}" if self.rollout else "")

    @property
    def start(self) -> str:
        """Key of the row whose students the GAN stage starts from."""
        return dataclasses.replace(self, gan=False).key


ROWS = (
    Row("KD", 1, published=(11.88, 0.665, 0.565, 118.6)),
    Row("step distillation", 2, published=(10.92, 0.681, 0.518, 237.2)),
    Row("ARD, some layers", 2, _SOME, published=(6.29, 0.737, 0.564, 238.1)),
    Row("ARD, all layers", 2, _LAYERS, published=(6.54, 0.734, 0.569, 241.5)),
    Row("step distillation", 4, claim=True, published=(10.25, 0.704, 0.474, 474.4)),
    Row("ARD, some layers, M2", 4, _SOME, "window", published=(4.75, 0.768, 0.572, 477.1)),
    Row("ARD, some layers, M3", 4, _SOME, "anchor", published=(4.45, 0.773, 0.572, 477.1)),
    Row("ARD, some layers", 4, _SOME, claim=True, published=(4.32, 0.770, 0.574, 479.9)),
    Row("ARD, all layers", 4, _LAYERS, claim=True, published=(4.80, 0.761, 0.566, 500.2)),
    Row("step distillation + GAN", 4, gan=True, claim=True, published=(3.84, 0.785, 0.557, 474.4)),
    Row("ARD, some layers + GAN", 4, _SOME, gan=True, claim=True, published=(1.84, 0.797, 0.615, 479.9)),
    Row("ARD, all layers + GAN", 4, _LAYERS, gan=True, claim=True),
    Row("step distillation, own states", 4, rollout=0.5),
    Row("ARD, all layers, own states", 4, _LAYERS, rollout=0.5),
)
_TEACHERS = {"teacher, 250 steps": (250, (2.27, 0.830, 0.570, 59300.0)),
             "teacher, 25 steps": (25, (2.89, 0.797, 0.572, 5930.0))}  # fmt: skip


@dataclass(frozen=True)
class TableConfig:
    """The published table, on Fashion-MNIST."""

    out: Path = Path("runs/table")
    """Folder of everything; what is there is not made again."""
    iterations: int = 20_000
    """Of the regression stage."""
    batch_size: int = 24
    """Samples per iteration of both stages."""
    samples: int = 40_000
    """Trajectories to train on."""
    held_out: int = 5000
    """Further trajectories, to evaluate on."""
    gan_iterations: int = 2000
    """Of the GAN stage."""
    gan_warmup: int = 200
    """Of them, those in which only the discriminator learns."""
    gan_ramp: int = 200
    """Of them, those after it in which the adversarial loss comes in."""
    gan_weight: float = 10.0
    """Factor on the adversarial loss, over the adaptive weight."""
    seeds: int = 3
    """Of the rows that carry a claim; the others have one."""
    rows: tuple[str, ...] = ()
    """Only these, by key (as in the folder); default: all."""
    precision: Literal["no", "bf16"] = "bf16"
    """Of recording and training; students are evaluated in float32."""
    compile: bool = True
    """torch.compile the regression."""
    jobs: int = 2
    """Students trained side by side, with one thread each."""
    points: int = 4
    """How often a student is evaluated while it trains."""
    known: Path | None = None
    """A table.json of the same trainings: what it holds and `out` does not is taken from there, not made."""
    collect: bool = False
    """Make nothing, write the table of what is finished."""


def _seeds(config: TableConfig, row: Row) -> range:
    return range(config.seeds if row.claim else 1)


def _known(config: TableConfig) -> dict[str, Any]:
    """By key, the rows of the earlier table."""
    if config.known is None:
        return {}
    earlier = read_json(config.known)
    own = ("out", "seeds", "rows", "compile", "jobs", "known", "collect")
    for name, value in dataclasses.asdict(config).items():
        if name not in own and earlier["config"][name] != value:
            raise SystemExit(
                f"known: {config.known} is of {name} {earlier['config'][name]}, accepted is {value}"
            )
    return {row["key"]: row for row in earlier["rows"]}


def _runs(config: TableConfig) -> Iterator[tuple[Row, int]]:
    """What is to be trained: of every row its seeds; regressions first, which the GAN stage starts from."""
    known = _known(config)
    rows = [row for row in ROWS if not config.rows or row.key in config.rows]
    missing = [
        (row, seed) for row in rows for seed in _seeds(config, row)
        if row.key not in known or str(seed) not in known[row.key]["curves"]
    ]  # fmt: skip
    starts = {(row.start, seed) for row, seed in missing if row.gan}
    for row in sorted(rows, key=lambda row: row.gan):
        for seed in _seeds(config, row):
            if (row, seed) in missing or (row.key, seed) in starts:
                yield row, seed


def run_folder(config: TableConfig, key: str, seed: int) -> Path:
    return config.out / key / f"seed-{seed}"


def curve(run: Path) -> list[dict[str, Any]]:
    """The student's metrics at every checkpoint that has been evaluated."""
    points = []
    for path in sorted(run.glob("evaluations/step-*/evaluation.json")):
        report = read_json(path)
        step = int(path.parent.name.removeprefix("step-"))
        points.append({"step": step, **report["student"], "errors": report["errors"]})
    return points


def gan_config(config: TableConfig, start: str, seed: int, out: Path) -> FinetuneConfig:
    """The GAN stage from the students of the row `start`."""
    return FinetuneConfig(
        ASSETS / "teacher", run_folder(config, start, seed), "fashion-mnist", out,
        config.out / "trajectories", gan_warmup=config.gan_warmup, gan_ramp=config.gan_ramp,
        gan_weight=config.gan_weight, optimisation=_optimisation(config, seed, gan=True),
    )  # fmt: skip


def _optimisation(config: TableConfig, seed: int, gan: bool) -> Optimisation:
    iterations = config.gan_iterations if gan else config.iterations
    every = -(-iterations // config.points)
    return Optimisation(
        iterations=iterations, batch_size=config.batch_size, lr=1e-4 if gan else 1e-3,
        lr_schedule="constant" if gan else "cosine", warmup=0 if gan else 100, ema=0.998,
        compile=config.compile and not gan, checkpoint_every=every, keep_checkpoints=config.points,
        sample_every=every, seed=seed, precision=config.precision,
    )  # fmt: skip


def _train(config: TableConfig, row: Row, seed: int) -> None:
    """One student, evaluated at every checkpoint."""
    torch.set_num_threads(1)
    out = run_folder(config, row.key, seed)
    if not (out / "student").exists():
        if row.gan:
            finetune(gan_config(config, row.start, seed, out))
        else:
            distill(
                DistillConfig(
                    ASSETS / "teacher", out, config.out / "trajectories", steps=row.steps,
                    history_layers=row.history_layers, mask=row.mask, rollout=row.rollout, head="direct",
                    optimisation=_optimisation(config, seed, gan=False),
                )
            )  # fmt: skip
    evaluate_checkpoints(out, config.out / "held-out", precision="no")


def _record(config: TableConfig, folder: str) -> None:
    count, seed = (config.samples, 0) if folder == "trajectories" else (config.held_out, 1)
    reference = folder == "held-out-250"
    record(
        RecordConfig(
            ASSETS / "teacher", config.out / folder, samples=count, solver_steps=250 if reference else 25,
            keep=() if reference else "fifth", shard_size=-(-count // 4) if count > 400 else count,
            precision=config.precision, seed=seed,
        )
    )  # fmt: skip


def _recorded(folder: Path) -> bool:
    """Whether the trajectories are all there: a table may be collected while they are being made."""
    try:
        TrajectoryStore(folder)
    except (OSError, ValueError):
        return False
    return True


def _teacher_metrics(config: TableConfig, folder: str) -> dict[str, Any]:
    target = config.out / folder / "evaluation.json"
    if not target.exists():
        store = TrajectoryStore(config.out / folder)
        states, labels = store.states(torch.arange(len(store)), store.grid(1), "x0")
        extractor = classifier_extractor(ASSETS / "classifier")
        judged = Judged(extractor)
        judged.add(to_uint8(states[:, -1]), labels)
        write_json(target, judged.report(Statistics.load(ASSETS / "statistics.safetensors")))
    found: dict[str, Any] = read_json(target)
    return found


def _milliseconds(students: dict[str, ARDTransformer]) -> dict[str, float]:
    """A sample, of every student and of the 25-step teacher, in turn, batch 50."""
    teacher, diffusion = load_teacher(ASSETS / "teacher")
    labels = torch.arange(50) % teacher.num_classes
    shape = (teacher.config["channels"], *teacher.config["input_size"])
    noise = torch.randn(50, *shape, generator=torch.Generator().manual_seed(0))
    times, denoise = diffusion.solver_times(25), guided(teacher, teacher.num_classes, 1.5)
    candidates: dict[str, Any] = {"held-out": lambda: [*diffusion.ddim(denoise, noise, labels, times)]}
    for key, student in students.items():
        candidates[key] = lambda student=student: sample(student, noise, labels)
    with torch.no_grad():
        return {key: 1000 * s / len(noise) for key, s in medians(candidates, 3).items()}


def _collect(config: TableConfig) -> dict[str, Any]:
    """What is finished, as the table's rows."""
    known, teacher = _known(config), load_teacher(ASSETS / "teacher")[0]
    macs = dit_macs(teacher.config).total
    folders = {"teacher, 250 steps": "held-out-250", "teacher, 25 steps": "held-out"}
    rows: list[dict[str, Any]] = []
    for name, (steps, published) in _TEACHERS.items():
        key = folders[name]
        if _recorded(config.out / key):
            seeds = [{**_teacher_metrics(config, key), "errors": []}]
        elif key in known:
            seeds = known[key]["seeds"]
        else:
            continue
        rows.append({"name": name, "key": key, "steps": steps, "seeds": seeds, "curves": {},
                     "mmac": 2 * steps * macs / 1e6, "published": published})  # fmt: skip
    students: dict[str, ARDTransformer] = {}
    for row in ROWS:
        curves = dict(known[row.key]["curves"]) if row.key in known else {}
        for seed in _seeds(config, row):
            points = curve(run_folder(config, row.key, seed))
            end = config.gan_iterations if row.gan else config.iterations
            if points and points[-1]["step"] == end:  # else its evaluations are still being made
                curves[str(seed)] = points
        if curves:
            students[row.key] = ARDTransformer.from_teacher(teacher, row.steps, row.history_layers, row.mask)
            curves = dict(sorted(curves.items()))
            rows.append({"name": row.name, "key": row.key, "steps": row.steps, "curves": curves,
                         "seeds": [points[-1] for points in curves.values()], "published": row.published,
                         "mmac": student_macs(students[row.key].config).total / 1e6})  # fmt: skip
    milliseconds = _milliseconds(students)
    for row_ in rows:
        row_["ms"] = milliseconds.get(row_["key"])
    return {"rows": rows, "config": json.loads(json.dumps(dataclasses.asdict(config), default=str)),
            "environment": environment()}  # fmt: skip


def _spread(values: list[float], digits: int) -> str:
    """Mean, and the standard deviation over seeds where there are several."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _base(result: dict[str, Any]) -> float:
    """The 25-step teacher's Frechet distance."""
    for row in result["rows"]:
        if row["key"] == "held-out":
            return float(row["seeds"][0]["frechet"])
    raise SystemExit("table: the held-out trajectories are not there yet, which all is compared with")


def _markdown(result: dict[str, Any]) -> str:
    base = _base(result)
    lines = [
        "| | S | seeds | Frechet | excess | consistency | precision | recall | MMAC | ms/sample "
        "| error, last step | published FID | precision | recall | GMAC |",
        "|---" * 15 + "|",
    ]
    for row in result["rows"]:
        seeds = row["seeds"]
        cells = [row["name"], str(row["steps"]), str(len(seeds)), _spread([s["frechet"] for s in seeds], 2)]
        student = bool(seeds[0]["errors"])
        cells.append(_spread([s["frechet"] - base for s in seeds], 2) if student else "")
        cells += [_spread([s[name] for s in seeds], 3) for name in ("consistency", "precision", "recall")]
        cells += [f"{row['mmac']:.1f}", "" if row["ms"] is None else f"{row['ms']:.2f}"]
        cells.append(_spread([s["errors"][-1] for s in seeds], 4) if student else "")
        cells += [f"{value:g}" for value in row["published"]] if row["published"] else [""] * 4
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _pictures(config: TableConfig, result: dict[str, Any]) -> None:
    rows, base = [row for row in result["rows"] if row["curves"]], _base(result)
    figure = Figure(figsize=(12, 0.35 * len(rows) + 2))
    left, right = figure.subplots(1, 2)
    names = [f"{row['name']}, S = {row['steps']}" for row in rows]
    for i, row in enumerate(rows):
        gan, values = "GAN" in row["name"], [s["frechet"] - base for s in row["seeds"]]
        left.barh(i, statistics.mean(values), color="tab:red" if gan else "tab:blue")
        left.plot(values, [i] * len(values), "k.", markersize=4)
        for number, points in enumerate(row["curves"].values()):
            before = config.iterations if gan else 0
            right.plot(
                [before + p["step"] for p in points], [p["frechet"] for p in points], marker=".",
                color=colormaps["tab20"](i % 20), linestyle="--" if gan else "-",
                label=None if number else names[i],
            )  # fmt: skip
    right.axhline(base, color="k", linewidth=0.8, label="teacher, 25 steps")
    left.set_yticks(range(len(rows)), names)
    left.invert_yaxis()
    left.set_xlabel("Frechet distance, excess over the 25-step teacher")
    right.set(xlabel="iteration; dashed: of the GAN stage, after the regression's", ylabel="Frechet distance")
    right.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(config.out / "table.png", dpi=110)


def main() -> None:
    config = tyro.cli(TableConfig, config=(tyro.conf.OmitArgPrefixes,))
    unknown = set(config.rows) - {row.key for row in ROWS}
    if unknown:
        raise SystemExit(
            f"rows: {sorted(unknown)} are unknown, accepted are {', '.join(r.key for r in ROWS)}"
        )
    if not config.collect:
        _make(config)
    result = _collect(config)
    write_json(config.out / "table.json", result)
    write_text(config.out / "table.md", _markdown(result))
    _pictures(config, result)
    print(_markdown(result))


def side_by_side(stages: list[list[Callable[[], None]]], jobs: int, desc: str) -> None:
    """Calls in processes of one thread each; a stage begins when the one before has ended."""
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes to come
    context = multiprocessing.get_context("spawn")
    total = sum(map(len, stages))
    with ProcessPoolExecutor(jobs, context) as pool, tqdm(total=total, desc=desc) as bar:
        for stage in stages:
            for done in as_completed([pool.submit(call) for call in stage]):
                done.result()
                bar.update()


def _make(config: TableConfig) -> None:
    known, runs = _known(config), [*_runs(config)]
    if runs:
        _record(config, "trajectories")
    if runs or "held-out" not in known:
        _record(config, "held-out")
    stages: list[list[Callable[[], None]]] = [
        [partial(_train, config, row, seed) for row, seed in runs if row.gan == gan] for gan in (False, True)
    ]
    side_by_side(stages, config.jobs, "table")
    if "held-out-250" not in known:
        _record(config, "held-out-250")


if __name__ == "__main__":
    main()
